"""A batcher answers as a predictor does, and asks the backbone as seldom as it can."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
import torch

from restuning import Predictor, load_backbone
from restuning._errors import (
    AnswerError,
    BusyError,
    DataError,
    TooLargeError,
    UnknownNameError,
)
from restuning.serve.batcher import Batcher, Live, Pace
from restuning.serve.limits import Limits
from serving import as_words, picture, same, save_overflowing, save_task, save_tasks
from zoo import folders

PATIENCE = 60


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return save_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def predictor(tasks):
    return Predictor.load(tasks)


@pytest.fixture(scope="module")
def reference(tasks):
    """Another host: what the tests ask of it is not counted."""
    return Predictor.load(tasks)


@pytest.fixture
def made(predictor):
    """Forwards of the backbone, one each."""
    forwards = []
    handle = predictor.host.model.register_forward_pre_hook(lambda _, x: forwards.append(len(x[0])))
    yield forwards
    handle.remove()


@pytest.fixture
def batcher(predictor):
    made = live_batcher(predictor)
    yield made
    assert made.drain(PATIENCE)


def live_batcher(predictor, **how):
    return Batcher(Live(predictor, {n: f"{n} 1" for n in predictor.tasks}), **how)


def answers(futures):
    return [future.result(PATIENCE).answer for future in futures]


class Held:
    """While it is held, the thread that answers waits inside its forward."""

    def __init__(self, predictor):
        self.predictor, self.inside, self.go = predictor, Event(), Event()

    def __enter__(self):
        def wait(*_):
            self.inside.set()
            assert self.go.wait(PATIENCE)

        self.handle = self.predictor.host.model.register_forward_pre_hook(wait)
        return self

    def __exit__(self, *_):
        self.go.set()
        self.handle.remove()


def test_many_who_ask_at_once_are_answered_as_by_the_predictor(batcher, reference):
    images = [picture(seed) for seed in range(12)]
    with ThreadPoolExecutor(6) as pool:
        asked = list(pool.map(lambda image: batcher.ask([image])[0], images))
    for image, answer in zip(images, answers(asked), strict=True):
        assert same(answer, reference(image)[0])


def test_one_image_asked_of_every_task_in_a_call_each_costs_one_forward(batcher, made):
    bypasses = [name for name in batcher.live.versions if name != "inline"]
    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda n: batcher.ask([picture()], [bypasses[n % 3]])[0], range(64))
        replies = [future.result(PATIENCE) for future in asked]
    assert made == [1]
    assert sum(not reply.cached for reply in replies) >= 1
    assert batcher.counts.forwards == 1
    assert batcher.counts.hits + batcher.counts.misses == 64


def test_a_task_inside_the_backbone_takes_a_forward_of_its_own_and_once(batcher, made, reference):
    for _ in range(2):
        (answer,) = answers(batcher.ask([picture()], ["inline", "t1"]))
        assert list(answer.predictions) == ["inline", "t1"]
        assert same(
            answer, type(answer)(None, {n: reference(picture())[0][n] for n in ("inline", "t1")})
        )
    assert made == [1, 1]


def test_what_waits_while_a_batch_is_answered_is_the_next_batch(batcher, made, predictor):
    with Held(predictor) as held:
        first = batcher.ask([picture(0)])
        assert held.inside.wait(PATIENCE)
        later = [batcher.ask([picture(seed % 3 + 1)], ["t0"])[0] for seed in range(6)]
        while batcher._decoding:
            time.sleep(0.001)
    answers([*first, *later])
    # The shared forward of the first and its inline one; then three images, each asked twice.
    assert made == [1, 1, 3]
    assert batcher.counts.batches == {1: 1, 3: 1}


def test_of_one_image_in_one_batch_only_what_was_known_is_told_as_known(batcher, predictor):
    answers(batcher.ask([picture(0)], ["t0"]))
    with Held(predictor) as held:
        first = batcher.ask([picture(1)], ["t0"])
        assert held.inside.wait(PATIENCE)
        before = batcher.counts.hits, batcher.counts.misses
        asked = [batcher.ask([picture(0)], tasks)[0] for tasks in (["t1"], ["inline"], ["t0"])]
        while batcher._decoding:
            time.sleep(0.001)
    answers(first)
    assert [future.result(PATIENCE).cached for future in asked] == [True, False, True]
    assert (batcher.counts.hits, batcher.counts.misses) == (before[0] + 2, before[1] + 2)


def test_a_full_queue_refuses_and_says_when_to_come_again(predictor):
    batcher = live_batcher(predictor, waiting=3)
    with Held(predictor) as held:
        asked = batcher.ask([picture(0)])
        assert held.inside.wait(PATIENCE)
        with pytest.raises(BusyError, match="too much to do") as error:
            batcher.ask([picture(seed) for seed in range(3)])
        assert error.value.seconds >= 1
        asked += batcher.ask([picture(1), picture(2)])
    answers(asked)
    assert batcher.counts.refused == 3
    assert batcher.drain(PATIENCE)
    with pytest.raises(BusyError, match="about to end"):
        batcher.ask([picture(0)])


def test_who_no_longer_waits_costs_nothing(batcher, predictor, made):
    with Held(predictor) as held:
        first = batcher.ask([picture(0)], ["t0"])
        assert held.inside.wait(PATIENCE)
        late = batcher.ask([picture(1)], ["t0"], seconds=0)
        (given_up,) = batcher.ask([picture(2)], ["t0"])
        assert given_up.cancel()
    answers(first)
    assert batcher.drain(PATIENCE)
    with pytest.raises(BusyError, match="in time"):
        late[0].result(PATIENCE)
    assert made == [1]
    assert batcher.counts.expired == 2


def test_one_bad_input_fails_for_nobody_else(predictor, reference):
    batcher = live_batcher(predictor, check=Limits(pixels=40 * 48).check)
    good, bad, large = (
        batcher.ask([each])[0] for each in (picture(3), b"no image", picture(3, size=(41, 48)))
    )
    assert same(good.result(PATIENCE).answer, reference(picture(3))[0])
    with pytest.raises(DataError, match="cannot be read"):
        bad.result(PATIENCE)
    with pytest.raises(TooLargeError, match="41"):
        large.result(PATIENCE)
    with pytest.raises(UnknownNameError, match="no such task: dogs"):
        batcher.ask([picture(3)], ["dogs"])
    assert batcher.drain(PATIENCE)


def test_an_image_that_is_named_and_not_given_is_refused(batcher, tmp_path):
    """Its features would be kept under the name, whatever the file holds later."""
    (tmp_path / "a.png").write_bytes(picture())
    (named,) = batcher.ask([str(tmp_path / "a.png")], ["t0"])
    with pytest.raises(DataError, match="neither bytes nor pixels"):
        named.result(PATIENCE)


def test_an_answer_that_cannot_be_told_fails_alone_and_nothing_counts_twice(
    batcher, predictor, monkeypatch
):
    tell = predictor.answer

    def answer(given, *more):
        if given == picture(2):
            raise RuntimeError("no words for it")
        return tell(given, *more)

    monkeypatch.setattr(predictor, "answer", answer)
    with Held(predictor) as held:
        first = batcher.ask([picture(9)], ["t0"])
        assert held.inside.wait(PATIENCE)
        asked = batcher.ask([picture(1), picture(2)], ["t0"])
        while batcher._decoding:
            time.sleep(0.001)
    answers([*first, asked[0]])
    with pytest.raises(RuntimeError, match="no words"):
        asked[1].result(PATIENCE)
    assert batcher.counts.inputs == 2 and batcher.counts.failed == 1


def test_a_backbone_that_fails_on_one_input_answers_the_others(batcher, predictor, reference):
    def fail(_, inputs):
        if (inputs[0][:, 0, 0, 0] == inputs[0][:, 0, 0, 0].max()).all():
            return
        raise RuntimeError("not together")

    images = [picture(seed) for seed in range(4)]
    with Held(predictor) as held:
        first = batcher.ask([picture(9)], ["t0"])
        assert held.inside.wait(PATIENCE)
        asked = [batcher.ask([image], ["t0"])[0] for image in images]
        while batcher._decoding:
            time.sleep(0.001)
        handle = predictor.host.model.register_forward_pre_hook(fail)
    try:
        found = answers([*first, *asked])[1:]
    finally:
        handle.remove()
    for image, answer in zip(images, found, strict=True):
        assert torch.allclose(
            answer["t0"].probabilities, reference(image)[0]["t0"].probabilities, atol=1e-5
        )


def test_features_are_let_go_when_there_are_too_many(predictor, made):
    small = live_batcher(predictor, pace=Pace(cache=20_000))
    for seed in (0, 1, 2, 3, 3, 0):
        answers(small.ask([picture(seed)], ["t0"]))
    # The last image was still known, the first no more.
    assert made == [1] * 5
    assert 0 < small.cache.bytes <= 20_000
    assert small.drain(PATIENCE)


def test_who_asked_before_an_exchange_is_answered_by_what_was_there(batcher, predictor, reference):
    before = batcher.live
    with Held(predictor) as held:
        first = batcher.ask([picture(0)], ["t0"])
        assert held.inside.wait(PATIENCE)
        old = batcher.ask([picture(0)], ["t0"])
        others = {**predictor.tasks, "t0": predictor.tasks["t1"]}
        batcher.live = Live(predictor.exchange(others), {**before.versions, "t0": "t0 2"})
        new = batcher.ask([picture(0)], ["t0"])
    wanted = reference(picture(0))[0]
    for futures, task, version in ((first, "t0", "t0 1"), (old, "t0", "t0 1"), (new, "t1", "t0 2")):
        reply = futures[0].result(PATIENCE)
        assert reply.versions == {"t0": version}
        assert torch.allclose(
            reply.answer["t0"].probabilities, wanted[task].probabilities, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["text", "tags"])
def test_texts_of_any_length_are_answered_from_kept_features(kind, tmp_path):
    backbone = load_backbone(f"hf:{folders.bert(tmp_path / 'bert')}")
    host = backbone.host()
    pools = ("all", "all") if kind == "tags" else ("mean", "cls")
    saved = {}
    for number, pool in enumerate(pools):
        made = save_task(backbone, tmp_path / f"{number}", host=host, pool=pool, seed=number)
        saved[f"{number}"] = made
    if kind == "tags":
        for folder in saved.values():
            as_words(folder)
    reference = Predictor.load(saved, backbone=backbone)
    batcher = live_batcher(Predictor.load(saved, backbone=backbone))
    texts = ["a good film", "bad", "the film and a very very good paris", ""]
    given = [t.split() for t in texts] if kind == "tags" else texts
    wanted = [reference([each])[0] if each or kind == "text" else None for each in given]
    for _ in range(2):
        found = answers(batcher.ask(given))
        for text, answer, right in zip(given, found, wanted, strict=True):
            assert answer.input == text
            assert (
                not answer.predictions and not answer.words
                if right is None
                else same(answer, right)
            )
    assert batcher.counts.forwards == 1
    assert batcher.drain(PATIENCE)


def test_the_backbone_s_own_feature_is_given_beside_the_answer(batcher, predictor):
    (future,) = batcher.ask([picture(0)], ["t0"], embed=True)
    future.result(PATIENCE)
    (alone,) = batcher.ask([picture(0)], [], embed=True)
    with torch.no_grad():
        x = predictor.inputs.batch([picture(0)]).args[0]
        feature = predictor.host.readout(predictor.host.features(x)["block.6"])[0]
    assert torch.allclose(future.result(PATIENCE).embedding, feature, atol=1e-5)
    assert torch.equal(alone.result(PATIENCE).embedding, future.result(PATIENCE).embedding)
    assert alone.result(PATIENCE).cached


def test_whoever_drains_waits_until_what_was_taken_is_handed_on(predictor):
    batcher = live_batcher(predictor)
    submit, ends = batcher._decoders.submit, []

    def drain_meanwhile(*job):
        ends.append(Thread(target=batcher.drain, args=(0,)))
        ends[-1].start()
        ends[-1].join(0.05)
        return submit(*job)

    batcher._decoders.submit = drain_meanwhile
    (answer,) = answers(batcher.ask([picture()]))
    assert answer.predictions.keys() == predictor.tasks.keys()


def test_whoever_drains_does_not_wait_for_what_the_ending_interpreter_takes_no_more(predictor):
    batcher = live_batcher(predictor)
    # As the interpreter does before threads that still ask are stopped.
    batcher._decoders.shutdown()
    with pytest.raises(BusyError, match="about to end"):
        batcher.ask([picture(0), picture(1)])
    assert batcher.held == 0
    assert batcher.drain(PATIENCE)


def test_whoever_drains_does_not_wait_for_questions_that_were_given_up(predictor):
    batcher = live_batcher(predictor)
    with Held(predictor) as held:
        first = batcher.ask([picture(0)], ["t0"])
        assert held.inside.wait(PATIENCE)
        (given_up,) = batcher.ask([picture(1)], ["t0"])
        while batcher._decoding:
            time.sleep(0.001)
        assert given_up.cancel()
        with ThreadPoolExecutor(1) as pool:
            draining = pool.submit(batcher.drain, PATIENCE)
            while not batcher._closed:
                time.sleep(0.001)
            start = time.monotonic()
            held.go.set()
            assert draining.result(PATIENCE)
    answers(first)
    assert time.monotonic() - start < PATIENCE / 2


def test_questions_that_were_given_up_make_room_for_others(predictor, made):
    batcher = live_batcher(predictor, waiting=3)
    with Held(predictor) as held:
        first = batcher.ask([picture(0)], ["t0"])
        assert held.inside.wait(PATIENCE)
        given_up = batcher.ask([picture(1), picture(2)], ["t0"])
        with pytest.raises(BusyError):
            batcher.ask([picture(3)], ["t0"])
        assert all(future.cancel() for future in given_up)
        while batcher._decoding:
            time.sleep(0.001)
        later = batcher.ask([picture(3), picture(4)], ["t0"])
    answers([*first, *later])
    assert batcher.drain(PATIENCE)
    assert batcher.counts.expired == 2
    assert made == [1, 2]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """Two tasks of which one answers with what is no number, in the answers of a predictor."""
    folder, backbone = tmp_path_factory.mktemp("overflowing"), load_backbone("restuning-tiny")
    host = backbone.host()
    return {
        "right": save_task(backbone, folder / "right.task", host=host),
        "bad": save_overflowing(backbone, folder / "bad.task", host=host),
    }


def test_an_answer_that_is_no_number_is_an_error_of_whoever_asked_that_task(overflowing):
    predictor = Predictor.load(overflowing)
    wanted = Predictor.load({"right": overflowing["right"]})(picture())[0]
    batcher = live_batcher(predictor)
    with Held(predictor) as held:
        first = batcher.ask([picture(9)], ["right"])
        assert held.inside.wait(PATIENCE)
        asked = [batcher.ask([picture()], names)[0] for names in (["right"], ["right", "bad"])]
        while batcher._decoding:
            time.sleep(0.001)
    answers(first)
    assert same(asked[0].result(PATIENCE).answer, wanted)
    with pytest.raises(AnswerError, match=r"no number: bad\n.*NaN or infinite"):
        asked[1].result(PATIENCE)
    # The others of the batch were not asked again for it.
    assert batcher.counts.batches == {1: 2}
    assert batcher.counts.inputs == 2 and batcher.counts.failed == 1
    assert batcher.counts.no_number == {"bad": 1}
    assert batcher.drain(PATIENCE)


def test_the_predictor_refuses_an_answer_that_is_no_number_and_names_the_input(
    overflowing, tmp_path
):
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(AnswerError, match=r"bad\n.*a\.png"):
        Predictor.load(overflowing)(tmp_path / "a.png")


def ask_in_turns(batcher, clients, turns):
    """Clients that ask again when they are answered, each about an image of its own each time."""

    def client(number):
        for turn in range(turns):
            batcher.ask([picture(1000 * number + turn)])[0].result(PATIENCE)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def test_clients_who_ask_again_at_once_share_a_forward_each_time(predictor):
    # Or they part for good: half of them would come back while the others are answered.
    clients, turns, seconds = 4, 6, 0.2
    handle = predictor.host.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    batcher = live_batcher(predictor, pace=Pace(delay=0.05))
    try:
        ask_in_turns(batcher, clients, turns)
    finally:
        handle.remove()
        assert batcher.drain(PATIENCE)
    sizes = batcher.counts.batches
    assert sum(size * count for size, count in sizes.items()) == clients * turns
    # The first may come alone, and one may be late once.
    assert sum(sizes.values()) <= turns + 3


def test_nobody_is_waited_for_where_nobody_was_answered_beside_it_or_no_delay_is_allowed(predictor):
    for delay, clients in ((30.0, 1), (0.0, 2)):
        batcher = live_batcher(predictor, pace=Pace(delay=delay))
        start = time.monotonic()
        ask_in_turns(batcher, clients, 3)
        assert time.monotonic() - start < delay or delay == 0
        assert batcher._patience == delay
        assert batcher.drain(PATIENCE)


def test_who_asks_again_the_moment_he_is_told_is_waited_for_once(predictor):
    delay, again = 8.0, Event()
    batcher = live_batcher(predictor, pace=Pace(delay=delay))
    later = []

    def ask_again(_):
        # In the thread that tells, before it looks who else is there.
        later.extend(batcher.ask([picture(2)]))
        again.set()

    start = time.monotonic()
    batcher.ask([picture(1)])[0].add_done_callback(ask_again)
    assert again.wait(PATIENCE)
    answers(later)
    assert time.monotonic() - start < delay
    assert batcher.drain(PATIENCE)

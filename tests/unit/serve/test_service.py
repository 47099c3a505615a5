"""Tasks of a server are added, exchanged and taken out while it answers."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import numpy as np
import pytest

from restuning import Predictor, RestuningError, load_backbone
from restuning._errors import BusyError, DataError, FormatError, TooLargeError, UnknownNameError
from restuning.serve import service as module
from restuning.serve.limits import Limits
from restuning.serve.service import MOST_BANKS, Service
from restuning.serve.web.embeddings import _find_backbone
from restuning.task import multi_task
from serving import (
    picture,
    prepared_otherwise,
    same,
    save_all_kinds,
    save_overflowing,
    save_task,
    save_tasks,
)
from zoo import folders

PATIENCE = 60


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return save_tasks(tmp_path_factory.mktemp("tasks"), inline=False)


@pytest.fixture
def service(tasks):
    made = Service({n: tasks[n] for n in ("t0", "t1")})
    yield made
    assert made.drain(PATIENCE)


def ask(service, given, tasks=None, kind="image"):
    (futures,) = service.ask(kind, [given], tasks)
    return [future.result(PATIENCE) for future in futures]


def right(folder, name="t0"):
    """What the task of a folder says."""
    return Predictor.load({name: folder})(picture())[0]


def test_tasks_are_put_in_exchanged_and_taken_out(service, tasks):
    answered = {n: right(tasks[n], "x")["x"] for n in tasks}

    def said(name):
        return ask(service, picture(), [name])[0].answer[name]

    before = service.entries["t0"]
    service.put("t2", tasks["t2"])
    assert [*service.entries] == ["t0", "t1", "t2"]
    assert said("t2") == answered["t2"]
    service.put("t0", tasks["t1"])
    assert said("t0").label == answered["t1"].label
    assert service.entries["t0"].version == service.entries["t1"].version != before.version
    service.remove("t1")
    with pytest.raises(UnknownNameError, match="no such task: t1"):
        ask(service, picture(), ["t1"])
    with pytest.raises(UnknownNameError):
        service.remove("t1")
    assert [*ask(service, picture())[0].answer.predictions] == ["t0", "t2"]
    assert service.batchers[0].counts.forwards == 1


def test_a_folder_that_is_no_task_is_refused_and_the_old_one_answers(service, tasks, tmp_path):
    damaged = shutil.copytree(tasks["t1"], tmp_path / "t0.task")
    weights = damaged / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(FormatError, match="sha256"):
        service.put("t0", damaged)
    with pytest.raises(FormatError, match="no task here"):
        service.put("t0", tmp_path / "nothing")
    with pytest.raises(DataError, match="cannot be served"):
        service.put("../t0", tasks["t1"])
    other = json.loads((tasks["t1"] / "task.json").read_text())
    other["backbone"]["name"] = "timm:resnet18"
    shutil.copytree(tasks["t1"], tmp_path / "other")
    (tmp_path / "other" / "task.json").write_text(json.dumps(other))
    with pytest.raises(RestuningError):
        service.put("t0", tmp_path / "other", known_backbone=True)
    assert same(ask(service, picture(), ["t0"])[0].answer, right(tasks["t0"]))
    assert service.entries["t0"].folder == tasks["t0"]


def test_the_weights_of_the_backbone_are_read_for_the_first_task_alone(service, tasks, monkeypatch):
    host = service.batchers[0].live.predictor.host
    read = []
    monkeypatch.setattr(type(host), "identity", lambda self: read.append(self))
    for number in range(MOST_BANKS + 2):
        service.put(f"more{number}", tasks["t2"])
    assert not read
    assert len(service.batchers[0].live.predictor.multi.banks) <= MOST_BANKS
    service.gather()
    assert len(service.batchers[0].live.predictor.multi.banks) == 1
    assert len(ask(service, picture())[0].answer.predictions) == MOST_BANKS + 4


def test_the_last_task_of_a_backbone_takes_it_along(tasks):
    service = Service({"t0": tasks["t0"]})
    service.remove("t0")
    assert not service.batchers
    with pytest.raises(DataError, match="no task here answers"):
        ask(service, picture())
    service.put("t1", tasks["t1"])
    assert ask(service, picture())[0].answer["t1"].label == right(tasks["t1"], "t1")["t1"].label
    service.drain(PATIENCE)


def test_images_and_texts_are_answered_side_by_side(tasks, tmp_path):
    backbone = load_backbone(f"hf:{folders.bert(tmp_path / 'bert')}")
    text = save_task(backbone, tmp_path / "mood.task", pool="mean")
    service = Service({"t0": tasks["t0"], "mood": text})
    service.warm_up()
    assert [b.kind for b in service.batchers] == ["image", "text"]
    assert list(ask(service, picture())[0].answer.predictions) == ["t0"]
    said = ask(service, "a good film", kind="text")[0].answer
    assert same(said, Predictor.load({"mood": text})("a good film")[0])
    with pytest.raises(DataError, match="another kind"):
        ask(service, "a good film", ["t0"], kind="text")
    service.drain(PATIENCE)


def test_two_ways_of_preparing_inputs_are_told_apart(tasks, tmp_path):
    other = prepared_otherwise(tasks["t1"], tmp_path / "other.task")
    service = Service({"t0": tasks["t0"]})
    with pytest.raises(DataError, match="prepares its inputs as none"):
        service.put("other", other, known_backbone=True)
    assert [*service.named_batchers] == ["restuning-tiny image"]
    service.put("other", other)
    assert len(service.named_batchers) == 2
    assert {name[:21] for name in service.named_batchers} == {"restuning-tiny image "}
    for model in (None, "restuning-tiny"):
        with pytest.raises(UnknownNameError, match="name a task"):
            _find_backbone(service, model)
    assert _find_backbone(service, "other") is service.entries["other"].batcher
    service.drain(PATIENCE)


def test_limits_are_kept(tasks):
    service = Service({"t0": tasks["t0"]}, limits=Limits(inputs=2, pixels=100))
    with pytest.raises(TooLargeError, match="too many inputs"):
        service.ask("image", [picture()] * 3)
    for given in (picture(), np.zeros((11, 10, 3), np.uint8)):
        with pytest.raises(TooLargeError, match="too many pixels"):
            ask(service, given)
    with pytest.raises(TooLargeError, match="too long"):
        Limits(text=100).check([""] * 101)
    service.drain(PATIENCE)
    with pytest.raises(BusyError, match="about to end"):
        ask(service, picture())


def test_every_answer_under_exchanges_is_of_one_version_and_right(tasks):
    service = Service({"t": tasks["t0"], "other": tasks["t2"]})
    wanted = {}
    for name in ("t0", "t1"):
        service.put("t", tasks[name])
        wanted[service.entries["t"].version] = right(tasks[name], "t")
    stop, wrong, count = Event(), [], [0]

    def client(seed):
        while not stop.is_set():
            (reply,) = ask(service, picture(), ["t"])
            count[0] += 1
            if not same(reply.answer, wanted[reply.versions["t"]]):
                wrong.append(reply)

    threads = [Thread(target=client, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for number in range(6):
        service.put("t", tasks[f"t{number % 2}"])
    time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong
    assert count[0] > 20
    assert service.batchers[0].counts.forwards == 1
    service.drain(PATIENCE)


@pytest.mark.parametrize("when", ["at the start", "put in", "beside others of its backbone"])
def test_a_task_that_is_saved_while_it_is_opened_answers_as_the_version_that_it_tells(
    tasks, tmp_path, monkeypatch, when
):
    folder = shutil.copytree(tasks["t0"], tmp_path / "t.task")
    beside = when == "beside others of its backbone"
    if beside:
        folder = prepared_otherwise(tasks["t0"], tmp_path / "other.task")
    late = shutil.copytree(tasks["t1"], tmp_path / "late.task")
    if beside:
        late = prepared_otherwise(tasks["t1"], tmp_path / "late_too.task")
    service = Service({"other": tasks["t2"]} if beside else ())
    versions = [module._describe_version(each)[1] for each in (folder, late)]

    def saved_meanwhile(opened):
        def open_(*args, **how):
            for file in late.iterdir():
                shutil.copy(file, folder / file.name)
            return opened(*args, **how)

        return open_

    monkeypatch.setattr(module, "load", saved_meanwhile(module.load))
    monkeypatch.setattr(module.Predictor, "load", saved_meanwhile(module.Predictor.load))
    if when == "at the start":
        service = Service({"t": folder})
    else:
        service.put("t", folder)
    assert service.entries["t"].version == versions[1] != versions[0]
    reply = ask(service, picture(), ["t"])[0]
    monkeypatch.undo()
    assert reply.versions == {"t": versions[1]}
    assert same(reply.answer, right(late, "t"))
    assert len(service.batchers) == 1 + beside
    service.drain(PATIENCE)


def test_a_backbone_that_many_ask_for_at_once_is_opened_once(tasks, monkeypatch):
    service, opened, together = Service(), [], Barrier(3)
    load = module.Predictor.load
    monkeypatch.setattr(
        module.Predictor, "load", lambda *args, **how: opened.append(1) or load(*args, **how)
    )

    def put(name):
        together.wait(PATIENCE)
        service.put(name, tasks[name])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(put, tasks))
    assert opened == [1] and len(service.batchers) == 1
    (reply,) = ask(service, picture())
    assert {*reply.answer.predictions} == {*tasks} == {*service.entries}
    service.drain(PATIENCE)


@pytest.mark.parametrize("among", ["t0", "t0 t2"])
@pytest.mark.parametrize("named", [True, False])
def test_a_task_that_moves_to_another_batcher_while_it_is_asked_is_answered(
    tasks, tmp_path, monkeypatch, among, named
):
    """Its old batcher has ended with its last task, or knows it no more."""
    other = prepared_otherwise(tasks["t1"], tmp_path / "other.task")
    service = Service({n: tasks[n] for n in among.split()})
    old = service.entries["t0"].batcher
    asked = old.ask

    def moved_first(*args, **how):
        monkeypatch.setattr(old, "ask", asked)
        service.put("t0", other)
        return asked(*args, **how)

    monkeypatch.setattr(old, "ask", moved_first)
    replies = ask(service, picture(), among.split() if named else None)
    answers = {n: reply.answer[n] for reply in replies for n in reply.versions}
    assert {*answers} == {*among.split()}
    assert answers["t0"].label == right(other)["t0"].label
    assert service.entries["t0"].batcher is not old
    service.drain(PATIENCE)


def test_a_task_that_is_taken_out_while_all_are_asked_is_not_missed(service, monkeypatch):
    batcher = service.batchers[0]
    asked = batcher.ask

    def taken_out_first(*args, **how):
        monkeypatch.setattr(batcher, "ask", asked)
        service.remove("t1")
        return asked(*args, **how)

    monkeypatch.setattr(batcher, "ask", taken_out_first)
    (reply,) = ask(service, picture())
    assert [*reply.answer.predictions] == ["t0"]
    monkeypatch.setattr(batcher, "ask", lambda *a, **k: service.remove("t0") or asked(*a, **k))
    with pytest.raises(UnknownNameError, match="no such task: t0"):
        ask(service, picture(), ["t0"])


def test_clients_of_a_task_that_moves_to_and_fro_are_all_answered_by_some_version(tasks, tmp_path):
    folders_ = [tasks["t0"], prepared_otherwise(tasks["t1"], tmp_path / "other.task")]
    service, wanted = Service({"stays": tasks["t2"]}), {}
    for folder in folders_:
        wanted[service.put("t", folder).version] = right(folder, "t")
    stop, wrong, count = Event(), [], [0]

    def client(_):
        while not stop.is_set():
            (reply,) = ask(service, picture(), ["t"])
            count[0] += 1
            if not same(reply.answer, wanted[reply.versions["t"]]):
                wrong.append(reply)

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client, n) for n in range(3)]
        try:
            for turn in range(20):
                service.put("t", folders_[turn % 2])
        finally:
            stop.set()
        for each in clients:
            each.result(PATIENCE)
    assert not wrong and count[0] > 20
    assert service.drain(PATIENCE)


def test_whoever_asked_a_batcher_that_ended_is_waited_for(tasks):
    service = Service({"t0": tasks["t0"]})
    batcher, go = service.batchers[0], Event()
    hold = batcher.live.predictor.host.model.register_forward_pre_hook(
        lambda *_: go.wait(PATIENCE) and None
    )
    ((future,),) = service.ask("image", [picture()])
    service.remove("t0")
    assert not service.batchers
    assert not service.drain(0.05)
    go.set()
    assert service.drain(PATIENCE)
    assert future.result(0).versions
    hold.remove()


def test_a_kind_of_input_that_is_none_is_refused_with_those_there_are(service):
    for kind in ("words", "video"):
        with pytest.raises(UnknownNameError, match="image, audio, text"):
            service.ask(kind, [["a"]])


@pytest.mark.parametrize("named", [None, ["t0", "mood", "words"]])
def test_of_a_question_of_which_one_part_is_refused_nothing_is_asked(tmp_path, named):
    tasks = save_all_kinds(tmp_path)
    service = Service({n: tasks[n] for n in ("t0", "mood", "words")})
    images, texts, words = (service.entries[n].batcher for n in ("t0", "mood", "words"))
    inside, go = Event(), Event()

    def wait(*_):
        inside.set()
        assert go.wait(PATIENCE)

    hooks = [b.live.predictor.host.model.register_forward_pre_hook(wait) for b in (images, texts)]
    first = service.ask("image", [picture(99)])
    assert inside.wait(PATIENCE)
    # The last of the three that are asked.
    words.waiting = 0
    questions = {"image": [picture(1), picture(2)], "text": ["a good film"]}
    with pytest.raises(BusyError, match="too much to do"):
        service.ask_several(questions, named)
    with pytest.raises(UnknownNameError, match="dogs"):
        service.ask_several(questions, ["t0", "dogs"])
    with pytest.raises(DataError, match="of the kind text"):
        service.ask_several(questions, ["t0"])
    go.set()
    first[0][0].result(PATIENCE)
    assert service.drain(PATIENCE)
    for hook in hooks:
        hook.remove()
    assert (images.counts.forwards, images.counts.inputs, images.counts.expired) == (1, 1, 2)
    assert words.counts.forwards == words.counts.inputs == 0
    # A text that was being read by then was answered for nobody, else it was dropped.
    assert texts.counts.inputs + texts.counts.expired == 1


def test_task_number_100_costs_no_forward_no_digest_and_no_other_opening(tasks, monkeypatch):
    service = Service({f"task{n}": tasks[f"t{n % 2}"] for n in range(99)})
    service.warm_up()
    batcher, done = service.batchers[0], []

    def counted(where, name, what):
        real = getattr(where, name)

        def called(*args, **how):
            done.append(what)
            return real(*args, **how)

        monkeypatch.setattr(where, name, called)

    host = batcher.live.predictor.host
    before = batcher.counts.forwards
    hook = host.model.register_forward_pre_hook(lambda *_: done.append("forward"))
    for name in ("identity", "digest", "fingerprint"):
        counted(type(host), name, name)
    counted(module.Predictor, "load", "opened")
    counted(multi_task, "Bank", "bank")
    service.put("last", tasks["t2"])
    assert len(service.entries) == 100
    # One of its own: those that are there are not built again.
    assert done == ["bank"]
    assert batcher.counts.forwards == before
    hook.remove()
    monkeypatch.undo()
    (reply,) = ask(service, picture(), ["last", "task98"])
    assert same(
        reply.answer, Predictor.load({"last": tasks["t2"], "task98": tasks["t0"]})(picture())[0]
    )
    service.drain(PATIENCE)


def test_what_a_server_asks_itself_to_be_ready_is_within_its_limits_and_fails_for_nobody(
    tasks, tmp_path
):
    """Whatever is asked there is nobody's question, and a server that is not ready is asked nothing."""
    backbone = load_backbone("restuning-tiny")
    bad = save_overflowing(backbone, tmp_path / "bad.task")
    service = Service({"t0": tasks["t0"], "bad": bad}, limits=Limits(pixels=100, waiting=1))
    service.warm_up()
    (batcher,) = service.batchers
    assert batcher.counts.forwards == 1
    gone = Service({"t0": tasks["t0"]})
    gone.batchers[0].drain(0)
    # As where its last task is taken out between two looks.
    gone.warm_up()
    service.drain(PATIENCE)


def test_a_service_that_cannot_be_opened_leaves_no_thread_and_no_backbone(tasks, tmp_path):
    bad = prepared_otherwise(tasks["t1"], tmp_path / "bad.task")
    (bad / "weights.safetensors").write_bytes(b"none")
    before = set(threading.enumerate())
    with pytest.raises(FormatError):
        Service({"t0": tasks["t0"], "bad": bad})
    left = [t for t in threading.enumerate() if t not in before]
    for thread in left:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in left)


def test_a_request_of_more_than_may_ever_wait_is_too_large_and_not_asked_to_come_again(tasks):
    service = Service({"t0": tasks["t0"]}, limits=Limits(waiting=2))
    with pytest.raises(TooLargeError, match="2 are taken"):
        service.ask("image", [picture(n) for n in range(3)])
    assert service.drain(10)

"""A bank answers as each of its tasks alone."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awake import tiny_vit
from restuning import Bank, Host, MultiTask, RestuningError, Tuned, methods

ALONE_TOLERANCE = 1e-5
"""Stacked products round in another order than single ones in fp32."""

FORMS = [
    ("res-tuning-bypass", {"rank": 5}, 10),
    ("res-tuning-bypass", {"rank": 8}, 3),
    ("res-tuning-bypass", {"rank": 10, "scale": "channel"}, 10),
    ("res-tuning-bypass", {"rank": 10, "scale": "scalar"}, 4),
    ("res-tuning-bypass", {"rank": 3, "scale": "gate"}, 4),
    ("res-tuning-bypass", {"rank": 4, "pool": "mean"}, 6),
    ("bypass-horizontal", {}, 10),
    ("bypass-vertical", {}, 7),
    ("linear", {}, 4),
]


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module")
def tasks(host):
    torch.manual_seed(0)
    made = {}
    for number, (method, options, classes) in enumerate(FORMS):
        task = methods.build(method, host, num_classes=classes, **options)
        with torch.no_grad():
            for p in task.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        made[f"task {number}"] = task.eval()
    return made


@pytest.fixture(scope="module")
def bank(tasks):
    return Bank(tasks)


def test_every_task_of_a_bank_answers_as_it_does_alone(host, tasks, bank):
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        answers = bank(host.features(x, keep=bank.keep))
        assert list(answers) == list(tasks)
        for name, task in tasks.items():
            alone = Tuned(host, task)(x)
            torch.testing.assert_close(
                answers[name], alone, atol=ALONE_TOLERANCE, rtol=ALONE_TOLERANCE
            )


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.integers(0, len(FORMS) - 1), min_size=1, unique=True))
def test_any_mix_of_tasks_gets_the_answers_of_the_whole(host, bank, names):
    wanted = [f"task {n}" for n in names]
    features = host.features(torch.ones(2, 3, 32, 32), keep=bank.keep)
    some, whole = bank(features, tasks=wanted), bank(features)
    assert list(some) == wanted
    for name in wanted:
        torch.testing.assert_close(
            some[name], whole[name], atol=ALONE_TOLERANCE, rtol=ALONE_TOLERANCE
        )


def test_tasks_of_near_ranks_share_a_stack(host):
    tasks = {
        str(rank): methods.build("res-tuning-bypass", host, num_classes=rank, rank=rank)
        for rank in (5, 6, 7, 8)
    }
    assert len(Bank(tasks).groups) == 1


def test_one_forward_answers_all_bypass_tasks_and_one_more_each_inline_task(host, tasks):
    inline = {n: methods.build("res-tuning", host, num_classes=2) for n in ("in 1", "in 2")}
    together = MultiTask(host, {**tasks, **inline})
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    handle = host.model.register_forward_hook(count)
    try:
        answers = together(torch.randn(2, 3, 32, 32))
    finally:
        handle.remove()
    assert forwards == together.forwards == 1 + len(inline)
    assert set(answers) == set(tasks) | set(inline)


def test_tasks_are_added_exchanged_and_removed_without_building_the_others_again(host, tasks):
    names = list(tasks)
    first = MultiTask(host, {n: tasks[n] for n in names[:5]})
    inline = methods.build("bitfit", host, num_classes=2)
    other = copy.deepcopy(tasks[names[1]])
    torch.nn.init.normal_(other.head.weight)
    wanted = {n: tasks[n] for n in names if n != names[0]} | {names[1]: other, "inline": inline}
    second = MultiTask(host, wanted, earlier=first)
    assert second.banks[0] is first.banks[0]
    assert len(second.banks) == second.forwards == 2
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        answers, afresh, before = second(x), MultiTask(host, wanted)(x), first(x)
        some = second.read(host.features(x, keep=second.keep), names[1:3])
    assert list(answers) == list(wanted)
    for name, logits in answers.items():
        assert torch.allclose(logits, afresh[name], atol=ALONE_TOLERANCE)
    assert list(some) == names[1:3]
    assert torch.allclose(some[names[2]], answers[names[2]], atol=ALONE_TOLERANCE)
    # What answers already goes on as it was.
    assert list(before) == names[:5]
    assert not torch.allclose(before[names[1]], answers[names[1]], atol=ALONE_TOLERANCE)


def test_a_task_that_was_exchanged_stays_so_whatever_is_exchanged_after_it(host, tasks):
    """Banks of before still hold the old one of its name."""
    names = list(tasks)[:3]
    together = MultiTask(host, now := {n: tasks[n] for n in names})
    for name in (names[0], "new", names[1]):
        other = copy.deepcopy(tasks[names[2]])
        torch.nn.init.normal_(other.head.weight)
        now = {**now, name: other}
        together = MultiTask(host, now, earlier=together)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        answers, afresh = together(x), MultiTask(host, now)(x)
    for name, logits in answers.items():
        assert torch.allclose(logits, afresh[name], atol=ALONE_TOLERANCE)


def test_a_bank_is_immutable_and_keeps_its_copies(host, tasks, bank):
    x = torch.randn(2, 3, 32, 32)
    features = host.features(x, keep=bank.keep)
    before = bank(features)
    changed = copy.deepcopy(tasks)
    own = Bank(changed)
    for task in changed.values():
        for p in task.parameters():
            p.data.zero_()
    for name, value in own(features).items():
        assert torch.equal(value, before[name])
    assert not any(p.requires_grad for p in bank.parameters())


def test_a_bank_survives_pickle(host, bank):
    features = host.features(torch.randn(2, 3, 32, 32), keep=bank.keep)
    again = pickle.loads(pickle.dumps(bank))  # noqa: S301
    for name, value in again(features).items():
        assert torch.equal(value, bank(features)[name])


@pytest.mark.slow
@pytest.mark.compile
def test_a_bank_compiles_to_one_graph(host, bank):
    features = host.features(torch.randn(2, 3, 32, 32), keep=bank.keep)
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
    for name, value in compiled(dict(features), host.readout).items():
        torch.testing.assert_close(
            value, bank(features)[name], atol=ALONE_TOLERANCE, rtol=ALONE_TOLERANCE
        )


@pytest.mark.parametrize("wrong", ["inline", "no pool", "empty", "unknown", "taps"])
def test_what_a_bank_cannot_run_is_refused_in_words(host, tasks, bank, wrong):
    features = host.features(torch.zeros(1, 3, 32, 32), keep=bank.keep)
    with pytest.raises(RestuningError) as error:
        if wrong == "inline":
            Bank({"a": methods.build("res-tuning", host, num_classes=2)})
        elif wrong == "no pool":
            task = methods.build("res-tuning-bypass", host, num_classes=2)
            task.pool = None
            Bank({"a": task})
        elif wrong == "empty":
            Bank({})
        elif wrong == "unknown":
            bank(features, tasks=["nobody"])
        else:
            bank({"block.0": features["block.0"]}, host.readout)
    assert error.value.fix

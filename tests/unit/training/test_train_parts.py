import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from restuning._errors import FormatError, TrainingError
from restuning.bypass import Bypass
from restuning.training import (
    FitSettings,
    PeakMemory,
    build_optimiser,
    draw_curves,
    learning_rate,
    memory,
    parameter_groups,
)
from restuning.training import checkpoint as checkpoints
from restuning.training.log import LogFile
from restuning.training.optimiser import Ema
from restuning.training.randomness import Order, Steps

MEGABYTES = 64


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 500),
    peak=st.floats(1e-6, 10.0),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_the_rate_stays_within_zero_and_its_peak(total, warmup, peak, data):
    warmup = min(warmup, total)
    rates = [learning_rate(s, total=total, warmup=warmup, peak=peak) for s in range(total)]
    assert all(0 < r <= peak for r in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < total:
        assert rates[warmup] == peak
    step = data.draw(st.integers(0, total - 1))
    assert learning_rate(step, total=total, warmup=warmup, peak=peak) == rates[step]


def test_only_matrices_decay_whatever_the_names_are():
    module = nn.Module()
    module.gate_matrix = nn.Parameter(torch.ones(2, 2))
    module.weight = nn.Parameter(torch.ones(2))
    module.scalar = nn.Parameter(torch.tensor(1.0))
    module.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    decayed, spared = parameter_groups(module.parameters(), 0.1)
    assert [p is module.gate_matrix for p in decayed["params"]] == [True]
    assert [p.ndim for p in spared["params"]] == [1, 0]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_lambdas_are_a_group_of_their_own_only_where_their_rate_differs():
    bypass = Bypass(("block.0", "block.1"), (4, 4), [None], [None])
    task = nn.ModuleDict({"bypass": bypass, "head": nn.Linear(4, 2)})
    common = build_optimiser(task, lr=1.0, weight_decay=0.1).param_groups
    assert [g["rate"] for g in common] == [1.0, 1.0]
    apart = build_optimiser(task, lr=1.0, weight_decay=0.1, lambda_rate=5.0).param_groups
    assert [g["rate"] for g in apart] == [1.0, 1.0, 5.0]
    assert [p is bypass.gate for p in apart[2]["params"]] == [True]
    assert apart[2]["weight_decay"] == 0.0


def test_a_run_from_before_the_lambdas_rate_is_the_same_run():
    assert "lambda_rate" not in FitSettings().identity()
    assert FitSettings(lambda_rate=3.0).identity()["lambda_rate"] == 3.0


@given(
    count=st.integers(1, 40),
    size=st.integers(1, 9),
    world=st.integers(1, 4),
    start=st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_shares_make_up_the_batches_and_the_batches_the_epoch(count, size, world, start):
    order = Order(count, size, epochs=2, seed=1)
    start = min(start, order.total)
    rest = list(range(start, order.total))
    streams = [list(Steps(order, start, rank, world)) for rank in range(world)]
    assert all(len(s) == len(rest) for s in streams)
    for step, shares in zip(rest, zip(*streams, strict=True), strict=True):
        epoch = step // order.per_epoch
        counted = [
            x for r, share in enumerate(shares) if order.counts(step, r, world) for x in share
        ]
        assert counted == [(epoch, i) for i in order.batch(step)]
        assert len(counted) == order.size(step)
        assert all(shares)
    whole = [i for s in range(order.per_epoch) for i in order.batch(s)]
    assert sorted(whole) == list(range(count))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", -1),
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", "fast"),
        ("weight_decay", -1),
        ("warmup_epochs", 21),
        ("label_smoothing", 1.0),
        ("precision", "fp8"),
        ("accumulate", 0),
        ("clip", 0.0),
        ("drop_path", -0.1),
        ("ema", 1.0),
        ("seed", -1),
        ("workers", -1),
        ("checkpoint_every", 0),
        ("track", ("nothing",)),
        ("early_stopping", 0),
        ("keep_best", 1),
        ("monitor", "accuracy"),
    ],
)
def test_a_setting_out_of_its_range_is_named(name, value):
    with pytest.raises(TrainingError, match=f"(?s){name}.*do:"):
        FitSettings(**{name: value})


def test_warm_up_is_a_tenth_unless_told():
    assert FitSettings(epochs=100).warmup == 10
    assert FitSettings(epochs=100, warmup_epochs=0).warmup == 0


def snapshot(step):
    tensors = {"task.w": torch.full((4, 3), float(step)), "task.n": torch.tensor(step)}
    return checkpoints.Snapshot(tensors, {"step": step, "loss": 0.1 + 0.2})


def test_a_checkpoint_comes_back_as_it_was_and_two_are_kept(tmp_path):
    for step in range(4):
        checkpoints.write(tmp_path, snapshot(step))
    found = checkpoints.read_newest(tmp_path)
    assert found.state == {"step": 3, "loss": 0.1 + 0.2}
    assert torch.equal(found.part("task")["w"], torch.full((4, 3), 3.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step-{s:09d}.safetensors" for s in (2, 3)
    ]


def damage_at(data, place):
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: b"",
        lambda d: d[:5],
        lambda d: d[: len(d) // 2],
        lambda d: d[:-1],
        lambda d: b"\x00" * len(d),
        lambda d: b"\xff" * len(d),
        lambda d: damage_at(d, 0),
        lambda d: damage_at(d, 60),
        lambda d: damage_at(d, len(d) - 3),
        lambda d: d + b"more",
        lambda d: b"\x80\x04pickle",
        lambda d: b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(tmp_path, damage):
    for step in (1, 2):
        path = checkpoints.write(tmp_path, snapshot(step))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match="step-000000002"):
        checkpoints.read(path)
    with pytest.warns(RuntimeWarning, match="damaged"):
        found = checkpoints.read_newest(tmp_path)
    assert found.state["step"] == 1


@given(place=st.integers(0, 10_000), value=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_no_changed_byte_of_a_checkpoint_goes_unseen(tmp_path_factory, place, value):
    folder = tmp_path_factory.mktemp("one")
    path = checkpoints.write(folder, snapshot(1))
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= value
    path.write_bytes(bytes(data))
    try:
        found = checkpoints.read(path)
    except FormatError:
        return
    # A byte may change without meaning (padding of the header); the contents may not.
    assert found.state == snapshot(1).state
    assert all(torch.equal(found.tensors[n], t) for n, t in snapshot(1).tensors.items())


def test_no_whole_checkpoint_at_all_means_from_the_start(tmp_path):
    (tmp_path / "step-000000001.safetensors").write_bytes(b"broken")
    with pytest.warns(RuntimeWarning):
        assert checkpoints.read_newest(tmp_path) is None
    assert checkpoints.read_newest(tmp_path / "nowhere") is None


def test_a_resumed_log_is_cut_back_and_goes_on(tmp_path):
    journal = LogFile(tmp_path / "log.jsonl")
    journal.write({"step": 1})
    position = journal.position()
    journal.write({"step": 2})
    journal.close()
    again = LogFile(tmp_path / "log.jsonl", position)
    again.write({"step": 3})
    again.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'


def test_the_mean_follows_the_weights_and_lends_itself():
    module = nn.Linear(2, 2)
    mean = Ema(module, 0.5)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1.0
    mean.update(module, 1000)
    with mean.swap_in(module):
        assert torch.allclose(module.weight, start + 0.5)
    assert torch.allclose(module.weight, start + 1.0)


def test_peak_memory_sees_what_was_allocated_and_freed():
    # Freed small blocks stay in the process unless given back, and then hide what comes after.
    small = [torch.ones(1000) for _ in range(MEGABYTES * 300)]
    del small
    peak = PeakMemory("cpu")
    block = torch.ones(MEGABYTES * 2**18)
    del block
    found = peak.read()
    if peak.how != "VmHWM":
        pytest.skip(f"{peak.how} cannot be reset")
    assert found > MEGABYTES * 2**20 * 0.9


@pytest.mark.parametrize("has_resource", [True, False])
def test_peak_memory_works_without_proc(monkeypatch, tmp_path, has_resource):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    if not has_resource or memory.resource is None:
        monkeypatch.setattr(memory, "resource", None)
    peak = PeakMemory("cpu")
    if memory.resource is None:
        assert (peak.how, peak.read()) == ("unavailable", None)
    else:
        assert peak.how == "ru_maxrss"
        assert peak.read() >= 0


@pytest.mark.parametrize("val", [0.5, None])
@pytest.mark.parametrize("epochs", [0, 1, 60])
def test_curves_can_be_drawn_of_any_history(tmp_path, epochs, val):
    history = [
        {"epoch": e + 1, "loss": 1 / (e + 1), "accuracy": 0.5, "val_loss": val, "val_accuracy": val}
        for e in range(epochs)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw_curves(history, tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")

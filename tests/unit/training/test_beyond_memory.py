"""A store that is larger than memory: the order of its rows, what is held of them, and what comes out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_script import Noise, host_and_key
from torch.nn.utils import parameters_to_vector

from restuning import FitSettings, methods
from restuning._errors import RestuningWarning, TrainingError
from restuning.data.data import collate_batch
from restuning.features import Cached, Store, Stored, StoredFeatures, StoreOptions, build, view_of
from restuning.runtime import free_memory
from restuning.training import fit
from restuning.training.fit import fit_until
from restuning.training.parallel_runs import train_in_parallel
from restuning.training.randomness import Order, Portions, Steps

ROWS = 60


@given(
    count=st.integers(1, 90),
    size=st.integers(1, 9),
    portions=st.builds(Portions, st.integers(1, 6), st.integers(1, 9), st.integers(1, 4)),
    world=st.integers(1, 4),
    balanced=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_portions_take_every_row_once_and_are_a_function_of_the_step(
    count, size, portions, world, balanced
):
    groups = [torch.arange(count)[: count // 3], torch.arange(count)[count // 3 :]]

    def make():
        return Order(count, size, 2, 1, groups if balanced else None, portions)

    order, step = make(), 0
    assert order.portions is not None
    while step < order.total:
        end = order.end_of_portion(step)
        assert 0 < end - step <= -(-order.per_epoch // order.portions.number)
        streams = [list(Steps(order, step, rank, world, end)) for rank in range(world)]
        # All make as many steps, and what each reads before them is what they ask for.
        assert {len(s) for s in streams} == {end - step}
        for rank, stream in enumerate(streams):
            held = order.rest_of_portion(step, rank, world).tolist()
            assert held == sorted({i for batch in stream for _, i in batch})
        step = end
    for epoch in range(2):
        steps = range(epoch * order.per_epoch, (epoch + 1) * order.per_epoch)
        seen = [i for s in steps for i in order.batch(s)]
        if balanced and count >= 3:
            halves = [sum(i < count // 3 for i in seen), sum(i >= count // 3 for i in seen)]
            assert abs(halves[0] - halves[1]) <= 1
        elif not balanced:
            assert sorted(seen) == list(range(count))
        # Whoever begins in the middle takes what is left.
        assert make().batch(steps[-1]) == order.batch(steps[-1])


@given(count=st.integers(20, 200), world=st.integers(2, 4), number=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_each_process_has_rows_of_its_own_side_by_side_and_as_many(count, world, number):
    size = 3 * world
    order = Order(count, size, 1, 0, portions=Portions(number, 2, world))
    step = 0
    while step < order.total:
        end = order.end_of_portion(step)
        counted = [
            sorted(
                i
                for s in range(step, end)
                for i in order.share(s, rank, world) * order.counts(s, rank, world)
            )
            for rank in range(world)
        ]
        own = [rows for rows in counted if rows]
        assert all(a[-1] < b[0] for a, b in zip(own[:-1], own[1:], strict=True))
        assert max(map(len, counted)) <= 3 * (end - step)
        step = end


def test_a_portion_is_a_fair_sample_of_rows_that_are_sorted_by_class():
    classes = torch.arange(4000) // 400
    order = Order(4000, 50, 3, 0, portions=Portions(4, 10))
    step = 0
    while step < order.total:
        end = order.end_of_portion(step)
        rows = order.rest_of_portion(step, 0, 1)
        # 40 pieces of each class are dealt to four portions; a portion is cut at a step, two pieces beyond at most.
        assert (torch.bincount(classes[rows], minlength=10) - 100).abs().max() <= 30
        step = end
    assert order.batch(0) != order.batch(order.per_epoch)


def built(folder, dtype="fp32", count=ROWS, views=("plain", "flip")):
    host, key = host_and_key(dtype, splits={"train": count, "val": 6}, views=views)
    train = {("train", k): view_of(v, Noise(count), None) for k, v in enumerate(views)}
    return host, build(
        host, key, folder, {**train, ("val", 0): Noise(6)}, batch_size=4, progress=False
    )


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_rows_that_are_held_are_those_of_the_store_in_any_view(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("restuning.features.extract.SHARD_ROWS", 8)
    monkeypatch.setattr("restuning.features.cached.READ", 1)
    _, store = built(tmp_path, dtype, 30)
    plain = StoredFeatures(store, ["train", "val"], 2)
    portioned = StoredFeatures(Store(store.path), ["train", "val"], 2, at_once=9)
    portioned.store.read_from_files()
    portioned.hold(torch.tensor([17, 3, 30, 9, 35]))
    assert portioned.held == 2 * 3 + 2, "train in both views, val in one"
    for asked, views in [([9, 30, 3, 3], [1, 1, 0, 1]), ([3, 17], [0, 0]), ([4, 17], [0, 1])]:
        (one, labels), (other, theirs) = (d.gather(asked, views) for d in (plain, portioned))
        assert torch.equal(labels, theirs)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not portioned.store._in_memory, "what is not held is read from files"
    assert torch.equal(portioned[-1][0]["block.1"], plain[len(plain) - 1][0]["block.1"])
    portioned.hold(torch.tensor([], dtype=torch.long))
    assert portioned.held == 0


class Counted(StoredFeatures):
    """Notes how many rows are held, and how often."""

    most, times = 0, 0

    def hold(self, indices):
        super().hold(indices)
        self.most, self.times = max(self.most, self.held), self.times + 1


AT_ONCE = 15
"""Of 60 rows."""
SETTINGS = FitSettings(epochs=2, batch_size=4, checkpoint_every=1, lr=1e-2)


def portioned(store, cls=Counted):
    store = Store(store.path)
    store.read_from_files()
    return cls(store, ["train"], 2, at_once=AT_ONCE)


def train(host, data, out, *, method="res-tuning-bypass", run=fit, how=SETTINGS, **more):
    torch.manual_seed(0)
    tuned = Cached(host, methods.build(method, host, num_classes=5), data.store)
    val = StoredFeatures(data.store, ["val"])
    result = run(tuned, data, val, settings=how, out=out, collate=collate_batch, **more)
    return parameters_to_vector(tuned.task.parameters()), result


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_in_a_portion_ends_with_the_same_bits_whatever_memory_it_has_then(
    tmp_path, monkeypatch
):
    host, store = built(tmp_path / "store")
    whole, data = portioned(store), portioned(store)
    weights, result = train(host, whole, tmp_path / "whole", progress=False)
    assert whole.most == 2 * 12, "60 rows in 15 steps of 4: five portions of 3 steps, in two views"
    assert whole.held == 0
    assert whole.times == 2 * 5 + 1
    gather, asked = data.gather, []

    def kill(*batch):
        asked.append(batch)
        if len(asked) == 20:
            raise Killed
        return gather(*batch)

    monkeypatch.setattr(data, "gather", kill)
    with pytest.raises(Killed):
        train(host, data, tmp_path / "killed", progress=False)
    # As on a machine where all of it is at hand: the order is the one that was begun.
    again, theirs = train(
        host, StoredFeatures(store, ["train"], 2), tmp_path / "killed", progress=False
    )
    assert torch.equal(weights, again)
    assert [e["loss"] for e in result.history] == [e["loss"] for e in theirs.history]


def test_a_run_that_was_begun_with_all_at_hand_goes_on_so_and_says_it(tmp_path):
    host, store = built(tmp_path / "store")
    at_hand = StoredFeatures(store, ["train"], 2)
    weights, _ = train(host, at_hand, tmp_path / "whole", progress=False)
    train(host, at_hand, tmp_path / "run", run=fit_until_first)
    with pytest.warns(
        RestuningWarning, match=r"(?s)order of then.*all rows in any order; .* 5 portions"
    ):
        again, _ = train(host, portioned(store), tmp_path / "run", progress=False)
    assert torch.equal(weights, again)


def fit_until_first(tuned, train, val, **how):
    calls = []

    def stop(history):
        calls.append(history)
        raise Killed

    with pytest.raises(Killed):
        fit_until(stop, tuned, train, val, **how)


def test_runs_in_parallel_go_through_the_same_portions(tmp_path):
    host, store = built(tmp_path / "store")
    how = FitSettings(epochs=2, batch_size=4, lr=1e-2)
    alone, _ = train(
        host, portioned(store), tmp_path / "run", method="linear", how=how, progress=False
    )
    torch.manual_seed(0)
    task, data = methods.build("linear", host, num_classes=5), portioned(store)
    (run,) = train_in_parallel(host, [task], [how], data, None)
    torch.testing.assert_close(parameters_to_vector(run.task.parameters()), alone)
    assert 0 < data.most <= 2 * AT_ONCE


def test_a_store_that_fits_is_read_as_ever_and_a_larger_one_in_portions_with_a_line(
    tmp_path, monkeypatch
):
    _, store = built(tmp_path)
    row, lines = 4 * store.values_per_row, []
    size = row * (2 * ROWS + 6)
    for limit, rows in [(size, None), (size - 1, (size - 1) // (2 * row))]:
        stored = Stored.opened(store, StoreOptions(memory=limit, views=2, log=lines.append))
        assert stored.at_once == rows
        assert store.holds_splits == (rows is None)
    (line,) = lines
    assert "larger than memory" in line
    assert f"portions of {rows:,} rows" in line
    # Of what is free a half, as a run needs room for other things.
    monkeypatch.setattr("restuning.features.stored.read_free_memory", lambda: size // 2)
    assert Stored.opened(store, StoreOptions(views=2)).at_once == size // 4 // (2 * row)


def test_memory_for_less_than_a_step_is_refused_with_what_a_step_takes(tmp_path):
    host, store = built(tmp_path / "store")
    data = StoredFeatures(store, ["train"], 2, at_once=3)
    with pytest.raises(TrainingError, match=r"(?s)3 rows of 1,536 bytes, 4 in a step.*6,144 bytes"):
        train(host, data, tmp_path / "run", progress=False)


def test_free_memory_is_the_least_of_the_machine_and_its_groups(tmp_path, monkeypatch):
    meminfo, own, groups = tmp_path / "meminfo", tmp_path / "own", tmp_path / "groups"
    monkeypatch.setattr(free_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(free_memory, "OWN_GROUP", own)
    monkeypatch.setattr(free_memory, "GROUPS", groups)
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_memory.read_free_memory() == 5000 * 1024
    own.write_text("4:cpu,memory:/job\n1:name=systemd:/job\n0::/a/b\n")
    for folder, names in {
        "a": ("memory.max", "memory.current", "inactive_file"),
        "a/b": ("memory.max", "memory.current", "inactive_file"),
        "memory/job": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }.items():
        limit, usage, stat = names
        group = groups / folder
        group.mkdir(parents=True)
        (group / limit).write_text("max\n" if folder == "a/b" else "4000000\n")
        (group / usage).write_text("3000000\n")
        (group / "memory.stat").write_text(f"anon 1\n{stat} 500000\n")
        # The first is that of the second around the process's own, which has no limit.
        assert free_memory.read_free_memory() == 1_500_000
    (groups / "memory/job/memory.limit_in_bytes").write_text("2000000\n")
    assert free_memory.read_free_memory() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (groups / "memory/job/memory.limit_in_bytes").write_text("4000000\n")
    assert free_memory.read_free_memory() == 750_000

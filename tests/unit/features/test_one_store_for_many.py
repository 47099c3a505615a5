"""One store serves whatever a command trains: each thing once, and of it each method reads no more than it needs."""

from dataclasses import replace

import pytest
import torch
from store_script import Noise, host_and_key

import restuning
from restuning import Needs, load_data, methods
from restuning._errors import StoreError
from restuning.bypass import Ridge
from restuning.features import (
    DTYPES,
    Cached,
    Store,
    StoredFeatures,
    StoreOptions,
    build,
    build_store,
    open_or_build,
    store_once,
    stores,
)
from restuning.features.stored import read_by_methods
from restuning.sites import covers_tokens, is_stream, unite_needs

SPLITS = {"train": 12, "val": 4}
TOKENS = ("cls", "last", "all")


def parts():
    return {("train", 0): Noise(12), ("val", 0): Noise(4)}


@pytest.fixture(scope="module")
def tiny():
    backbone = restuning.load_backbone("restuning-tiny")
    return backbone, backbone.host()


@pytest.fixture(scope="module")
def few(tiny):
    digits = load_data("digits", tiny[0])
    cut = {
        name: torch.utils.data.Subset(getattr(digits, name), range(24)) for name in ("train", "val")
    }
    return replace(digits, **cut, test=torch.utils.data.Subset(digits.test, range(24)))


@pytest.fixture
def forwards(tiny):
    """Inputs that went through the backbone, but for single ones and those that time is told by."""
    counted = []
    handle = tiny[1].model.register_forward_pre_hook(
        lambda module, args: counted.append(len(args[0])) if len(args[0]) > 4 else None
    )
    yield counted
    handle.remove()


def needs_of(host, *names):
    return [methods.build(n, host, num_classes=10).needs(host.readout_rule) for n in names]


DETACHED = ("linear", "ridge", "res-tuning-bypass", "mixing-bypass")


@pytest.mark.parametrize("tokens", TOKENS)
def test_what_one_task_reads_is_stored_as_it_is(tokens):
    taps = ("block.0", "block.1", "block.2")
    assert unite_needs([Needs(("last",), tokens)], taps) == Needs(("block.2",), tokens)
    same = Needs(taps, tokens)
    assert unite_needs([same, same], taps) == same


def test_what_is_stored_together_covers_each_and_does_not_depend_on_the_order(tiny):
    host = tiny[1]
    several = needs_of(host, *DETACHED)
    several += [Needs(("last", "block.1"), "last"), Needs(("feature/mean",), "cls")]
    united = unite_needs(several, host.sites.taps)
    assert united == unite_needs(several[::-1], host.sites.taps)
    assert len(set(united.taps)) == len(united.taps)
    held = set(united.taps)
    for needs in several:
        for name in needs.taps:
            tap = host.sites.taps[-1] if name == "last" else name
            whole = tap in held and (
                not is_stream(tap) or covers_tokens(united.tokens, needs.tokens)
            )
            assert whole or f"{tap}/{needs.tokens}" in held


def test_a_token_of_a_tap_that_is_kept_whole_is_not_kept_again():
    taps = ("block.0", "block.1", "block.2")
    one, every = Needs(taps, "cls"), Needs(("block.1",), "all")
    united = unite_needs([one, every], taps)
    assert united == Needs(("block.1", "block.0/cls", "block.2/cls"), "all")
    # Of patches that are pooled the last token is no longer there.
    pooled = replace(every, pool_patches=2)
    assert "block.1/last" in unite_needs([Needs(taps, "last"), pooled], taps).taps
    assert "block.1/cls" not in unite_needs([one, pooled], taps).taps
    assert unite_needs([pooled, every], taps).pool_patches == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_narrow_store_gives_the_values_of_the_whole_one(tmp_path, monkeypatch, dtype, in_memory):
    monkeypatch.setattr("restuning.features.extract.SHARD_ROWS", 4)
    host, key = host_and_key(dtype, splits=SPLITS, tokens="all")
    store = build(host, key, tmp_path, parts(), batch_size=4, progress=False)
    if not in_memory:
        monkeypatch.setattr("restuning.features.store.IN_MEMORY", 0)
    at, last = [7, 0, 11], host.sites.taps[-1]
    every = Store(store.path).taps(Store(store.path).rows("train", 0, at))
    for token, place in (("cls", slice(None, 1)), ("last", slice(-1, None)), ("all", slice(None))):
        narrow = store.only(Needs(("block.1", "last"), token), last)
        # As a worker process gets it.
        rebuild, arguments = narrow.__reduce__()
        narrow = rebuild(*arguments)
        taps = narrow.taps(narrow.rows("train", 0, at))
        assert list(taps) == ["block.1", last]
        assert all(torch.equal(tap, every[name][:, place]) for name, tap in taps.items())
        assert narrow.values_per_row == sum(tap[0].numel() for tap in taps.values())
        assert narrow.form == token
    with pytest.raises(StoreError, match="lacks what the task needs"):
        store.only(Needs(("block.1/patches",), "cls"), last)


def test_each_method_is_given_the_values_of_a_store_of_its_own(tiny, few, tmp_path, forwards):
    backbone, host = tiny
    together, apart = (StoreOptions(tmp_path / n, progress=False) for n in ("together", "apart"))
    store_once(host, backbone, few, needs_of(host, *DETACHED), together)
    assert sum(forwards) == 72
    assert len(stores(together.folder)) == 1
    for needs in needs_of(host, *DETACHED):
        forwards.clear()
        shared = open_or_build(host, backbone, few, needs, together)
        assert not forwards
        alone = open_or_build(host, backbone, few, needs, apart)
        assert shared.store.values_per_row == alone.store.values_per_row
        rows = [
            each.data(few, final=True).train.gather([40, 3], [0, 0])[0] for each in (shared, alone)
        ]
        assert rows[0].keys() == rows[1].keys()
        assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])
        contents = [each.data(few, final=False).train.contents for each in (shared, alone)]
        assert contents[0] == contents[1], "a run goes on from one or the other"


def test_what_one_method_reads_and_no_more_is_stored_for_it(tiny, few, tmp_path):
    backbone, host = tiny
    (needs,) = needs_of(host, "linear")
    stored = open_or_build(host, backbone, few, needs, StoreOptions(tmp_path, progress=False))
    assert stored.store.key.bytes_per_row == 4 * host.dim


def test_a_store_of_one_token_of_every_tap_still_serves_what_reads_less(
    tiny, few, tmp_path, forwards
):
    backbone, host = tiny
    options = StoreOptions(tmp_path, progress=False)
    old = open_or_build(host, backbone, few, Needs(host.sites.taps, "cls"), options).store
    forwards.clear()
    for needs in needs_of(host, "linear", "res-tuning-bypass"):
        assert open_or_build(host, backbone, few, needs, options).store.path == old.path
    store_once(host, backbone, few, needs_of(host, *DETACHED), options)
    assert sum(forwards) == 72, "one more pass for all that it lacks"
    assert len(stores(tmp_path)) == 2


def test_the_largest_are_left_out_where_all_together_would_be_too_large(
    tiny, few, tmp_path, forwards
):
    backbone, host = tiny
    small, big = needs_of(host, *DETACHED[:3]), needs_of(host, "mixing-bypass")
    limit = 72 * 4 * 20_000
    options = StoreOptions(tmp_path, progress=False, limit=limit)
    store_once(host, backbone, few, [*big, *small], options)
    (path,) = stores(tmp_path)
    assert Store(path).key.tokens == "cls"
    assert all(Store(path).key.find(needs, host.sites.taps[-1]) for needs in small)
    assert sum(forwards) == 72
    assert open_or_build(host, backbone, few, big[0], replace(options, limit=0)) is None


def test_splits_that_a_store_holds_are_not_computed_again(tiny, few, tmp_path, forwards):
    backbone, host = tiny
    options = StoreOptions(tmp_path / "stores", progress=False, views=2)
    store_once(host, backbone, few.with_splits(test=None), needs_of(host, *DETACHED), options)
    assert sum(forwards) == 24 * 3
    lines = []
    for needs in needs_of(host, "ridge", "mixing-bypass"):
        forwards.clear()
        told = replace(options, log=lines.append)
        stored = open_or_build(host, backbone, few, needs, told)
        assert sum(forwards) == 24, "the test split"
        assert "train and val from a store that is there" in lines[-1]
        anew = open_or_build(host, backbone, few, needs, replace(options, root=tmp_path / "anew"))
        assert stored.store.key == anew.store.key
        for split in ("train", "val", "test"):
            assert stored.store.digest(split) == anew.store.digest(split)
            assert torch.equal(stored.store.labels(split), anew.store.labels(split))


@pytest.mark.parametrize(
    ("tokens", "left_out"), [("auto", {"mixing-bypass", "ensemble"}), ("all", set())]
)
def test_a_cache_serves_what_it_says(tiny, few, tmp_path, forwards, monkeypatch, tokens, left_out):
    monkeypatch.setattr("restuning.features.named.load_data", lambda *given: few)
    lines = []
    options = StoreOptions(tmp_path, progress=False, log=lines.append)
    build_store("digits", tiny[0], tokens=tokens, options=options)
    assert sum(forwards) == 72
    forwards.clear()
    (said,) = (line for line in lines if line.startswith("serves"))
    read = read_by_methods(tiny[1], "cls")
    assert set(said.removeprefix("serves").replace(",", "").split()) == read.keys() - left_out
    for name in read.keys() - left_out:
        assert open_or_build(tiny[1], tiny[0], few, read[name], options).seconds == 0
    assert not forwards


@pytest.mark.parametrize("side", [1, 2])
def test_a_last_token_is_read_as_such_beside_other_tokens_of_its_tap(tiny, few, tmp_path, side):
    backbone, host = tiny
    tasks = {
        pool: methods.build("linear", host, num_classes=10, pool=pool).eval()
        for pool in ("cls", "last")
    }
    every = Needs((host.sites.taps[-1],), "all", side)
    needs = [*(task.needs(host.readout_rule) for task in tasks.values()), every]
    images = torch.stack([few.test[i][0] for i in range(6)])
    for several in (needs[:2], needs):
        options = StoreOptions(tmp_path / str(len(several)), progress=False)
        store_once(host, backbone, few, several, options)
        store = Store(stores(options.root)[0])
        rows, _ = StoredFeatures(store, ["test"]).gather(range(6), [0] * 6)
        for task in tasks.values():
            live = restuning.Tuned(host, task)(images)
            stored = Cached(host, task, store)(**rows)
            torch.testing.assert_close(stored, live, atol=1e-5, rtol=1e-4)


def test_a_task_on_a_whole_store_takes_of_it_what_it_reads(tiny, few, tmp_path):
    backbone, host = tiny
    options = StoreOptions(tmp_path, progress=False)
    store_once(host, backbone, few, needs_of(host, *DETACHED), options)
    store = Store(stores(tmp_path)[0])
    rows, _ = StoredFeatures(store, ["test"]).gather(range(6), [0] * 6)
    images = torch.stack([few.test[i][0] for i in range(6)])
    for name in ("linear", "res-tuning-bypass", "mixing-bypass", "ensemble"):
        torch.manual_seed(0)
        task = methods.build(name, host, num_classes=10).eval()
        for closed in (part for part in task.modules() if isinstance(part, Ridge)):
            # Of about the size that a solution has.
            torch.nn.init.normal_(closed.weight, std=0.1)
        live = restuning.Tuned(host, task)(images)
        torch.testing.assert_close(Cached(host, task, store)(**rows), live, atol=1e-5, rtol=1e-4)

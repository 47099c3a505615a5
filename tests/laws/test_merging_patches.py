"""Patches read as means of squares: the same live and from any store, and how much that takes away."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store_script import Noise, host_and_key

from awake import tiny_vit, wake
from restuning import Bank, Host, Needs, Tuned, load, methods, save
from restuning._errors import StoreError, TunerShapeError
from restuning.bypass import from_spec
from restuning.bypass.pooling import measure_pooling_loss, pool_patches
from restuning.features import Cached, StoreKey, build
from zoo.table import ZOO

SAME_TOLERANCE = 1e-5
"""Features of one image in batches of different sizes."""
SIDE = 2
SMALL = {"width": 8, "heads": 2, "rank": 8, "pool_patches": SIDE}
IMAGES = torch.stack([Noise()[i][0] for i in range(6)])


def task_of(host, **options):
    torch.manual_seed(1)
    task = methods.build("mixing-bypass", host, num_classes=3, **{**SMALL, **options})
    wake(task)
    return task.eval()


def by_hand(stream, side):
    """One square after the other."""
    first = next(n for n in range(9) if math.isqrt(stream.shape[1] - n) ** 2 == stream.shape[1] - n)
    wide = math.isqrt(stream.shape[1] - first)
    grid = stream[:, first:].unflatten(1, (wide, wide))
    squares = [
        grid[:, row : row + side, column : column + side].flatten(1, 2).mean(1)
        for row in range(0, wide, side)
        for column in range(0, wide, side)
    ]
    return torch.cat([stream[:, :first], torch.stack(squares, 1)], 1)


streams = st.tuples(st.integers(2, 7), st.integers(0, 1), st.integers(0, 10**6)).map(
    lambda drawn: torch.randn(
        2, drawn[0] ** 2 + drawn[1], 3, generator=torch.Generator().manual_seed(drawn[2])
    )
)


@given(streams, st.integers(1, 8))
def test_a_merged_patch_is_the_mean_of_its_square(stream, side):
    torch.testing.assert_close(pool_patches(stream, side), by_hand(stream, side))


@given(streams, st.integers(1, 8))
def test_what_is_merged_away_is_a_share_of_the_variance(stream, side):
    taken, there = measure_pooling_loss(stream, side)
    assert -1e-9 <= taken <= there * (1 + 1e-9)
    assert side > 1 or taken == 0
    wide = math.isqrt(stream.shape[1])
    assert side < wide or taken == pytest.approx(there)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("stores"), {}
    for side in (1, SIDE):
        host, key = host_and_key(splits={"train": 6}, tokens="all", pool_patches=side)
        made[side] = build(host, key, root, {("train", 0): Noise(6)}, batch_size=4, progress=False)
    return host, made


def test_a_merged_bypass_answers_alike_live_and_from_a_merged_or_a_whole_store(stored):
    host, stores = stored
    task = task_of(host)
    live = Tuned(host, task)(IMAGES)
    for store in stores.values():
        found = Cached(host, task, store)(**store.taps(store.rows("train", 0, list(range(6)))))
        torch.testing.assert_close(found, live, atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE)


def test_a_merged_store_is_smaller_and_says_what_it_lost(stored):
    host, stores = stored
    whole, small = stores[1], stores[SIDE]
    *inner, last = [tap.name for tap in small.key.taps]
    assert small.key.bytes_per_row < whole.key.bytes_per_row
    assert small.manifest["merged away"].keys() == set(inner)
    assert "merged away" not in whole.manifest
    taps = host.features(IMAGES)
    for name, share in small.manifest["merged away"].items():
        taken, there = measure_pooling_loss(taps[name], SIDE)
        assert share == pytest.approx(taken / there, rel=1e-4)
        assert 0 < share < 1
    shapes = {tap.name: tap.shape for tap in small.key.taps}
    assert shapes[last] == {tap.name: tap.shape for tap in whole.key.taps}[last], "the readout's"


def test_a_merged_store_serves_who_reads_class_tokens_and_refuses_who_reads_all(stored):
    host, stores = stored
    small = stores[SIDE]
    taps = small.taps(small.rows("train", 0, list(range(6))))
    torch.manual_seed(0)
    paper = methods.build("res-tuning-bypass", host, num_classes=3).eval()
    torch.testing.assert_close(
        Cached(host, paper, small)(**taps),
        Tuned(host, paper)(IMAGES),
        atol=SAME_TOLERANCE,
        rtol=SAME_TOLERANCE,
    )
    for other in (1, 3):
        with pytest.raises(StoreError, match="tokens all/2; wanted .* tokens all"):
            Cached(host, task_of(host, pool_patches=other), small)


def test_the_key_of_whole_patches_is_the_one_it_always_was(stored):
    key = stored[1][1].key
    assert "merge" not in key.to_dict()
    for store in stored[1].values():
        assert StoreKey.from_dict(json.loads(json.dumps(store.key.to_dict()))) == store.key
    for spoilt in (0, -1, "2", None, 1.5):
        with pytest.raises(ValueError, match="merge"):
            StoreKey.from_dict({**key.to_dict(), "merge": spoilt})


def test_a_bank_runs_merged_and_whole_side_networks_from_one_forward(stored):
    host, _ = stored
    tasks = {"merged": task_of(host), "whole": task_of(host, pool_patches=1)}
    bank = Bank(tasks)
    found = bank(host.features(IMAGES, keep=bank.keep), host.readout)
    for name, task in tasks.items():
        torch.testing.assert_close(
            found[name], Tuned(host, task)(IMAGES), atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE
        )


def test_the_word_of_earlier_results_and_files_is_read(stored):
    host, _ = stored
    task = methods.build("mixing-bypass", host, num_classes=3, width=8, heads=2, rank=8, merge=SIDE)
    spec = task.side.spec()
    assert spec.pop("pool_patches") == SIDE
    assert from_spec({**spec, "merge": SIDE}).pool_patches == SIDE
    assert from_spec(spec).pool_patches == 1


def test_it_is_saved_and_loaded_and_has_no_parameter_more(stored, tmp_path):
    host, _ = stored
    task = task_of(host)
    save(task, host, tmp_path / "x.task")
    again = load(tmp_path / "x.task", host)
    assert again.side.pool_patches == SIDE
    assert torch.equal(Tuned(host, again)(IMAGES), Tuned(host, task)(IMAGES))
    assert task.trainable_parameters() == task_of(host, pool_patches=1).trainable_parameters()


@pytest.mark.parametrize("options", [{"pool_patches": 0}, {"pool": "all"}])
def test_what_cannot_be_merged_is_refused_in_words(options):
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(TunerShapeError, match="patches cannot be pooled here"):
        task_of(host, **options)


def test_texts_have_no_patches_to_merge():
    model, args, kwargs = ZOO["hf bert"][0]()
    with pytest.raises(TunerShapeError, match="no grid of patches"):
        task_of(Host(wake(model), *args, **kwargs))


def test_maps_have_no_stream_to_merge():
    with pytest.raises(TunerShapeError, match="streams of tokens"):
        pool_patches(torch.zeros(2, 4, 4, 3), SIDE)


def test_needs_are_written_as_users_write_them():
    assert [Needs((), "all", n).form for n in (1, 2)] == ["all", "all/2"]

"""Parts of taps: what tokens say together, told alike whatever stands beside them, live and from a store."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import restuning
from restuning import Needs, Tuned, load_data, methods
from restuning._errors import NoSitesError, StoreError, TunerShapeError
from restuning.bypass import Ridge
from restuning.features import Cached, StoreOptions, build_store, open_or_build
from restuning.host.parts import compute_part
from restuning.sites import FEATURE, count_taps, unite_needs
from restuning.training.run import open_inputs, with_pool

TOLERANCE = 1e-6
"""Sums in another order."""
STORED_TOLERANCE = 1e-4
"""A store is computed in other batches, whose texts are padded to other lengths."""


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def close(one, other, tolerance=TOLERANCE):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_tokens_are_told_by_mean_largest_and_deviation():
    stream = drawn(2, 5, 8) * 3 + 1
    normed = F.layer_norm(stream, (8,))
    plain = torch.stack([normed.mean(1), normed.amax(1), normed.std(1, correction=0)], 1)
    close(compute_part("tokens", stream), plain)


def test_patches_are_without_what_stands_before_the_grid():
    stream = drawn(2, 18, 8)
    close(compute_part("patches", stream), compute_part("tokens", stream[:, 2:]))


def test_places_are_means_over_rows_then_over_columns():
    stream = drawn(2, 50, 8)
    grid = F.layer_norm(stream[:, 1:], (8,)).unflatten(1, (7, 7))
    close(compute_part("places", stream), torch.cat([grid.mean(1), grid.mean(2)], 1))


def test_places_of_a_map_are_tokens():
    maps = drawn(2, 4, 6, 8)
    close(compute_part("tokens", maps), compute_part("tokens", maps.flatten(1, 2)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_whatever_is_left_there(side):
    stream = drawn(2, 5, 8)
    rubbish = torch.full((2, 3, 8), torch.nan)
    real, none = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    order = (rubbish, stream) if side == "left" else (stream, rubbish)
    masks = (none, real) if side == "left" else (real, none)
    padded = compute_part("tokens", torch.cat(order, 1), torch.cat(masks, 1))
    close(padded, compute_part("tokens", stream))


def test_a_row_of_nothing_but_padding_has_numbers():
    mask = torch.zeros(1, 4, dtype=torch.bool)
    assert compute_part("tokens", drawn(1, 4, 8), mask).isfinite().all()


def test_half_precision_is_summed_in_single():
    stream = drawn(2, 17, 8).bfloat16()
    told = compute_part("patches", stream)
    assert told.dtype == torch.bfloat16
    assert torch.equal(told, compute_part("patches", stream.float()).bfloat16())


@pytest.mark.parametrize(("part", "place"), [("cls", 0), ("last", 2)])
def test_one_token_is_a_part_as_it_is(part, place):
    stream, mask = drawn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0]] * 2, dtype=torch.bool)
    assert torch.equal(compute_part(part, stream, mask)[:, 0], stream[:, place])
    whole = compute_part(part, stream)
    assert torch.equal(whole[:, 0], stream[:, 0 if part == "cls" else -1])


def test_where_there_is_no_grid_patches_are_refused():
    with pytest.raises(TunerShapeError, match="no square grid"):
        compute_part("patches", drawn(1, 24, 8))


def test_a_part_that_is_none_is_refused_by_name():
    backbone = restuning.load_backbone("restuning-tiny")
    host = backbone.host()
    for name in ("block.1/colours", "block.99/tokens", "feature/", "feature/best"):
        with pytest.raises(NoSitesError, match="no such tap") as error:
            host.features(*backbone.example, keep=Needs((name,)))
        assert error.value.where == name


def test_taps_and_parts_are_counted_apart():
    assert count_taps(["block.0", "block.1"]) == "2 taps"
    assert count_taps(["block.0", "block.0/tokens", "feature/mean"]) == "1 tap and 2 parts of them"
    assert count_taps(["feature/mean"]) == "1 part of taps"
    assert count_taps(["block.1", "block.0/cls"]) == "1 tap and one token of 1 more"
    assert (
        count_taps(["block.1", "block.0/cls", "block.0/tokens"])
        == "1 tap, one token of 1 more and 1 part of them"
    )


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A small BERT, and texts of one to nine words."""
    from zoo import folders

    root = tmp_path_factory.mktemp("texts")
    backbone = restuning.load_backbone(f"hf:{folders.bert(root / 'bert')}")
    lines = [
        f"{' '.join(['good', 'bad', 'a', 'film'][i % 4 :] * (1 + i % 3))},{i % 2}"
        for i in range(40)
    ]
    (root / "reviews.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return backbone, load_data(root / "reviews.csv", backbone), root


@pytest.mark.parametrize("name", ["linear", "ridge", "ensemble"])
def test_texts_of_any_length_are_stored_and_answered_as_live(reviews, name):
    backbone, data, root = reviews
    host = backbone.host()
    task = methods.build(name, host, num_classes=2, pool="mean").eval()
    with torch.no_grad():
        for closed in (part for part in task.modules() if isinstance(part, Ridge)):
            # Of about the size that a solution has.
            closed.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    needs = task.needs(host.readout_rule)
    stored = open_or_build(host, backbone, data, needs, StoreOptions(root / "stores"))
    assert stored is not None
    taps, _ = stored.data(data, final=False).test.gather(
        range(len(data.test)), [0] * len(data.test)
    )
    inputs, _ = data.collate([data.test[i] for i in range(len(data.test))])
    live = Tuned(host, task)(**inputs)
    close(Cached(host, task, stored.store)(**taps), live, STORED_TOLERANCE)


def test_a_network_on_parts_of_texts_answers_alike_whatever_else_is_kept(reviews):
    """Its frozen feature is the mean over tokens, also where another network reads one of them."""
    backbone, data, _ = reviews
    host = backbone.host()
    task = methods.build("ensemble", host, num_classes=2, pool="mean").eval()
    with torch.no_grad():
        for tensor in (*task.parameters(), *task.buffers()):
            tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    inputs, _ = data.collate([data.test[i] for i in range(len(data.test))])
    needs = task.needs(host.readout_rule)
    every = Needs(host.sites.taps, "all")
    alone, beside = (
        host.features(keep=each, **inputs)
        for each in (needs, unite_needs([needs, every], host.sites.taps))
    )
    close(task(alone, host.readout), task(beside, host.readout), STORED_TOLERANCE)
    network = task.side.parts[1]
    linear = host.features(keep=Needs((f"{FEATURE}/mean",), "cls"), **inputs)
    frozen = network._read_frozen(alone, host.readout, "mean")
    close(frozen, linear[f"{FEATURE}/mean"][:, 0], STORED_TOLERANCE)


def test_a_cache_of_texts_serves_what_reads_parts_of_them(reviews, tmp_path):
    backbone, data, root = reviews
    lines = []
    options = StoreOptions(tmp_path, progress=False, log=lines.append)
    build_store(root / "reviews.csv", backbone, options=options)
    (said,) = (line for line in lines if line.startswith("serves"))
    assert {"linear", "ridge", "ensemble"} <= set(said.replace(",", "").split())
    host = backbone.host()
    inputs = with_pool(open_inputs(host, backbone, data, options), {})
    for name in ("linear", "ridge", "ensemble"):
        task = methods.build(name, host, num_classes=2, **inputs.options)
        assert inputs.open_store(task).seconds == 0
    with pytest.raises(StoreError, match="texts have different lengths"):
        build_store(root / "reviews.csv", backbone, tokens="all", options=options)

"""A store holds what the backbone computed, or refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_script import Noise, host_and_key
from torch.utils.data import DataLoader

import restuning
from awake import tiny_vit
from restuning import FitSettings, Host, RestuningError, Tuned, methods
from restuning._errors import BackboneChangedError, StoreError
from restuning.data import load_data
from restuning.data.data import collate_batch
from restuning.features import (
    DTYPES,
    Cached,
    DataKey,
    Store,
    StoredFeatures,
    StoreKey,
    Tap,
    build,
    place,
    store_key,
    view_names,
    view_of,
)
from restuning.features.codec import decode, encode, error_report
from restuning.features.extract import cut, shard_rows
from restuning.features.stored import StoreOptions, open_or_build
from restuning.training import evaluate, fit

LIVE_TOLERANCE = 1e-6
"""A forward of another batch rounds in another place; the losses of a step differ by no more."""
STORED_TOLERANCE = 1e-5
"""Features of one image in batches of different sizes, fp32."""
SPLITS = {"train": 20, "val": 6, "test": 7}


def parts(count=20, views=("plain",)):
    train = {("train", i): view_of(v, Noise(count), Noise(count)) for i, v in enumerate(views)}
    return {**train, ("val", 0): Noise(6), ("test", 0): Noise(7)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_a_store_gives_back_what_the_backbone_computed(tmp_path, dtype, tokens):
    host, key = host_and_key(dtype, splits=SPLITS, tokens=tokens)
    store = build(host, key, tmp_path, parts(), batch_size=8, progress=False)
    assert store.verify() == len(list(store.path.glob("*.npy")))
    indices = [3, 0, 19, 7]
    taps = store.taps(store.rows("train", 0, indices))
    live = host.features(torch.stack([Noise()[i][0] for i in indices]))
    for name, value in taps.items():
        wanted = live[name][:, :1] if tokens == "cls" else live[name]
        allowed = store.manifest["error"][name]["largest"] + STORED_TOLERANCE
        assert (value - wanted).abs().max() <= allowed
    assert store.labels("val").tolist() == [Noise()[i][1] for i in range(6)]
    assert (dtype == "fp32") == (max(e["largest"] for e in store.manifest["error"].values()) == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_read_from_files_equal_rows_held_in_memory(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("restuning.features.extract.SHARD_ROWS", 8)
    host, key = host_and_key(dtype, splits=SPLITS)
    store = build(host, key, tmp_path, parts(), batch_size=4, progress=False)
    assert len([s for s in store.manifest["shards"] if s["split"] == "train"]) > 1
    indices = [19, 2, 2, 11, 8, 7]
    held = store.rows("train", 0, indices)
    monkeypatch.setattr("restuning.features.store.IN_MEMORY", 0)
    assert torch.equal(Store(store.path).rows("train", 0, indices), held)
    with pytest.raises(IndexError):
        Store(store.path).rows("train", 0, [20])


def test_the_key_changes_with_everything_that_the_values_depend_on():
    _, key = host_and_key()
    host, other_weights = host_and_key(seed=1)
    data = DataKey("noise", "0", {"train": 96}, {"size": 32})
    needs, x = restuning.Needs(host.sites.taps, "cls"), (torch.zeros(1, 3, 32, 32),)
    keys = [
        key,
        other_weights,
        host_and_key("fp16")[1],
        host_and_key(views=view_names(2))[1],
        host_and_key(tokens="all")[1],
        host_and_key(splits={"train": 95})[1],
        host_and_key(precision="bf16")[1],
    ]
    keys += [
        store_key(host, needs, x, replace(data, **change), backbone="tiny")
        for change in ({"preprocessing": {"size": 64}}, {"name": "other"}, {"identity": "1"})
    ]
    keys.append(
        store_key(host, restuning.Needs(host.sites.taps[1:], "cls"), x, data, backbone="tiny")
    )
    with torch.no_grad():
        list(host.model.parameters())[4].view(-1)[0].add_(1)
    with pytest.raises(BackboneChangedError, match=r"blocks\.0\.norm1\.weight"):
        store_key(host, needs, x, data, backbone="tiny")
    changed = restuning.Host(host.model, *x)
    keys.append(store_key(changed, needs, x, data, backbone="tiny"))
    assert len({k.digest for k in keys}) == len(keys)


@pytest.mark.parametrize("harm", ["truncated", "missing", "bit", "manifest", "key", "schema"])
def test_a_damaged_store_is_refused_in_words(tmp_path, harm):
    host, key = host_and_key(splits=SPLITS)
    store = build(host, key, tmp_path, parts(), batch_size=8, progress=False)
    shard = store.path / store.manifest["shards"][0]["files"][0]["file"]
    manifest = store.path / "manifest.json"
    if harm == "truncated":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif harm == "missing":
        shard.unlink()
    elif harm == "bit":
        raw = bytearray(shard.read_bytes())
        raw[-5] ^= 1
        shard.write_bytes(raw)
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:100])
    else:
        values = json.loads(manifest.read_text())
        values["key"]["schema" if harm == "schema" else "tokens"] = (
            99 if harm == "schema" else "all"
        )
        manifest.write_text(json.dumps(values))
    with pytest.raises(StoreError) as error:
        Store(store.path).verify()
    assert error.value.where
    assert error.value.fix


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_manifest_of_any_shape_gives_another_error_than_ours(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("malformed")
    leaf = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    anything = st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["key", "digest", "shards", "labels", "schema", "taps", "files"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
    (root / "key.json").write_text("{}")
    (root / "manifest.json").write_text(json.dumps(data.draw(anything)))
    with pytest.raises(StoreError):
        Store(root)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_stored_forms_lose_no_more_than_they_say(rows, width, size, seed):
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * size
    for dtype in DTYPES:
        encoded, scales = encode(values, dtype)
        report = error_report(values, dtype, {"x": slice(0, width)})["x"]
        loss = (decode(encoded, dtype, scales) - values).abs().max()
        assert loss <= report["largest"] + 1e-6 * size
        assert (dtype != "fp32") or loss == 0


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "fp32"), (1e6, "fp16")])
def test_values_that_cannot_be_stored_are_refused_in_words(value, dtype):
    with pytest.raises(StoreError) as error:
        encode(torch.full((2, 3), value), dtype)
    assert error.value.fix


def test_features_computed_in_bf16_are_those_of_autocast_under_a_key_of_their_own(tmp_path):
    host, key = host_and_key(splits=SPLITS, precision="bf16")
    store = build(host, key, tmp_path, parts(), batch_size=20, progress=False)
    images = torch.stack([Noise(20)[i][0] for i in range(20)])
    with torch.autocast("cpu", torch.bfloat16):
        live = host.features(images, keep=restuning.Needs(host.sites.taps, "cls"))
    whole = host.features(images, keep=restuning.Needs(host.sites.taps, "cls"))
    for name, value in store.taps(store.rows("train", 0, range(20))).items():
        assert torch.equal(value, live[name].float())
    assert not torch.equal(value, whole[name])
    assert Store(store.path).key == key
    with pytest.raises(StoreError):
        host_and_key(precision="fp8")


@pytest.mark.parametrize("augment", [pytest.param("none", marks=pytest.mark.slow), "flip"])
@pytest.mark.parametrize(
    "method", ["res-tuning-bypass", pytest.param("linear", marks=pytest.mark.slow)]
)
def test_cached_training_has_the_losses_of_live_training(tmp_path, augment, method):
    torch.manual_seed(0)
    backbone = restuning.load_backbone("restuning-tiny")
    host = Host(backbone.model, *backbone.example)
    data = load_data("digits", backbone, augment=augment)
    plain = load_data("digits", backbone)
    for each in (data, plain):
        each.train = torch.utils.data.Subset(each.train, range(70))
        each.val = torch.utils.data.Subset(each.val, range(20))
        each.test = torch.utils.data.Subset(each.test, range(20))
    task = methods.build(method, host, num_classes=10)
    kept = open_or_build(
        host,
        backbone,
        plain,
        task.needs(host.readout_rule),
        StoreOptions(tmp_path / "stores", views=1 + (augment == "flip")),
    )
    fed = kept.data(plain, final=False)
    run = FitSettings(epochs=3, batch_size=16, lr=5e-3)
    losses, tested = [], []
    for name in ("live", "cached"):
        torch.manual_seed(1)
        task = methods.build(method, host, num_classes=10)
        tuned = Tuned(host, task) if name == "live" else Cached(host, task, kept.store)
        source = data if name == "live" else fed
        fit(
            tuned,
            source.train,
            source.val,
            settings=run,
            out=tmp_path / name,
            collate=source.collate,
        )
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
        tested.append(evaluate(tuned, source.test, collate=source.collate)["accuracy"])
    assert losses[0] == pytest.approx(losses[1], abs=LIVE_TOLERANCE)
    assert tested[0] == tested[1]


def test_no_backbone_forward_is_made_while_training_from_a_store(tmp_path):
    host, key = host_and_key(splits=SPLITS)
    store = build(host, key, tmp_path, parts(), batch_size=8, progress=False)
    tuned = Cached(host, methods.build("res-tuning-bypass", host, num_classes=5), store)

    def refuse(*_):
        raise AssertionError("the backbone ran")

    handle = host.model.register_forward_pre_hook(refuse)
    try:
        fit(
            tuned,
            StoredFeatures(store, ["train"]),
            StoredFeatures(store, ["val"]),
            settings=FitSettings(epochs=2, batch_size=8),
            out=tmp_path / "run",
            collate=collate_batch,
        )
    finally:
        handle.remove()


def test_a_store_of_all_tokens_serves_a_task_that_reads_one(tmp_path):
    host, key = host_and_key(splits=SPLITS, tokens="all")
    store = build(host, key, tmp_path, parts(), batch_size=8, progress=False)
    task = methods.build("res-tuning-bypass", host, num_classes=5).eval()
    batch, _ = next(iter(DataLoader(StoredFeatures(store, ["test"]), 7, collate_fn=collate_batch)))
    live = Tuned(host, task)(torch.stack([Noise()[i][0] for i in range(7)]))
    torch.testing.assert_close(
        Cached(host, task, store)(**batch), live, atol=STORED_TOLERANCE, rtol=STORED_TOLERANCE
    )


def test_a_store_of_another_backbone_or_without_what_is_needed_is_refused(tmp_path):
    host, key = host_and_key(splits=SPLITS)
    store = build(host, key, tmp_path, parts(), batch_size=8, progress=False)
    other = Host(tiny_vit(seed=3), torch.zeros(1, 3, 32, 32))
    for owner, task in (
        (other, methods.build("linear", other, num_classes=5)),
        (host, methods.build("res-tuning-bypass", host, num_classes=5, pool="mean")),
    ):
        with pytest.raises(StoreError) as error:
            Cached(owner, task, store)
        assert error.value.fix
    with pytest.raises(StoreError):
        StoredFeatures(store, ["nowhere"])
    with pytest.raises(StoreError):
        StoredFeatures(store, ["train"], views=2)


def test_a_folder_without_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    host, key = host_and_key(splits=SPLITS)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match="no room"):
        build(host, key, tmp_path, parts(), progress=False)
    assert not list(place(tmp_path, key).glob("*.npy"))


def test_views_are_mirror_images_and_fixed_draws(tmp_path):
    views = view_names(3)

    class Random(Noise):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.rand(()), label

    flipped, drawn = view_of("flip", Noise(), None), view_of("crop.2", Noise(), Random())
    assert torch.equal(flipped[3][0], Noise()[3][0].flip(-1))
    assert torch.equal(drawn[3][0], drawn[3][0])
    assert not torch.equal(drawn[3][0], Noise()[3][0])
    host, key = host_and_key(splits=SPLITS, views=views)
    several = {("train", i): view_of(v, Noise(20), Random(20)) for i, v in enumerate(views)}
    store = build(host, key, tmp_path, {**parts(), **several}, batch_size=8, progress=False)
    rows = [store.rows("train", view, [0]) for view in range(3)]
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    seen = StoredFeatures(store, ["train"], views=3)
    torch.manual_seed(0)
    assert len({seen.view() for _ in range(50)}) == 3


@pytest.mark.parametrize("count", [0, 17])
def test_a_number_of_views_out_of_range_is_refused(count):
    with pytest.raises(RestuningError):
        view_names(count)


def test_raw_files_are_plain_numpy(tmp_path):
    host, key = host_and_key(splits=SPLITS)
    store = build(host, key, tmp_path, parts(), batch_size=8, progress=False)
    file = store.path / store.manifest["shards"][0]["files"][0]["file"]
    assert np.load(file, allow_pickle=False).shape == (20, key.values_per_row)


@pytest.mark.parametrize(
    ("change", "digest"),
    [
        ({}, "e097d67743d6179c1d8cf920aa56750fdd68c32cced3db4af89b6d181bc8ef1e"),
        (
            {"pool_patches": 2, "tokens": "all", "precision": "bf16", "dtype": "int8"},
            "2dc5c9576eb4a93bdfd1bd4f1c060a3b05dd2ffc8db45efb03c5ac7928901c11",
        ),
    ],
)
def test_a_key_has_the_digest_that_the_first_release_gave_it(change, digest):
    """Another digest would build every store that users have once more."""
    values = {
        "backbone": {"name": "tiny", "class": "VisionTransformer", "layers": 3, "widths": [48]}
        | {"sites": "0f", "weights": "1a", "all weights": "2b"},
        "taps": (Tap("block.0", (1, 48)), Tap("block.3", (4, 4, 48))),
        "tokens": "cls",
        "dtype": "fp32",
        "preprocessing": {"size": [32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
        | {"interpolation": "bicubic", "crop": 1.0},
        "data": {"name": "noise", "identity": "00"},
        "views": ("plain", "flip"),
        "splits": {"train": 20, "val": 6},
    }
    key = StoreKey(**{**values, **change})
    assert key.digest == digest
    assert StoreKey.from_dict(json.loads(json.dumps(key.to_dict()))) == StoreKey.from_dict(
        key.to_dict()
    )


@pytest.mark.parametrize(("rows", "files"), [(512_000, 1000), (10_000_000, 782)])
def test_a_store_of_many_files_has_larger_ones(rows, files):
    # Class tokens of ViT-B in fp16.
    tap = Tap("all", (9984,))
    key = StoreKey({}, (tap,), "cls", "fp16", {}, {}, ("plain",), {"train": rows})
    assert len(cut(key, shard_rows(key, 32))) == files
    assert len(cut(key, shard_rows(key, 32, 10**9))) < files

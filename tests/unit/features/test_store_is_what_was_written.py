"""A store that is not what was written is refused in words, whoever changed it and however well."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from store_script import Noise, host_and_key
from torch.utils.data import DataLoader

from commands import restuning
from restuning import _files
from restuning._errors import FormatError, RestuningError, StoreError
from restuning._files import Claim, seal
from restuning.data.data import Data, collate_batch
from restuning.features import Store, Stored, StoredFeatures, build, find_store, place, remove

SPLITS = {"train": 12, "val": 4}
PARTS = {("train", 0): Noise(12), ("val", 0): Noise(4)}
posix = pytest.mark.skipif(os.name != "posix", reason="files of POSIX")


def built(root, dtype="fp32"):
    host, key = host_and_key(dtype, splits=SPLITS)
    return build(host, key, root, PARTS, batch_size=4, progress=False).path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {dtype: built(tmp_path_factory.mktemp(dtype), dtype) for dtype in ("fp32", "int8")}


@pytest.fixture
def store(whole, tmp_path):
    return shutil.copytree(whole["fp32"], tmp_path / whole["fp32"].name)


def rewrite(store, change):
    """Change the manifest as somebody does who knows how it is sealed."""
    file = store / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    raw = json.dumps(content["key"], sort_keys=True).encode()
    content["digest"] = hashlib.sha256(raw).hexdigest()
    file.write_text(json.dumps(seal(content)))


def replace_file(store, name, array):
    """Put another array in place of a file, and its size and sha256 into the manifest."""
    with (store / name).open("wb") as stream:
        array(stream) if callable(array) else np.save(stream, array)
    raw = (store / name).read_bytes()

    def change(content):
        shards = [f for shard in content["shards"] for f in shard["files"]]
        for entry in [*shards, *content["labels"].values()]:
            if entry["file"] == name:
                entry |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    rewrite(store, change)


def refused(store, read=lambda opened: None):
    with pytest.raises(StoreError) as told:
        read(Store(store))
    assert told.value.where
    assert told.value.fix
    return told.value


def read_all(opened):
    for split, count in SPLITS.items():
        opened.rows(split, 0, range(count))
        opened.labels(split)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_one_bit_of_any_file_is_noticed_when_the_store_is_opened(whole, tmp_path, dtype):
    for number, file in enumerate(sorted(whole[dtype].glob("*.npy"))):
        copy = shutil.copytree(whole[dtype], tmp_path / str(number))
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 4
        (copy / file.name).write_bytes(raw)
        assert "sha256" in refused(copy).found
        assert file.name in refused(copy).where
        # Who only lists stores reads none of them.
        Store(copy, verify=False)


def test_what_was_verified_is_not_read_again_until_it_changes(store, monkeypatch):
    monkeypatch.setattr(_files, "SETTLED", 0)
    read = []
    real = _files.sha256_of_file
    monkeypatch.setattr(_files, "sha256_of_file", lambda file: read.append(file.name) or real(file))
    Store(store)
    assert sorted(read) == sorted(file.name for file in store.glob("*.npy"))
    read.clear()
    Store(store)
    assert read == []
    (file,) = store.glob("val.0.*.npy")
    before = file.stat()
    file.write_bytes(file.read_bytes())
    # A copy that keeps its time has a change time of its own.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    Store(store)
    assert read == [file.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("in_memory", [True, False])
def test_values_that_are_not_finite_are_refused(store, monkeypatch, value, in_memory):
    if not in_memory:
        monkeypatch.setattr("restuning.features.store.IN_MEMORY", 0)
    (file,) = store.glob("train.0.*.npy")
    rows = np.load(file)
    rows[3, 7] = value
    replace_file(store, file.name, rows)
    assert "NaN" in refused(store, read_all).found


def test_large_finite_values_whose_sum_is_not_finite_are_values(store):
    (file,) = store.glob("train.0.*.npy")
    rows = np.full_like(np.load(file), 3e38)
    replace_file(store, file.name, rows)
    assert Store(store).rows("train", 0, [1]).max() == torch.tensor(3e38)


def test_scales_that_are_not_finite_are_refused(whole, tmp_path):
    store = shutil.copytree(whole["int8"], tmp_path / "store")
    (file,) = store.glob("train.0.*.scales.npy")
    scales = np.load(file)
    scales[:] = np.nan
    replace_file(store, file.name, scales)
    assert "NaN" in refused(store, read_all).found


def pickled(stream):
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)


ARRAYS = {
    "float64": lambda rows: rows.astype(np.float64),
    "float16": lambda rows: rows.astype(np.float16),
    "other byte order": lambda rows: rows.astype(">f4"),
    "transposed": lambda rows: rows.T,
    "Fortran order": np.asfortranarray,
    "one row less": lambda rows: rows[:-1],
    "one column less": lambda rows: rows[:, :-1],
    "three dimensions": lambda rows: rows[None],
    "pickled objects": lambda rows: pickled,
    "several arrays": lambda rows: lambda stream: np.savez(stream, a=rows),
    "no header": lambda rows: lambda stream: stream.write(rows.tobytes() + bytes(128)),
    "a size that is not there": lambda rows: (
        lambda stream: np.lib.format.write_array_header_1_0(
            stream, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**20)}
        )
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("pattern", ["train.0.*.npy", "val.labels.npy"])
def test_an_array_of_another_type_or_shape_is_refused_though_its_sha256_fits(store, pattern, kind):
    (file,) = store.glob(pattern)
    rows = np.load(file)
    if rows.ndim == 1 and kind in ("transposed", "Fortran order", "one column less"):
        return
    replace_file(store, file.name, ARRAYS[kind](rows))
    refused(store, read_all)


def test_labels_that_no_class_has_are_refused(store):
    splits = [range(12), range(4), None]
    data = Data("noise", *splits, ["a", "b", "c", "d", "e"], "image", collate_batch)
    Stored(Store(store), 0.0, 1).data(data, final=False)
    with pytest.raises(StoreError, match="class 4, and noise has 4"):
        Stored(Store(store), 0.0, 1).data(replace(data, labels=["a", "b", "c", "d"]), final=True)
    labels = np.load(store / "val.labels.npy")
    for wrong in (-1, 2**40):
        labels[2] = wrong
        replace_file(store, "val.labels.npy", labels)
        with pytest.raises(StoreError, match=str(wrong)):
            Stored(Store(store), 0.0, 1).data(data, final=False)


def of_key(**values):
    return lambda content: content["key"].update(values)


def of_shard(number, **values):
    return lambda content: content["shards"][number].update(values)


MANIFESTS = {
    "another number of rows": of_key(splits={"train": 11, "val": 4}),
    "a split more": of_key(splits={**SPLITS, "test": 3}),
    "a view more": of_key(views=["plain", "flip"]),
    "taps of petabytes": of_key(taps=[["block.0", [2**40, 2**20]]]),
    "a tap without values": of_key(taps=[["block.0", [0, 48]]]),
    "a negative size": of_key(taps=[["block.0", [-1, 48]]]),
    "a size as a text": of_key(taps=[["block.0", ["1", 48]]]),
    "a split that is a path": of_key(splits={"../train": 12, "val": 4}),
    "a type that is none": of_key(dtype="fp8"),
    "a field more": of_key(more=1),
    "another schema": of_key(schema=2),
    "no schema": lambda content: content["key"].pop("schema"),
    "no key": lambda content: content.update(key=[]),
    "rows that are there twice": of_shard(0, start=1),
    "no rows": of_shard(0, stop=0),
    "rows as texts": of_shard(0, stop="12"),
    "a shard less": lambda content: content["shards"].pop(),
    "a shard twice": lambda content: content["shards"].append(content["shards"][0]),
    "a view that is not there": of_shard(0, view=1),
    "a file of another folder": lambda content: content["shards"][0]["files"][0].update(
        file="../../secrets.npy"
    ),
    "the file of another shard": lambda content: content["shards"][0]["files"][0].update(
        content["shards"][1]["files"][0]
    ),
    "labels of another split": lambda content: content["labels"].update(
        val=content["labels"]["train"]
    ),
    "no labels": lambda content: content["labels"].pop("val"),
    "bytes beyond all files": lambda content: content["shards"][0]["files"][0].update(bytes=2**60),
    "no digest": lambda content: content["shards"][0]["files"][0].pop("sha256"),
    "errors of other taps": lambda content: content.update(error={}),
    "an error as a text": lambda content: content["error"]["block.0"].update(largest="0"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_agrees_with_itself_and_not_with_a_store_is_refused(store, kind):
    rewrite(store, lambda content: None)
    Store(store)
    rewrite(store, MANIFESTS[kind])
    refused(store)
    # And can be removed, as the advice says.
    if kind not in ("no schema", "no key"):
        (store / "key.json").unlink()
    assert remove(store).kept == ()
    assert not store.exists()


def test_a_manifest_of_before_it_was_sealed_is_read(store):
    file = store / "manifest.json"
    content = json.loads(file.read_text())
    assert content.pop(_files.SEAL)
    file.write_text(json.dumps(content))
    read_all(Store(store))
    # One that is sealed tells of every number.
    content["error"]["block.0"]["largest"] = 0.5
    file.write_text(json.dumps({**seal({**content, "error": {}}), "error": content["error"]}))
    assert "sha256" in refused(store).found


@posix
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "folder"])
@pytest.mark.parametrize("name", ["manifest.json", "train.labels.npy", "train.0.00000000.npy"])
def test_what_is_no_file_of_the_store_is_neither_followed_nor_waited_for(
    store, tmp_path, name, kind
):
    file = (store / name).rename(tmp_path / name)
    if kind == "folder":
        (store / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(store / name)
    elif kind == "link":
        (store / name).symlink_to(file)
    else:
        (store / name).symlink_to("nowhere")
    refused(store)


def test_a_store_that_is_removed_while_it_is_read_says_so(store):
    opened = Store(store)
    read_all(opened)
    rows = opened.rows("train", 0, [1])
    half, features = Store(store), StoredFeatures(opened, ["train"])
    remove(store)
    # What is in memory stays.
    assert torch.equal(opened.rows("train", 0, [1]), rows)
    with pytest.raises(StoreError, match="removed while it was read"):
        half.rows("train", 0, [1])
    loader = DataLoader(features, 4, num_workers=1, collate_fn=collate_batch)
    if loader.multiprocessing_context is None and os.name == "posix":
        assert len(list(loader)) == 3
    with pytest.raises(StoreError, match="no feature store"):
        reopen, arguments = opened.__reduce__()
        reopen(*arguments)


def test_another_store_in_its_place_is_not_taken_for_it(store, tmp_path, whole):
    opened = Store(store)
    reopen, arguments = opened.__reduce__()
    assert reopen(*arguments).key == opened.key
    shutil.rmtree(store)
    shutil.copytree(whole["int8"], store)
    with pytest.raises(StoreError, match="another store has taken its place"):
        reopen(*arguments)
    host, key = host_and_key(splits=SPLITS)
    with pytest.raises(StoreError, match="holds another store"):
        build(host, key, tmp_path, PARTS, batch_size=4, progress=False)


UNFINISHED = {
    "another key": ("key.json", lambda text: text.replace('"noise"', '"voice"')),
    "a key cut off": ("key.json", lambda text: text[:90]),
    "a label": ("train.0.00000000.json", lambda text: text.replace("[0, 1", "[1, 1")),
    "an entry cut off": ("train.0.00000000.json", lambda text: text[:-20]),
    "an entry of another shard": (
        "train.0.00000000.json",
        lambda text: text.replace('"train"', '"val"'),
    ),
}


@pytest.mark.parametrize("kind", UNFINISHED)
def test_an_unfinished_store_that_was_changed_is_not_gone_on_with(store, kind):
    (store / "manifest.json").unlink()
    host, key = host_and_key(splits=SPLITS)
    name, change = UNFINISHED[kind]
    before = (store / name).read_text()
    assert change(before) != before
    (store / name).write_text(change(before))
    with pytest.raises(StoreError) as told:
        build(host, key, store.parent, PARTS, batch_size=4, progress=False)
    assert name in told.value.where or kind == "another key"
    (store / name).write_text(before)
    again = build(host, key, store.parent, PARTS, batch_size=4, progress=False)
    read_all(again)


def test_an_unfinished_store_is_not_gone_on_with_in_other_batches(store, monkeypatch):
    monkeypatch.setattr("restuning.features.extract.SHARD_ROWS", 5)
    host, key = host_and_key(splits=SPLITS)
    (store / "manifest.json").unlink()
    with pytest.raises(StoreError, match="another batch size"):
        build(host, key, store.parent, PARTS, batch_size=4, progress=False)


def test_removing_a_store_takes_its_own_files_and_keeps_and_names_all_others(store, tmp_path):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    (store / "notes.txt").write_text("mine")
    (store / "more").mkdir()
    (store / "more" / "manifest.json").write_text("mine")
    (store / ".train.labels.npy.elsewhere.1.0-ab.partial").write_bytes(b"half")
    if os.name == "posix":
        (store / "val.0.00000004.npy").symlink_to(thesis)
        (store / "away").symlink_to(tmp_path)
    done = restuning("cache", "rm", store.name[:9], "--store", tmp_path)
    assert done.returncode == 0, done.stderr
    left = {"notes.txt", "more"} | ({"val.0.00000004.npy", "away"} if os.name == "posix" else set())
    assert {path.name for path in store.iterdir()} == left
    assert all(name in done.stdout for name in left)
    assert (store / "more" / "manifest.json").read_text() == "mine"
    assert thesis.read_text() == "years of work"
    # It is no store now.
    with pytest.raises(StoreError):
        find_store(store)


NO_STORES = {
    "a folder of photos": {"a.jpg": "x", "train.0.00000000.npy": "x"},
    "somebody's key": {"key.json": '{"api": "secret"}', "train.labels.npy": "x"},
    "a manifest of another tool": {"manifest.json": '{"key": {"schema": 1}}', "key.json": "[]"},
    "a key that is cut off": {"key.json": '{"schema": 1, "taps"', "manifest.json": "{"},
}


@pytest.mark.parametrize("kind", NO_STORES)
def test_what_is_not_provably_a_store_is_not_removed(tmp_path, kind):
    for name, text in NO_STORES[kind].items():
        (tmp_path / name).write_text(text)
    with pytest.raises(StoreError, match="no feature store"):
        remove(tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == NO_STORES[kind]
    done = restuning("cache", "rm", tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@posix
def test_a_link_to_a_store_and_links_for_its_key_are_not_followed(store, tmp_path):
    (tmp_path / "link").symlink_to(store)
    with pytest.raises(StoreError, match="a link"):
        remove(tmp_path / "link")
    read_all(Store(tmp_path / "link"))
    os.mkfifo(tmp_path / "key.json")
    with pytest.raises(StoreError, match="no feature store"):
        remove(tmp_path)


def test_a_store_that_another_process_builds_is_not_removed(store):
    lock = store / "train.0.00000000.lock"
    with Claim.take(lock, wait=False) as claim:
        assert claim is not None
        with pytest.raises(StoreError, match="being built"):
            remove(store)
    read_all(Store(store))
    assert remove(store).bytes > 0


@posix
def test_a_lock_that_is_a_link_neither_stops_the_building_of_a_store_nor_is_followed(
    store, tmp_path
):
    (store / "manifest.json").unlink()
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    (store / "manifest.lock").symlink_to(thesis)
    host, key = host_and_key(splits=SPLITS)
    with pytest.raises(FormatError, match=r"a lock cannot be made"):
        build(host, key, store.parent, PARTS, batch_size=4, progress=False)
    assert thesis.read_text() == "years of work"


def test_a_broken_store_beside_the_one_that_is_wanted_is_passed_over(store, tmp_path):
    from restuning.features.stored import _find_covering

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "key.json").write_text("[")
    (tmp_path / "other" / "manifest.json").write_text("[" * 10**5)
    _, key = host_and_key(splits={"train": 12})
    found = _find_covering(tmp_path, key)
    assert found is not None
    assert found.path == store
    file = store / "val.labels.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(RestuningError, match="sha256"):
        _find_covering(tmp_path, key)
    assert not place(tmp_path, key).exists()


class Removing(Noise):
    """Images during whose reading somebody deletes the folder of all stores."""

    def __init__(self, count, root, at):
        super().__init__(count)
        self.root, self.at = root, at

    def __getitem__(self, index):
        if index == self.at:
            for folder in self.root.iterdir():
                shutil.rmtree(folder)
        return super().__getitem__(index)


@pytest.mark.parametrize("at", [1, 6, 11])
def test_a_store_that_is_deleted_while_it_is_built_ends_in_words_or_whole(
    tmp_path, monkeypatch, at
):
    monkeypatch.setattr("restuning.features.extract.SHARD_ROWS", 4)
    host, key = host_and_key(splits=SPLITS)
    parts = {**PARTS, ("train", 0): Removing(12, tmp_path, at)}
    try:
        store = build(host, key, tmp_path, parts, batch_size=4, progress=False)
    except StoreError as error:
        assert error.fix
        # And the same command builds it whole.
        store = build(host, key, tmp_path, PARTS, batch_size=4, progress=False)
    read_all(store)
    assert store.verify() > 0

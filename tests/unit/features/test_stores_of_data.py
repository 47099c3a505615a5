"""A store answers for the data it was made of, and for no others."""

import hashlib
import json
import os
import shutil
from contextlib import nullcontext

import pytest
import torch
from PIL import Image

import restuning
from restuning import Needs, _files, load_data, methods
from restuning._errors import DataError, StoreError
from restuning.features import Cached, Store, StoredFeatures, StoreOptions, open_or_build
from restuning.features.stored import key_for, taps_to_store


@pytest.fixture(scope="module")
def tiny():
    backbone = restuning.load_backbone("restuning-tiny")
    return backbone, backbone.host()


@pytest.fixture
def pets(tmp_path):
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        for number in range(count):
            file = tmp_path / "pets" / split / ("cat", "dog")[number % 2] / f"{number}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (20 * number,) * 3).save(file)
    return tmp_path / "pets"


@pytest.fixture
def opened(tiny, pets, tmp_path):
    backbone, host = tiny

    def opened(data=None, lines=None, root=None):
        options = StoreOptions(root or tmp_path / "stores", progress=False, batch_size=2)
        options = options if lines is None else StoreOptions(options.root, log=lines.append)
        data = data or load_data(str(pets), backbone)
        return open_or_build(host, backbone, data, Needs(host.sites.taps, "cls"), options)

    return opened


def move_over(file, level):
    """Another image of equal size and time."""
    before, other = file.stat(), file.with_suffix(".new")
    Image.new("RGB", (8, 8), (level,) * 3).save(other, "BMP")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_features_of_a_replaced_image_are_computed_anew(opened, pets, monkeypatch, split):
    monkeypatch.setattr(_files, "SETTLED", 0)
    first = opened().store
    assert opened().store.path == first.path
    move_over(pets / split / "cat" / "0.bmp", 250)
    second = opened().store
    assert second.path != first.path
    before, after = (store.rows(split, 0, [0, 1]) for store in (first, second))
    assert not torch.equal(before[0], after[0])


def test_a_store_covers_less_of_its_data_and_a_copy_of_them(opened, tiny, pets, tmp_path):
    whole = opened().store
    less = load_data(str(pets), tiny[0]).with_splits(test=None)
    assert opened(less).store.path == whole.path
    shutil.copytree(pets, tmp_path / "elsewhere" / "pets")
    assert opened(load_data(str(tmp_path / "elsewhere" / "pets"), tiny[0])).seconds == 0


def test_a_store_with_more_splits_than_the_data_gives_those_of_the_data(opened, tiny, pets):
    data = load_data(str(pets), tiny[0])
    store = opened(data)
    for missing in ("val", "test"):
        given = store.data(data.with_splits(**{missing: None}), final=False)
        assert getattr(given, missing) is None
        assert len(given.train) == len(data.train)
    both = store.data(data, final=True)
    assert len(both.train) == len(data.train) + len(data.val)
    alone = store.data(data.with_splits(val=None), final=True)
    assert len(alone.train) == len(data.train)


def test_stored_features_are_known_as_the_images_are(opened, tiny, pets):
    data = load_data(str(pets), tiny[0])
    stored = opened(data).data(data, final=False)
    assert stored.contents() == data.contents()
    assert stored.train.contents.reading


def test_a_store_of_before_contents_were_known_opens_by_path_and_answers_for_nothing(
    opened, tiny, pets, tmp_path
):
    backbone, host = tiny
    store = opened().store
    key = key_for(
        host, backbone, load_data(str(pets), backbone), taps_to_store(host, Needs(("last",), "cls"))
    )
    old = tmp_path / "stores" / "pets-0123456789ab"
    shutil.move(store.path, old)
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["key"]["data"]["identity"] = "0123456789abcdef"
    raw = json.dumps(manifest["key"], sort_keys=True).encode()
    manifest["digest"] = hashlib.sha256(raw).hexdigest()
    del manifest[_files.SEAL]
    (old / "manifest.json").write_text(json.dumps(manifest))
    (old / "key.json").write_text(json.dumps(manifest["key"]))
    assert not Store(old).key.known_by_contents
    assert not Store(old).key.covers_data(key)
    features = StoredFeatures(Store(old), ["train"])
    assert (
        len(features) == 6 and features.contents == StoredFeatures(Store(old), ["train"]).contents
    )
    lines = []
    assert opened(lines=lines).store.path != old
    assert any(str(old) in line and "built again" in line for line in lines)


def test_an_image_that_changes_while_features_are_computed_leaves_none_of_them(opened, tiny, pets):
    data = load_data(str(pets), tiny[0])
    image, file = data.train.image, data.train.files[4]
    before = file.read_bytes()

    def read(index):
        if index == 4:
            move_over(file, 200)
        return image(index)

    data.train.image = read
    with pytest.raises(DataError, match="changed while they were read") as error:
        opened(data)
    assert error.value.where == str(file)
    file.write_bytes(before)
    whole, apart = opened().store, opened(root=pets.parent / "others").store
    assert torch.equal(whole.rows("train", 0, range(6)), apart.rows("train", 0, range(6)))


def test_a_store_of_a_backbone_that_differs_in_one_weight_is_refused(opened, tiny):
    store, other = opened().store, restuning.load_backbone("restuning-tiny")
    # The fingerprint looks at the first, the middle and the last by name.
    second = sorted(name for name, _ in other.model.named_parameters())[1]
    with torch.no_grad():
        other.model.get_parameter(second).view(-1)[0] += 1e-3
    host = other.host()
    assert host.fingerprint() == tiny[1].fingerprint()
    for each, refused in ((tiny[1], False), (host, True)):
        task = methods.build("linear", each, num_classes=2)
        with pytest.raises(StoreError, match="all weights") if refused else nullcontext():
            Cached(each, task, store)

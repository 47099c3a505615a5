"""Data sets and backbones by name: layouts, and errors in words."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from restuning import RestuningError, load_backbone, load_data
from restuning.data import Data, read_list, with_validation

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("restuning-tiny")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)


def test_digits_has_three_fixed_splits(tiny):
    data = load_data("digits", tiny)
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    assert data.train[0][0].shape == (3, 32, 32)
    assert data.identity == load_data("digits", tiny).identity


def test_a_folder_of_classes_is_split_and_a_corrupt_file_named_or_counted(tiny, tmp_path):
    for name in ("cat", "dog"):
        for i in range(10):
            picture(tmp_path / name / f"{i}.jpg")
    data = load_data(str(tmp_path), tiny)
    assert data.labels == ["cat", "dog"]
    bad = data.train.samples[0][0]
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(RestuningError, match=bad.name):
        load_data(str(tmp_path), tiny).train[0]
    assert load_data(str(tmp_path), tiny, skip_bad=True).skipped == 1


def test_the_vtab_layout_is_read(tiny, tmp_path):
    for i in range(6):
        picture(tmp_path / "images" / f"{i}.jpg")
    lines = [f"images/{i}.jpg {i % 2}\n" for i in range(6)]
    for name, part in (("train800", lines[:2]), ("val200", lines[2:4]), ("test", lines[4:])):
        (tmp_path / f"{name}.txt").write_text("".join(part))
    data = load_data(str(tmp_path), tiny)
    assert (len(data.train), len(data.val), len(data.test)) == (2, 2, 2)
    assert len(load_data(str(tmp_path), tiny, final=True).train) == 4


def test_a_malformed_line_is_named_by_its_number(tmp_path):
    (tmp_path / "train800.txt").write_text("images/0.jpg 1\nimages/1.jpg one\n")
    with pytest.raises(RestuningError, match="line 2"):
        read_list(tmp_path / "train800.txt")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=80))
def test_any_list_is_read_or_refused_in_words(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    try:
        read_list(tmp_path / "list.txt")
    except RestuningError:
        pass


@pytest.mark.parametrize("name", ["no-such", "timm:no_such_model", "torchvision:nothing", "hf:"])
def test_an_unknown_backbone_is_refused_in_words(name):
    with pytest.raises(RestuningError):
        load_backbone(name, random=True)


def test_weights_that_do_not_fit_name_the_keys(tmp_path, tiny):
    state = {k: v.contiguous() for k, v in tiny.model.state_dict().items()}
    del state["cls_token"]
    state["norm.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(RestuningError) as error:
        load_backbone("restuning-tiny", weights=tmp_path / "w.safetensors")
    assert "cls_token" in str(error.value)
    assert "norm.weight" in str(error.value)


def test_a_pickled_checkpoint_is_not_opened(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(RestuningError, match="convert it to safetensors"):
        load_backbone("restuning-tiny", weights=tmp_path / "w.pth")


@pytest.mark.data
def test_real_weights_and_real_tasks_load(shared_data):
    weights = shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    backbone = load_backbone("timm:vit_tiny_patch16_224", weights=weights)
    data = load_data(str(shared_data / "vtab" / "cifar100"), backbone)
    assert data.num_classes == 100
    assert data.train[0][0].shape == (3, 224, 224)


def test_a_fifth_of_every_class_is_held_out_where_there_is_no_validation_split(tiny):
    data = load_data("digits", tiny)
    assert with_validation(data) is data
    bare = replace(data, val=None)
    found = with_validation(bare)
    taken, left = set(found.val.indices), set(found.train.indices)
    assert taken | left == set(range(len(data.train)))
    assert not taken & left
    for digit in range(10):
        whole = sum(y == digit for y in data.train.labels)
        assert sum(data.train.labels[i] == digit for i in taken) == round(0.2 * whole)
    assert with_validation(bare).val.indices == found.val.indices
    assert found.identity != data.identity, "a store of the whole split must not be taken for it"
    assert found.test is data.test


def test_texts_are_held_out_as_images_are_and_too_few_are_refused(tiny):
    texts = [(f"text {i}", i % 2) for i in range(10)]
    data = Data("texts", texts, None, None, ["a", "b"], "text", identity="x")
    found = with_validation(data)
    assert sorted(y for _, y in (found.val[i] for i in range(2))) == [0, 1]
    tags = Data("tags", [(["a"], [0])] * 10, None, None, ["O"], "tags", identity="x")
    assert len(with_validation(tags).val) == 2
    with pytest.raises(RestuningError, match="too few examples"):
        with_validation(Data("one", texts[:1], None, None, ["a", "b"], "text", identity="x"))

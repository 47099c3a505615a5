"""What would fail at the end of a training fails before it: nothing is trained in vain."""

from dataclasses import replace

import pytest
import torch

import restuning
from restuning import RestuningError
from restuning._errors import MissingExtraError
from restuning.training import loop, run


@pytest.fixture(scope="module")
def backbone():
    return restuning.load_backbone("restuning-tiny")


@pytest.fixture(scope="module")
def data(backbone):
    whole = restuning.load_data("digits", backbone)
    few = {
        name: torch.utils.data.Subset(getattr(whole, name), range(4))
        for name in ("train", "val", "test")
    }
    return replace(whole, **few)


@pytest.fixture
def train(backbone, data, monkeypatch, tmp_path):
    """`restuning.train` without a store, which no step of training may come of."""

    def fail(*_, **__):
        raise AssertionError("something was trained")

    monkeypatch.setattr(loop.Loop, "run", fail)

    def call(out="run", data=data, **how):
        how = {"method": "linear", "epochs": 1, "store": False, **how}
        return restuning.train(data, backbone=backbone, out=tmp_path / out, **how)

    return call


def test_what_would_be_trained_otherwise_is_trained(train):
    with pytest.raises(AssertionError, match="something was trained"):
        train()


def no_rows(folder, data):
    return {"data": replace(data, test=torch.utils.data.Subset(data.test, []))}


def no_label(folder, data):
    return {"data": replace(data, labels=[*data.labels[:-1], 3])}


def a_file_in_place_of_the_run(folder, data):
    (folder / "run").write_text("mine")
    return {}


def a_file_in_place_of_the_task(folder, data):
    (folder / "run").mkdir()
    (folder / "run" / f"{data.name}.task").write_text("mine")
    return {}


def a_folder_in_place_of_a_file(name):
    def make(folder, data):
        (folder / "run" / name).mkdir(parents=True)
        return {}

    return make


def a_name_that_is_too_long(folder, data):
    return {"data": replace(data, name="n" * 252)}


def what_json_cannot_say(folder, data):
    return {"data": replace(data, notes={"preprocessing": {"mean": float("nan")}})}


CASES = {
    "no test rows": no_rows,
    "a label that is no text": no_label,
    "a file in place of the run": a_file_in_place_of_the_run,
    "a file in place of the task": a_file_in_place_of_the_task,
    "a folder in place of metrics": a_folder_in_place_of_a_file("metrics.json"),
    "a folder in place of the curves": a_folder_in_place_of_a_file("curves.png"),
    "a folder in place of settings": a_folder_in_place_of_a_file("settings.json"),
    "a name that is too long": a_name_that_is_too_long,
    "what JSON cannot say": what_json_cannot_say,
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_could_not_end_does_not_begin(case, train, data, tmp_path):
    how = CASES[case](tmp_path, data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RestuningError):
        train(**how)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["comparison.json", "comparison.png"])
def test_a_comparison_that_could_not_end_does_not_begin(name, train, tmp_path):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(RestuningError, match="a folder of this name"):
        train(method=["linear", "bitfit"])


@pytest.mark.parametrize("name", ["choice.json", "metrics.json"])
def test_a_choice_that_could_not_end_does_not_begin(name, train, tmp_path):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(RestuningError, match="a folder of this name"):
        train(method="auto", epochs=None, store=None)


def test_a_tracker_that_is_not_installed_is_told_before_features_are_stored(
    train, tmp_path, monkeypatch
):
    from restuning.training import trackers

    gone = replace(trackers.TRACKERS["wandb"], module="no_such_module")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", gone)
    with pytest.raises(MissingExtraError, match="tracking"):
        train(track=("wandb",), store=tmp_path / "features")
    assert not list(tmp_path.rglob("*"))


def test_a_weights_file_that_is_gone_is_told_before(train, backbone, data, tmp_path):
    gone = replace(backbone, weights_file=tmp_path / "gone.safetensors")
    with pytest.raises(RestuningError, match="weights file cannot be read"):
        restuning.train(data, backbone=gone, method="linear", out=tmp_path / "run", store=False)
    assert not list(tmp_path.rglob("*"))


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    for part in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (32, 32), (i * 80, 0, 0)).save(folder / part / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_image_that_is_read_last_and_cannot_be_read_is_named_first(train, split, photos):
    with pytest.raises(AssertionError, match="something was trained"):
        train(data=photos)
    (photos / split / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(RestuningError, match="dog/1.png"):
        train(data=photos)


def test_images_are_read_beforehand_where_something_is_trained_and_not_where_it_was(
    backbone, photos, tmp_path, monkeypatch
):
    read = []
    monkeypatch.setattr(run, "read_once", lambda *splits: read.append(len(splits)))

    def train(**how):
        out = tmp_path / "run"
        how = {"method": "linear", "epochs": 1, "store": False, **how}
        return restuning.train(photos, backbone=backbone, out=out, **how)

    assert train().metrics["val_accuracy"] == train().metrics["val_accuracy"]
    assert len(read) == 1
    train(resume=False)
    assert len(read) == 2

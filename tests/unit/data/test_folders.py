"""Folders of images as people have them: links, litter, other files, splits by any name, earlier runs."""

import json
import os
import warnings

import numpy as np
import pytest
from PIL import Image
from torch import nn

from commands import restuning
from restuning import load_data
from restuning._errors import DataError, RestuningError, RestuningWarning, UnknownNameError
from restuning.backbones import Backbone, Preprocessing
from restuning.bench import find_tasks
from restuning.data import find_images, say_left_out
from restuning.serve.inputs import ImageInputs

IMAGES = Backbone("images", nn.Identity(), (), {}, Preprocessing((16, 16)))
RNG = np.random.default_rng(0)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    form = {".JPG": "JPEG", ".PNG": "PNG"}.get(path.suffix)
    Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path, form)


def classes(root, *names, count=3):
    for name in names:
        for i in range(count):
            picture(root / name / f"{i}.png")


def paths(data):
    parts = [s for s in (data.train, data.val, data.test) if s is not None]
    return sorted(p for s in parts for p, _ in s.samples)


LITTER = (
    ".DS_Store",
    "Thumbs.db",
    "THUMBS.DB",
    "desktop.ini",
    "._0.png",
    "__MACOSX/cat/._0.png",
    "__MACOSX/0.png",
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
    ".ipynb_checkpoints/0-checkpoint.png",
    "$RECYCLE.BIN/0.png",
)


@pytest.mark.parametrize("where", ["", "cat", "dog/inner"])
def test_what_systems_leave_is_neither_image_nor_class_nor_spoken_of(where, tmp_path):
    classes(tmp_path, "cat", "dog")
    for name in LITTER:
        place = tmp_path / where / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"litter")
    data = load_data(str(tmp_path), IMAGES)
    assert data.labels == ["cat", "dog"]
    assert len(paths(data)) == 6
    assert data.describe().endswith("2 classes")


def test_what_is_left_out_is_counted_and_named(tmp_path):
    classes(tmp_path, "cat", "dog")
    for name in ("cat/notes.txt", "cat/a.xml", "dog/b.xml", "dog/c.xml", "labels.csv"):
        (tmp_path / name).write_text("no image")
    picture(tmp_path / "loose.png")
    data = load_data(str(tmp_path), IMAGES)
    assert (
        "5 files that are no images (labels.csv, cat/a.xml, cat/notes.txt, ...)" in data.describe()
    )
    assert "1 image in no class folder (loose.png)" in data.describe()
    assert len(data.left_out["no image"]) == 5


def test_corrupt_images_are_named_where_they_are_left_out(tmp_path):
    classes(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    Image.new("RGB", (1, 3000)).save(tmp_path / "dog" / "thread.png")
    data = load_data(str(tmp_path), IMAGES, skip_bad=True)
    assert data.skipped == 2
    assert "left out: 2 corrupt files (" in data.describe()
    for name in ("cat/1.png", "dog/thread.png"):
        assert name in data.describe()


def test_heic_without_its_library_is_left_out_with_the_line_that_installs_it(tmp_path, monkeypatch):
    from restuning.backbones import images

    monkeypatch.setattr(images, "_has_heif", lambda: False)
    images.image_suffixes.cache_clear()
    try:
        classes(tmp_path, "cat", "dog")
        (tmp_path / "cat" / "IMG_1.HEIC").write_bytes(b"from a telephone")
        said = load_data(str(tmp_path), IMAGES).describe()
    finally:
        images.image_suffixes.cache_clear()
    assert "1 file that needs `pip install 'restuning[heif]'` (cat/IMG_1.HEIC)" in said


def test_suffixes_are_read_in_any_case_and_of_all_that_pillow_reads(tmp_path):
    classes(tmp_path, "cat", "dog")
    picture(tmp_path / "cat" / "A.JPG")
    picture(tmp_path / "cat" / "b.jfif")
    picture(tmp_path / "dog" / "C.PNG")
    picture(tmp_path / "dog" / "d.jp2")
    picture(tmp_path / "dog" / "e.tga")
    data = load_data(str(tmp_path), IMAGES)
    assert len(paths(data)) == 11
    assert not data.left_out


def test_links_are_followed_and_those_that_lead_back_are_not(tmp_path):
    pool, data = tmp_path / "pool", tmp_path / "data"
    classes(pool, "cats", "more")
    classes(data, "dog")
    (data / "cat").symlink_to(pool / "cats", target_is_directory=True)
    (data / "dog" / "more").symlink_to(pool / "more", target_is_directory=True)
    (data / "dog" / "again").symlink_to(pool / "more", target_is_directory=True)
    (data / "dog" / "one.png").symlink_to(pool / "cats" / "0.png")
    (data / "dog" / "up").symlink_to(data, target_is_directory=True)
    (data / "self").symlink_to(data, target_is_directory=True)
    (pool / "more" / "round").symlink_to(pool / "more", target_is_directory=True)
    found = load_data(str(data), IMAGES)
    assert found.labels == ["cat", "dog"]
    inside = [os.path.relpath(p, data) for p in paths(found)]
    assert [p for p in inside if p.startswith("cat")] == [f"cat/{i}.png" for i in range(3)]
    assert [p for p in inside if p.startswith("dog")] == [
        *(f"dog/{i}.png" for i in range(3)),
        # Of two ways to one folder the first by name.
        *(f"dog/again/{i}.png" for i in range(3)),
        "dog/one.png",
    ]
    assert "3 links back to folders above them" in found.describe()


def test_a_link_to_what_is_gone_is_missed_by_name(tmp_path):
    classes(tmp_path, "cat", "dog")
    (tmp_path / "emu").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    with pytest.raises(DataError, match=r"emu(.|\n)*nowhere"):
        load_data(str(tmp_path), IMAGES)
    (tmp_path / "emu").unlink()
    (tmp_path / "cat" / "z.png").symlink_to(tmp_path / "nowhere.png")
    data = load_data(str(tmp_path), IMAGES)
    with pytest.raises(DataError, match=r"z\.png"):
        [s[i] for s in (data.train, data.val, data.test) if s for i in range(len(s))]


def test_folders_named_like_images_are_folders(tmp_path):
    classes(tmp_path, "cat.png", "dog.jpg/inner.png")
    data = load_data(str(tmp_path), IMAGES)
    assert data.labels == ["cat.png", "dog.jpg"]
    assert len(paths(data)) == 6


# ---------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("TRAINING", "DEV", "TESTING"),
        ("training", "valid", "testing"),
        ("train", "Validation", "test"),
    ],
)
def test_splits_are_known_by_their_usual_names_in_any_case(train, val, test, tmp_path):
    for split, count in ((train, 3), (val, 2), (test, 1)):
        classes(tmp_path / "data" / split, "cat", "dog", count=count)
    data = load_data(str(tmp_path / "data"), IMAGES)
    assert [len(s) for s in (data.train, data.val, data.test)] == [6, 4, 2]
    assert [t.name for t in find_tasks(str(tmp_path))] == ["data"]


@pytest.mark.parametrize(
    "names", [("train", "training"), ("train", "val", "dev"), ("train", "Test", "testing")]
)
def test_two_names_for_one_split_are_refused(names, tmp_path):
    for name in names:
        classes(tmp_path / name, "cat", "dog")
    with pytest.raises(DataError, match="two names for the"):
        load_data(str(tmp_path), IMAGES)


@pytest.mark.parametrize("name", ["eval", "Evaluation", "holdout"])
def test_a_split_that_may_be_either_is_asked_about(name, tmp_path):
    for split in ("train", name):
        classes(tmp_path / split, "cat", "dog")
    with pytest.raises(DataError, match=f"{name}(.|\n)*val or test"):
        load_data(str(tmp_path), IMAGES)


def test_what_lies_beside_the_splits_is_named(tmp_path):
    for split in ("train", "test", "unlabelled"):
        classes(tmp_path / split, "cat", "dog")
    assert "1 folder beside the splits (unlabelled)" in load_data(str(tmp_path), IMAGES).describe()


@pytest.mark.parametrize(
    "names", [("train2", "test2"), ("Training_set", "test_images"), ("val-1", "train-1")]
)
def test_classes_that_look_like_splits_are_warned_of(names, tmp_path):
    classes(tmp_path, *names)
    with pytest.warns(RestuningWarning, match=f"look like splits(.|\n)*{max(names)}"):
        assert load_data(str(tmp_path), IMAGES).labels == sorted(names)


def test_classes_that_only_begin_with_the_letters_of_a_split_are_not_warned_of(tmp_path, recwarn):
    classes(tmp_path, "trainer", "developer", "valley", "testudo")
    load_data(str(tmp_path), IMAGES)
    assert not recwarn.list


def test_a_class_may_be_called_train_where_it_holds_images_and_others_do(tmp_path):
    classes(tmp_path, "bus", "car", "train")
    with pytest.warns(RestuningWarning, match="train"):
        assert load_data(str(tmp_path), IMAGES).labels == ["bus", "car", "train"]


def test_splits_without_class_folders_are_refused(tmp_path):
    classes(tmp_path, "train", "test")
    with pytest.raises(DataError, match="a folder for each class"):
        load_data(str(tmp_path), IMAGES)


# ------------------------------------------------------------------- names, runs


@pytest.mark.parametrize("given", [".", "./", "../photos", "inner/..", "{}/", "{}/inner/.."])
def test_a_data_set_has_the_name_of_its_folder_however_it_is_given(given, tmp_path, monkeypatch):
    home = tmp_path / "photos"
    classes(home, "cat", "dog")
    (home / "inner").mkdir()
    picture(home / "inner" / "0.png")
    monkeypatch.chdir(home)
    assert load_data(given.format(home), IMAGES).name == "photos"


def test_the_home_folder_and_links_have_names(tmp_path, monkeypatch):
    classes(tmp_path / "me", "cat", "dog")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "alias").symlink_to(tmp_path / "me", target_is_directory=True)
    assert load_data("~", IMAGES).name == "me"
    assert load_data("~/../alias", IMAGES).name == "alias"


LEFT = {
    "train": ("--method", "linear", "--epochs", "1", "--out", "{}"),
    "train, compared": ("--epochs", "1", "--out", "{}"),
    "sweep": (
        "--method",
        "linear",
        "--grid",
        "lr=1e-3",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--out",
        "{}",
    ),
    "cache": ("--store", "{}"),
}


PLACES = ("runs/first", "anything", "cat/inside")
QUICK = (("sweep", "anything"), ("cache", "cat/inside"))
"""What `train` leaves is known to a test below."""


@pytest.mark.parametrize(
    ("command", "place"),
    [
        pytest.param(c, p, marks=() if (c, p) in QUICK else pytest.mark.slow)
        for c in LEFT
        for p in PLACES
    ],
)
def test_what_a_command_left_in_its_data_is_no_class_and_no_image(command, place, tmp_path):
    data = tmp_path / "photos"
    classes(data, "cat", "dog", count=10)
    words = [w.format(data / place) for w in LEFT[command]]
    store = [] if command == "cache" else ["--store", tmp_path / "store"]
    done = restuning(command.partition(",")[0], data, *words, *store)
    assert done.returncode == 0, done.stderr
    before = {p for p in data.rglob("*.png") if p.parent.name in ("cat", "dog")}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestuningWarning)
        found = load_data(str(data), IMAGES)
    assert found.labels == ["cat", "dog"]
    assert set(paths(found)) == before
    assert "earlier run" in found.describe()
    images, left_out = find_images(data)
    assert set(images) == before
    assert "earlier run" in say_left_out(left_out)


def test_a_run_that_was_killed_at_once_is_known_as_well(tmp_path):
    classes(tmp_path, "cat", "dog")
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "log.jsonl").write_text("")
    assert load_data(str(tmp_path), IMAGES).labels == ["cat", "dog"]


def test_a_folder_of_images_called_runs_is_a_class_with_a_warning(tmp_path):
    classes(tmp_path, "hits", "runs")
    with pytest.warns(RestuningWarning, match="runs"):
        assert load_data(str(tmp_path), IMAGES).labels == ["hits", "runs"]


def test_a_second_run_in_the_data_s_own_folder_is_the_same_run(tmp_path):
    data = tmp_path / "photos"
    classes(data, "cat", "dog", count=10)
    command = ("train", ".", "--method", "linear", "--epochs", "1", "--json")
    said = [restuning(*command, "--store", tmp_path / "s", cwd=data) for _ in range(2)]
    tasks = sorted(data.rglob("*.task"))
    assert all(t.name == "photos.task" and "photos-linear" in t.parent.name for t in tasks)
    assert '"trainable_parameters": 258' in said[0].stdout
    assert '"trainable_parameters": 258' in said[1].stdout
    assert "earlier run" not in said[0].stderr
    assert "left out: 1 folder of an earlier run (runs/photos-linear" in said[1].stderr


def test_every_command_that_reads_a_folder_says_what_it_left_out(tmp_path):
    data, store, out = tmp_path / "photos", tmp_path / "s", tmp_path / "run"
    for split in ("train", "val", "test"):
        classes(data / split, "cat", "dog", count=6)
    (data / "test" / "cat" / "notes.txt").write_text("no image")
    quick = ("--store", store, "--method", "linear", "--epochs", 1)
    for words in (
        ("train", data, *quick, "--out", out),
        ("cache", data, "--store", store),
        ("eval", out, data),
        ("sweep", data, *quick, "--grid", "lr=1e-3", "--seeds", 1, "--out", tmp_path / "sweep"),
        ("predict", data, "--task", out),
    ):
        done = restuning(*words, COLUMNS="300")
        assert done.returncode == 0, done.stderr
        assert "1 file that is no image (" in done.stdout + done.stderr, words
        assert "notes.txt" in done.stdout + done.stderr
    said = restuning("info", out, COLUMNS="300").stdout
    assert "linear" in said
    assert "cat" in said
    (data / "val" / "dog" / "0.png").write_bytes(b"no image")
    for words in (("predict", data, "--task", out), ("cache", data, "--store", store)):
        done = restuning(*words, "--skip-bad", COLUMNS="300")
        assert done.returncode == 0, done.stderr
        assert "1 corrupt file (" in done.stdout + done.stderr
        assert "val/dog/0.png" in done.stdout + done.stderr


def test_a_task_of_the_bench_in_the_folder_that_one_is_in_has_a_name(tmp_path, monkeypatch):
    for split in ("train", "val", "test"):
        classes(tmp_path / "photos" / split, "cat", "dog")
    monkeypatch.chdir(tmp_path / "photos")
    assert [task.name for task in find_tasks(".")] == ["photos"]


def test_a_class_that_has_no_image_left_is_refused(tmp_path):
    classes(tmp_path / "train", "cat", "dog")
    for i in range(3):
        (tmp_path / "train" / "dog" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"all corrupt(.|\n)*dog"):
        load_data(str(tmp_path), IMAGES, skip_bad=True)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_that_has_no_image_left_is_refused_and_not_taken_for_none(split, tmp_path):
    for each in ("train", "val", "test"):
        classes(tmp_path / each, "cat", "dog", count=1)
    for name in ("cat", "dog"):
        (tmp_path / split / name / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"all corrupt[\s\S]*{split}"):
        load_data(str(tmp_path), IMAGES, skip_bad=True)


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_link_that_leads_round_is_an_image_that_cannot_be_read_and_no_folder(tmp_path):
    classes(tmp_path, "a", "b", count=10)
    (tmp_path / "a" / "round.png").symlink_to("round.png")
    with pytest.raises(DataError, match=r"round\.png"):
        data = load_data(str(tmp_path), IMAGES)
        for split in (data.train, data.val, data.test):
            for i in range(len(split)):
                split[i]
    data = load_data(str(tmp_path), IMAGES, skip_bad=True)
    assert data.labels == ["a", "b"]
    assert data.skipped == 1


@pytest.mark.parametrize("classes", ['[["a"], "b"]', '[null, "b"]', '["a", {}]', "[" * 5000])
def test_class_names_that_are_no_names_are_refused(tmp_path, classes):
    picture(tmp_path / "images" / "0.png")
    for name in ("train800", "val200", "test", "train800val200"):
        (tmp_path / f"{name}.txt").write_text("images/0.png 0\nimages/0.png 1\n")
    (tmp_path / "task.json").write_text(f'{{"classes": {classes}}}')
    with pytest.raises(DataError, match="task.json of a data set is malformed"):
        load_data(str(tmp_path), IMAGES)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_folder_that_one_stands_in(name, tmp_path, monkeypatch):
    classes(tmp_path, "a", "b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match="no data set is named"):
        load_data(name, IMAGES)
    with pytest.raises(DataError, match="without a name"):
        list(ImageInputs(IMAGES.preprocessing).expand([name]))
    assert load_data(".", IMAGES).labels == ["a", "b"]


@pytest.mark.parametrize("name", ["~nobody_of_this_name/photos", "hf:~nobody_of_this_name/photos"])
def test_a_home_folder_that_is_not_there_is_refused_in_words(name):
    with pytest.raises(RestuningError, match="nobody_of_this_name"):
        load_data(name, IMAGES)


@pytest.mark.parametrize(
    "names", [("seg_train", "seg_test"), ("images-val", "images-training"), ("a.dev", "a.train")]
)
def test_classes_that_end_like_splits_are_warned_of(names, tmp_path):
    classes(tmp_path, *names)
    with pytest.warns(RestuningWarning, match="look like splits"):
        load_data(str(tmp_path), IMAGES)


def test_a_class_of_trains_is_a_class(tmp_path, recwarn):
    classes(tmp_path, "steam-train", "electric-train", "bus")
    load_data(str(tmp_path), IMAGES)
    assert not recwarn.list


def test_splits_inside_of_classes_are_warned_of(tmp_path):
    classes(tmp_path, "cat/Train", "cat/Test", "dog/train", "dog/val")
    with pytest.warns(RestuningWarning, match="splits inside of a class"):
        assert load_data(str(tmp_path), IMAGES).labels == ["cat", "dog"]


@pytest.mark.parametrize("inside", ["", "train"])
def test_class_folders_that_look_alike_are_warned_of(inside, tmp_path):
    classes(tmp_path / inside, "cat", "cat ", "dog")
    if inside:
        classes(tmp_path / "test", "cat", "dog")
    with pytest.warns(RestuningWarning, match="look alike"):
        load_data(str(tmp_path), IMAGES)


def lists(root, train, test, names=None):
    classes(root, "images", count=4)
    for name, labels in (("train800", train), ("test", test)):
        lines = [f"images/{i}.png {y}" for i, y in enumerate(labels)]
        (root / f"{name}.txt").write_text("\n".join(lines))
    if names is not None:
        (root / "task.json").write_text(json.dumps({"classes": names}))
    return load_data(str(root), IMAGES)


def test_a_list_whose_classes_have_no_training_example_is_warned_of(tmp_path):
    with pytest.warns(RestuningWarning, match="without a training example.*\n.*2 of 4"):
        lists(tmp_path / "gap", [0, 3], [0, 3])
    with pytest.warns(RestuningWarning, match="1 of 3"):
        lists(tmp_path / "unseen", [0, 1], [2, 1])


def test_a_list_of_one_class_and_two_classes_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="two classes"):
        lists(tmp_path / "one", [0, 0], [0, 0])
    with pytest.raises(DataError, match="of another name"):
        lists(tmp_path / "twice", [0, 1], [0, 1], ["a", "a"])

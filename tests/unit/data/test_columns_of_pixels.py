"""Tables with columns of masks and depth maps beside others: one pass, one preparation of images, errors by file and row."""

import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image

import restuning
from commands import restuning as run_command
from restuning._errors import DataError
from restuning.data import DataOptions, load_columns
from restuning.data.data import Arrays
from restuning.problems import Depth, Segmentation
from restuning.search import Candidate

CLASSES = ("ground", "disc", "bar")
WIDTH, HEIGHT, ROWS = 40, 30, 20
COLUMNS = ["mask", "far", "kind", "count"]


def draw(rng):
    """An image, its mask and depth, whether it is dark, and how many pixels of it are a bar."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    dark = bool(rng.integers(2))
    for number in (1, 2):
        y, x = rng.integers(0, HEIGHT - 8), rng.integers(0, WIDTH - 8)
        mask[y : y + 8, x : x + 8] = number
    colours = np.array([[40, 90, 40], [200, 60, 60], [60, 60, 220]]) + (0 if dark else 30)
    image = colours[mask] + rng.normal(0, 4, (HEIGHT, WIDTH, 3))
    depth = np.array([5.0, 2.0, 3.0], np.float32)[mask]
    told = {"kind": "dark" if dark else "bright", "count": int((mask == 2).sum()) + rng.random()}
    return image.clip(0, 255).astype(np.uint8), mask, depth, told


def write(folder, rows=ROWS):
    rng = np.random.default_rng(0)
    for name in ("images", "masks", "far"):
        (folder / name).mkdir(parents=True)
    table = []
    for number in range(rows):
        image, mask, depth, told = draw(rng)
        row = {
            "path": f"images/{number}.png",
            "mask": f"masks/{number}.png",
            "far": f"far/{number}.npy",
        }
        Image.fromarray(image).save(folder / row["path"])
        Image.fromarray(mask).save(folder / row["mask"])
        np.save(folder / row["far"], depth)
        table.append({**row, **told})
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    save(folder, table)
    return folder / "table.csv"


def save(folder, table):
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def read(folder):
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "scenes")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of all columns, and how many images went through the backbone for it."""
    place = tmp_path_factory.mktemp("columns")
    table, seen = write(place / "scenes"), []
    own = restuning.load_backbone("restuning-tiny")
    hook = own.model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    found = restuning.train(
        table,
        backbone=own,
        method="ensemble",
        epochs=1,
        image="path",
        label=COLUMNS,
        out=place / "run",
        store=place / "stores",
        progress=False,
    )
    hook.remove()
    return place, found, seen


def test_problems_are_found_from_what_cells_name(table, tiny):
    found = load_columns(table, tiny, options(label=COLUMNS))
    assert {c: data.problem.kind for c, data in found.items()} == {
        "mask": "segmentation",
        "far": "depth",
        "kind": "single-label",
        "count": "regression",
    }
    assert found["mask"].labels == list(CLASSES)
    assert found["far"].labels == ["far"]
    assert found["mask"].problem == Segmentation(window=(HEIGHT, WIDTH))
    assert "paths of pictures (--problem mask=KIND" in found["mask"].assumed
    # All of them see one image, and are known by one.
    images = [data.train[0][0] for data in found.values()]
    assert all(torch.equal(images[0], each) for each in images)
    assert len({data.contents()["train"]["inputs"] for data in found.values()}) == 1
    assert len({str(data.notes) for data in found.values()}) == 1


def options(**more):
    return DataOptions(image="path", **more)


def test_a_mask_of_a_table_is_that_of_its_image(table, tiny):
    data = load_columns(table, tiny, options(label="mask"))["mask"]
    for image, target in zip(data.train.images.files, data.train.targets, strict=True):
        assert image.name == target.name
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)


def test_all_columns_are_trained_from_one_pass(trained):
    place, found, seen = trained
    # Before come those by which sites are proved, and one at a time those that tell how rounding falls.
    begin = seen.index(round(0.7 * ROWS))
    assert sum(n for n in seen[begin:] if n > 1) == ROWS
    assert {run.method for run in found.runs.values()} == {"ensemble"}
    assert found["mask"].metrics["test"]["mean_iou"] > 0
    tasks = [run.task_folder for run in found.runs.values()]
    predictor = restuning.Predictor.load(place / "run")
    assert predictor.forwards == 1
    answer = predictor(place / "scenes" / "images" / "0.png")[0]
    assert answer["mask"].mask.shape == answer["far"].depth.shape == (HEIGHT, WIDTH)
    assert answer["kind"].label in ("dark", "bright")
    assert len(tasks) == len(COLUMNS)


def test_a_column_of_classes_beside_masks_is_tested_on_images_as_it_was_trained(trained):
    place, found, _ = trained
    for column in ("kind", "mask"):
        told = run_command(
            *("eval", found[column].task_folder, place / "scenes" / "table.csv"),
            *("--image", "path", "--label", column, "--json"),
        )
        assert told.returncode == 0, told.stderr
        for name, value in found[column].metrics["test"].items():
            assert f'"{name}": {value}'[:20] in told.stdout


def test_the_command_trains_and_leaves_masks_and_depths(trained, tmp_path):
    place, _, _ = trained
    said = run_command(
        *("train", place / "scenes" / "table.csv", "--image", "path", "--label", "mask,far,kind"),
        *("--method", "ridge", "--out", tmp_path / "run", "--store", tmp_path / "stores"),
    )
    assert said.returncode == 0, said.stderr
    assert "mean iou" in said.stdout
    assert said.stdout.count("building") == 1
    (tmp_path / "new").mkdir()
    Image.open(place / "scenes" / "images" / "3.png").save(tmp_path / "new" / "a.png")
    told = run_command(
        *("predict", tmp_path / "new", "--task", tmp_path / "run", "--out", tmp_path / "left")
    )
    assert told.returncode == 0, told.stderr
    assert "masks and depths in" in told.stdout
    assert "dark" in told.stdout or "bright" in told.stdout
    left = sorted(str(f.relative_to(tmp_path / "left")) for f in (tmp_path / "left").rglob("*.*"))
    assert left == ["far/a-depth.png", "far/a.npy", "mask/a-overlay.jpg", "mask/a.png"]
    again = run_command("report", tmp_path / "run")
    assert again.returncode == 0, again.stderr


def _size(folder, rows):
    Image.new("L", (WIDTH, HEIGHT + 1)).save(folder / rows[2]["mask"])


def _beyond(folder, rows):
    Image.new("L", (WIDTH, HEIGHT), 3).save(folder / rows[2]["mask"])


def _cell(value):
    def spoil(folder, rows):
        rows[2]["mask"] = value
        save(folder, rows)

    return spoil


def _damaged(folder, rows):
    (folder / rows[2]["mask"]).write_bytes(b"nothing")


def _no_classes(folder, rows):
    (folder / "classes.txt").unlink()


def _one_class(folder, rows):
    for row in rows:
        Image.new("L", (WIDTH, HEIGHT)).save(folder / row["mask"])


WRONG = {
    "another size": (_size, "40 x 31; the image is 40 x 30", "line 4, column mask: masks/2.png"),
    "a class beyond": (_beyond, "3 at row 0, column 0; 3 classes", "line 4, column mask: masks/2"),
    "no file": (_cell("masks/no.png"), "not there.*masks/no.png", "line 4, column mask"),
    "no path": (_cell(""), "has no mask", "line 4, column mask"),
    "outside": (_cell("../x.png"), "outside of its folder", "line 4, column mask"),
    "damaged": (_damaged, "cannot be read", "line 4, column mask: masks/2.png"),
    "no classes": (_no_classes, "names of their classes", "classes.txt"),
    "one class": (_one_class, "teach nothing", "column mask"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_refused_with_its_file_and_row(kind, table, tiny):
    spoil, said, where = WRONG[kind]
    spoil(table.parent, read(table.parent))
    with pytest.raises(DataError, match=f"(?s){said}") as refused:
        load_columns(table, tiny, options(label="mask"))
    assert where in refused.value.where


def test_classes_are_those_that_are_said(table, tiny, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    for said in (["a", "b", "c"], str(tmp_path / "names.txt")):
        data = load_columns(table, tiny, options(label="mask", classes=said))["mask"]
        assert data.labels == ["a", "b", "c"]
    with pytest.raises(DataError, match="there are none"):
        load_columns(table, tiny, options(label="kind", classes=["a", "b"]))


def test_pictures_of_16_bits_are_depths_where_somebody_says_so(table, tiny):
    for row in read(table.parent):
        numbers = np.full((HEIGHT, WIDTH), 300 + int(float(row["count"])), np.uint16)
        Image.fromarray(numbers).save(table.parent / row["mask"])
    with pytest.raises(DataError, match="no class numbers"):
        load_columns(table, tiny, options(label="mask"))
    data = load_columns(table, tiny, options(label="mask", problem="mask=depth"))["mask"]
    assert isinstance(data.problem, Depth)
    assert data.problem.mean > 300


def test_a_frame_of_arrays_or_pictures_is_read_as_files_are(table, tiny):
    rows = read(table.parent)
    images = [np.array(Image.open(table.parent / row["path"])) for row in rows]
    masks = [np.array(Image.open(table.parent / row["mask"])) for row in rows]
    far = [np.load(table.parent / row["far"]) for row in rows]
    columns = {"path": images, "mask": masks, "far": far, "kind": [row["kind"] for row in rows]}
    ways = {
        "arrays": columns,
        "pictures": {**columns, "mask": [Image.fromarray(each) for each in masks]},
        "bytes": {**columns, "mask": [(table.parent / row["mask"]).read_bytes() for row in rows]},
        "tensors": {**columns, "mask": [torch.from_numpy(each) for each in masks]},
        "paths": {**columns, "mask": [str(table.parent / row["mask"]) for row in rows]},
    }
    wanted = load_columns(table, tiny, options(label=["mask", "far"]))
    for way in ways.values():
        found = load_columns(way, tiny, options(label=["mask", "far"], classes=CLASSES))
        for column, data in wanted.items():
            assert found[column].problem == data.problem
            assert torch.equal(found[column].train[3][1], data.train[3][1])
            assert torch.equal(found[column].train[3][0], data.train[3][0])
    for spoilt, wrong in (
        (float("nan"), "has no mask"),
        (3.5, "no class numbers"),
        ([[0, 1]], "no class numbers"),
    ):
        some = {**columns, "mask": [*masks[:-1], spoilt]}
        asked = options(label="mask", problem="segmentation", classes=CLASSES)
        with pytest.raises(DataError, match=f"{wrong}.*row 19 of the table, column mask"):
            load_columns(some, tiny, asked)
    with pytest.raises(DataError, match="no folder to look for them in"):
        load_columns(columns, tiny, options(label="mask"))
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"path": list(images), "mask": list(masks)})
    found = load_columns(frame, tiny, options(label="mask", classes=CLASSES))
    assert found["mask"].problem == wanted["mask"].problem


def test_what_is_assumed_of_images_that_their_notes_turn_is_said_wherever_they_lie(table, tiny):
    notes, rows = Image.Exif(), read(table.parent)
    # Upside down: sizes do not tell if a mask was drawn before that or after.
    notes[0x0112] = 3
    for row in rows[:3]:
        file = table.parent / row["path"]
        Image.open(file).save(file, exif=notes)
    files = [table.parent / row["path"] for row in rows]
    masks = [table.parent / row["mask"] for row in rows]
    for images in (
        files,
        [file.read_bytes() for file in files],
        [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        list(map(Image.open, files)),
    ):
        columns = {"path": images, "mask": masks}
        data = load_columns(columns, tiny, options(label="mask", classes=CLASSES))["mask"]
        assert "EXIF turns 3 images" in data.assumed


def test_an_image_is_decoded_once_for_itself_and_its_mask(tmp_path, tiny, monkeypatch):
    table, decoded = write(tmp_path / "scenes"), []
    rows = read(table.parent)
    columns = {c: [(table.parent / row[c]).read_bytes() for row in rows] for c in ("path", "mask")}
    data = load_columns(columns, tiny, options(label="mask", classes=CLASSES))["mask"]
    real = Arrays.image
    monkeypatch.setattr(Arrays, "image", lambda self, n: decoded.append(n) or real(self, n))
    for number in range(len(data.train)):
        data.train[number]
    assert decoded == list(range(len(data.train)))


def test_mirror_images_and_no_other_augmentation(table, tiny):
    load_columns(table, tiny, options(label=["mask", "kind"], augment="flip"))
    with pytest.raises(DataError, match="moves pixels and not the mask"):
        load_columns(table, tiny, options(label="mask", augment="timm"))


def test_a_method_is_chosen_for_all_columns_from_one_pass(tmp_path, monkeypatch):
    """Answers at places and answers of images read other tokens; test rows are read once, when all is chosen."""
    tried = (Candidate("linear", (1e-2,), 1), Candidate("ridge", (1e-3,), 1))
    monkeypatch.setattr("restuning.search.auto.CANDIDATES", tried)
    table, lines = write(tmp_path / "scenes"), []
    own, seen = restuning.load_backbone("restuning-tiny"), []
    hook = own.model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    found = restuning.train(
        table,
        backbone=own,
        method="auto",
        epochs=1,
        image="path",
        label=["mask", "kind", "count"],
        out=tmp_path / "run",
        store=tmp_path / "stores",
        log=lines.append,
        progress=False,
        report=False,
    )
    hook.remove()
    assert {run.choice.method for run in found.runs.values()} <= {"linear", "ridge"}
    assert all(len(run.choice.rows) == 2 for run in found.runs.values())
    # One for the choice of all, of train and val, and one of test rows for what was chosen; other forwards prove sites and rounding.
    passes = [int(word) for line in lines for word in re.findall(r"(\d+) forwards", line)]
    assert passes == [16, 4], lines
    assert [seen.count(size) for size in (14, 2)] == [1, 1]

"""Folders of images and masks: the layout, what is read of it, and every way in which it may be wrong."""

import csv
import io
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import restuning
from commands import restuning as run_command
from pixels import CLASSES, HEIGHT, WIDTH, draw_mask, write_masks
from restuning import Tuned
from restuning._errors import (
    DataError,
    FormatError,
    NoSitesError,
    RestuningWarning,
    UnknownNameError,
    WrongTaskError,
)
from restuning.backbones import Preprocessing
from restuning.backbones.images import read_mask
from restuning.data import load_data
from restuning.data.pixels import ImagesWithTargets
from restuning.features import StoreOptions, open_or_build
from restuning.problems import MaskAnswer, Segmentation
from restuning.serve.masks import from_png, to_png
from restuning.sites import Needs


@pytest.fixture
def folder(tmp_path):
    return write_masks(tmp_path / "shapes")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("masks")
    write_masks(place / "shapes", 20)
    run = restuning.train(
        place / "shapes", method="ridge", out=place / "run", store=place / "stores", progress=False
    )
    return place, run


def test_a_folder_of_images_and_masks_is_a_segmentation(folder, tiny):
    data = load_data(folder, tiny)
    assert data.problem.kind == "segmentation"
    assert data.labels == list(CLASSES)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 1, 3)
    image, mask = data.train[0]
    assert image.shape == (3, 32, 32)
    assert (mask.shape, mask.dtype) == ((32, 32), torch.uint8)
    assert "resized whole to 32 x 32" in data.assumed
    assert load_data(folder, tiny, problem="segmentation").identity == data.identity
    with pytest.raises(DataError, match="class of every pixel"):
        load_data(folder, tiny, problem="regression")


def test_splits_are_those_of_the_folder_and_images_lie_at_any_depth(tmp_path, tiny):
    for number, name in enumerate(("train", "val", "test")):
        write_masks(tmp_path / name, 4 - number, seed=number, classes=())
    for kind in ("images", "masks"):
        (tmp_path / "train" / kind / "deep").mkdir()
        (tmp_path / "train" / kind / "03.png").rename(
            tmp_path / "train" / kind / "deep" / "more.dots.png"
        )
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    data = load_data(tmp_path, tiny)
    assert (len(data.train), len(data.val), len(data.test)) == (4, 3, 2)
    final = load_data(tmp_path, tiny, final=True)
    assert (len(final.train), final.val) == (7, None)


def test_identity_hangs_on_masks_and_features_do_not(folder, tiny):
    before = load_data(folder, tiny)
    contents = before.contents()
    mask = np.array(Image.open(folder / "masks" / "00.png"))
    mask[:16] = 1
    Image.fromarray(mask).save(folder / "masks" / "00.png")
    after = load_data(folder, tiny)
    changed = [
        split for split in ("train", "val", "test") if after.contents()[split] != contents[split]
    ]
    assert len(changed) == 1
    assert after.contents()[changed[0]]["inputs"] == contents[changed[0]]["inputs"]
    # Also where it is held in memory.
    assert before.contents() == after.contents()


FORMS = {
    "crop": Preprocessing((24, 24), crop=0.8, interpolation="nearest"),
    "wide": Preprocessing((16, 24), crop=0.9, interpolation="nearest"),
    "whole": Preprocessing((24, 24), crop=0.9, interpolation="nearest").whole(),
    "as it is": Preprocessing((24, 24), interpolation="nearest", resize=()),
    "smaller": Preprocessing((64, 64), interpolation="nearest", resize=(30,)),
    "said": Preprocessing((24, 24), interpolation="nearest", resize=(26, 40)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(40, 30), (31, 57)])
def test_a_mask_goes_where_its_image_goes(form, size):
    """Of an image whose pixels say their class, resized to the nearest pixel, the mask says what the image does."""
    preprocessing = FORMS[form]
    mask = np.random.default_rng(0).integers(0, 5, size[::-1]).astype(np.uint8)
    image = Image.fromarray(np.stack([mask * 40 + 10] * 3, -1))
    shown = preprocessing.resize_and_crop(image)[0]
    found = preprocessing.mask(Image.fromarray(mask))
    there = shown > 0
    assert torch.equal(found[there], (shown[there] - 10) // 40)
    assert (found[~there] == 255).all()
    assert bool((~there).any()) == (form == "smaller" or (form == "as it is" and False))
    left, top, right, bottom = preprocessing.seen(*size)
    if form == "whole":
        assert (left, top, right, bottom) == (0, 0, *size)
    assert right > left
    assert bottom > top


def test_an_image_that_is_turned_by_its_notes_has_an_upright_mask(tmp_path, tiny):
    write_masks(tmp_path / "x", 12)
    image, mask = draw_mask(np.random.default_rng(5))
    notes = Image.Exif()
    notes[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    (tmp_path / "x" / "images" / "00.png").unlink()
    turned.save(tmp_path / "x" / "images" / "00.jpg", exif=notes, quality=95)
    mask.save(tmp_path / "x" / "masks" / "00.png")
    load_data(tmp_path / "x", tiny)
    mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x" / "masks" / "00.png")
    with pytest.raises(DataError, match="before it is put upright"):
        load_data(tmp_path / "x", tiny)


def test_where_sizes_do_not_tell_if_a_mask_is_upright_it_is_said(tmp_path, tiny):
    write_masks(tmp_path / "x", 12)
    assert "EXIF" not in load_data(tmp_path / "x", tiny).assumed
    image, _ = draw_mask(np.random.default_rng(5))
    notes = Image.Exif()
    notes[0x0112] = 3
    image.save(tmp_path / "x" / "images" / "00.png", exif=notes)
    for _ in range(2):  # The second is not checked again.
        assert "EXIF turns 1 image, such as 00.png" in load_data(tmp_path / "x", tiny).assumed


def test_a_mask_on_its_side_is_not_laid_to_notes_that_its_image_has_not(folder, tiny):
    Image.new("L", (HEIGHT, WIDTH)).save(folder / "masks" / "03.png")
    with pytest.raises(DataError, match="another size") as refused:
        load_data(folder, tiny)
    assert "upright" not in refused.value.found


def test_a_mirror_image_has_a_mirrored_mask(folder, tiny):
    plain, data = load_data(folder, tiny), load_data(folder, tiny, augment="flip")
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        image, mask = data.train[0]
        flipped = torch.equal(image, plain.train[0][0].flip(-1))
        seen.add(flipped)
        whole = plain.train[0][1]
        assert torch.equal(mask, whole.flip(-1) if flipped else whole)
    assert seen == {True, False}
    with pytest.raises(DataError, match="moves pixels and not the mask"):
        load_data(folder, tiny, augment="timm")


def test_stored_views_of_mirror_images_have_mirrored_masks(folder, tiny, tmp_path):
    data, host = load_data(folder, tiny), tiny.host()
    options = StoreOptions(root=tmp_path / "stores", views=2, progress=False)
    stored = open_or_build(host, tiny, data, Needs(("last",)), options)
    rows = stored.data(data, final=False).train
    _, masks = rows.gather([3, 3, 0], [0, 1, 1])
    assert torch.equal(masks[0], data.train[3][1])
    assert torch.equal(masks[1], data.train[3][1].flip(-1))
    assert torch.equal(masks[2], data.train[0][1].flip(-1))


PICTURES = {
    "palette": lambda m: _with_palette(Image.fromarray(m)),
    "palette of 4 bits": lambda m: _with_palette(Image.fromarray(m), bits=4),
    "grey": lambda m: Image.fromarray(m),
    "16 bits": lambda m: Image.fromarray(m.astype(np.uint16)),
}


def _with_palette(image, bits=8):
    image.putpalette([v for k in range(2**bits) for v in (k, 255 - k, 7)])
    return image


@pytest.mark.parametrize("kind", PICTURES)
def test_masks_are_read_by_their_numbers_whatever_their_colours(kind, tmp_path):
    numbers = np.random.default_rng(0).integers(0, 5, (7, 9)).astype(np.uint8)
    PICTURES[kind](numbers).save(tmp_path / "x.png", bits=4 if "4" in kind else 8)
    assert np.array_equal(np.array(read_mask(tmp_path / "x.png")), numbers)
    assert np.array_equal(np.array(read_mask((tmp_path / "x.png").read_bytes())), numbers)


def test_greys_of_few_bits_and_black_and_white_are_numbers_too(tmp_path):
    import struct
    import zlib

    def chunk(name, content):
        whole = name + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    # Four grey pixels of two bits each, 0 1 2 3: Pillow writes no such file.
    header = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    png += chunk(b"IDAT", zlib.compress(b"\0" + bytes([0b00011011]))) + chunk(b"IEND", b"")
    assert np.array(read_mask(png)).tolist() == [[0, 1, 2, 3]]
    stream = io.BytesIO()
    Image.fromarray(np.array([[True, False]])).save(stream, "PNG")
    assert np.array(read_mask(stream.getvalue())).tolist() == [[1, 0]]


def test_a_mask_that_changes_after_it_was_checked_is_refused_when_it_is_read(folder, tiny):
    data = load_data(folder, tiny)
    for mask in (folder / "masks").iterdir():
        Image.new("L", (WIDTH, HEIGHT), 7).save(mask)
    with pytest.raises(DataError, match="7 at row 0"):
        data.train[0]


def test_segmentation_of_a_folder_without_masks_is_refused(tmp_path, tiny):
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match="without images and masks"):
        load_data(tmp_path, tiny, problem="segmentation")
    (tmp_path / "images").mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "images").mkdir()
    with pytest.raises(DataError, match="images and masks are two folders"):
        load_data(tmp_path, tiny, problem="segmentation")


def test_corrupt_images_and_masks_without_images_are_left_out_by_name(folder, tiny):
    (folder / "images" / "02.png").write_bytes(b"nothing")
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "masks" / "more.png")
    with pytest.raises(DataError, match="cannot be read"):
        load_data(folder, tiny)
    data = load_data(folder, tiny, skip_bad=True)
    assert data.skipped == 1
    (folder / "masks" / "03.png").write_bytes(b"nothing")
    assert load_data(folder, tiny, skip_bad=True).skipped == 2
    assert "1 mask without an image (masks/more.png)" in data.describe()


def test_workers_read_masks_as_this_process_does(folder, tiny):
    from restuning.data.loader import Loader

    data = load_data(folder, tiny)
    here, there = (
        torch.cat([masks for _, masks in Loader(data.train, batch_size=4, num_workers=n)])
        for n in (0, 1)
    )
    assert torch.equal(here, there)
    assert isinstance(data.train, ImagesWithTargets)


def test_a_class_that_a_split_has_no_example_of_is_told_of(tmp_path, tiny):
    """Splits are drawn without a look at classes: of masks nearly every image has several."""
    write_masks(tmp_path / "shapes", 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_data(tmp_path / "shapes", tiny)
    for mask in data.test.targets:
        numbers = np.array(Image.open(mask))
        Image.fromarray(np.where(numbers == 2, 0, numbers).astype(np.uint8)).save(mask)
    with pytest.warns(RestuningWarning, match="(?s)no example of.*test: bar"):
        load_data(tmp_path / "shapes", tiny)


# From a folder to masks.


def test_a_task_answers_with_masks_in_the_size_of_each_image(trained, tmp_path):
    place, run = trained
    assert run.metric == "mean_iou"
    assert run.metrics["test"].keys() == {"mean_iou", "pixel_accuracy", "mean_accuracy"}
    assert run.metrics["test"]["pixel_accuracy"] > 0.8
    predictor = restuning.Predictor.load(run.folder)
    small, _ = draw_mask(np.random.default_rng(7))
    large = small.resize((200, 90))
    answers = predictor([small, large])
    assert [answer.mask.shape for answer in answers] == [(HEIGHT, WIDTH), (90, 200)]
    assert sum(share.share for share in answers[0].shares) == pytest.approx(1.0)
    assert answers[0].label.startswith(answers[0].shares[0].label)
    with pytest.raises(WrongTaskError, match="no task here answers with labels"):
        _ = answers[0].probability
    assert np.array_equal(from_png(to_png(answers[1][predictor_name(predictor)])), answers[1].mask)


def predictor_name(predictor):
    (name,) = predictor.tasks
    return name


def test_the_command_leaves_masks_and_overlays(trained, tmp_path):
    place, run = trained
    (tmp_path / "new").mkdir()
    image, _ = draw_mask(np.random.default_rng(8))
    image.save(tmp_path / "new" / "a.png")
    image.resize((64, 32)).save(tmp_path / "new" / "b.jpg")
    ask = ("predict", tmp_path / "new", "--task", run.task_folder)
    said = run_command(*ask, "--out", tmp_path / "masks")
    assert said.returncode == 0, said.stderr
    assert "ground" in said.stdout
    left = {file.name: Image.open(file) for file in (tmp_path / "masks").iterdir()}
    assert {name: file.size for name, file in left.items()} == {
        "a.png": (WIDTH, HEIGHT),
        "a-overlay.jpg": (WIDTH, HEIGHT),
        "b.png": (64, 32),
        "b-overlay.jpg": (64, 32),
    }
    assert left["a.png"].mode == "P"
    assert set(np.unique(np.array(left["a.png"]))) <= {0, 1, 2}
    before = (tmp_path / "new" / "a.png").read_bytes()
    refused = run_command(*ask, "--out", tmp_path / "new")
    assert refused.returncode != 0
    assert "among the images" in refused.stderr
    assert (tmp_path / "new" / "a.png").read_bytes() == before
    image.save(tmp_path / "new" / "a.jpg")
    assert "under one name" in run_command(*ask, "--out", tmp_path / "masks").stderr
    (tmp_path / "new" / "a.jpg").unlink()
    # A mask that was drawn by hand has no overlay, and stays.
    (tmp_path / "masks" / "b-overlay.jpg").unlink()
    refused = run_command(*ask, "--out", tmp_path / "masks")
    assert "written over" in refused.stderr
    assert "b.png" in refused.stderr
    assert run_command(*ask, "--out", tmp_path / "table.csv").returncode == 0
    head, first, _ = (tmp_path / "table.csv").read_text().splitlines()
    assert head == "image,answer,share of ground,share of disc,share of bar"
    assert sum(map(float, first.split(",")[-3:])) == pytest.approx(1.0)
    tested = run_command("eval", run.task_folder, place / "shapes", "--json")
    assert f"{run.metrics['test']['mean_iou']:.6f}"[:6] in tested.stdout


def test_a_test_of_masks_leaves_figures_by_class_and_by_image_and_a_page(trained, tmp_path):
    place, run = trained
    asked = ("eval", run.task_folder, place / "shapes", "--out", tmp_path)
    tested = run_command(*asked)
    assert tested.returncode == 0, tested.stderr
    with (tmp_path / "outputs.csv").open(newline="") as file:
        each = {row["name"]: row for row in csv.DictReader(file)}
    assert list(each) == list(CLASSES)
    assert list(each["disc"]) == ["name", "pixels", "IoU", "pixel accuracy"]
    ious = [float(row["IoU"]) for row in each.values()]
    assert np.mean(ious) == pytest.approx(run.metrics["test"]["mean_iou"], abs=1e-4)
    assert f"{100 * ious[1]:.1f}%" in tested.stdout
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert rows[0]["input"].endswith(".png")
    assert 0 < float(rows[0]["IoU of bar"]) <= 1
    page = (tmp_path / "report.html").read_text()
    assert "--out answers/" in page
    assert "answers.csv" not in page
    assert page.count('alt="true: ') == page.count('alt="answered: ') == 4
    assert 'aria-label="Confusion matrix"' in page
    # As does a run.
    assert "--out answers/" in (run.folder / "report.html").read_text()


def test_a_run_from_stores_is_that_from_images(trained):
    """And goes on, where it ended, with nothing to do."""
    place, run = trained
    again = restuning.train(
        place / "shapes", method="ridge", out=place / "run", store=place / "stores", progress=False
    )
    live = restuning.train(
        place / "shapes", method="ridge", out=place / "live", store=False, progress=False
    )
    for other in (again, live):
        for name, tensor in run.task.state_dict().items():
            torch.testing.assert_close(other.task.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)


def test_masks_and_stores_are_of_the_size_that_a_backbone_runs_at(folder, tmp_path):
    named = {"backbone": "timm:test_vit@96", "random": True, "method": "ridge", "progress": False}
    stored, live = (
        restuning.train(folder, out=tmp_path / place, store=store, **named)
        for place, store in (("stored", tmp_path / "stores"), ("live", False))
    )
    for name, tensor in stored.task.state_dict().items():
        torch.testing.assert_close(live.task.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)
    told = json.loads((stored.task_folder / "task.json").read_text())
    assert told["preprocessing"]["size"] == [96, 96]
    logits = Tuned(restuning.load_backbone("timm:test_vit@96", random=True).host(), stored.task)
    assert logits(torch.zeros(1, 3, 96, 96)).shape == (1, 24, 24, 3)
    with pytest.raises(UnknownNameError, match="(?s)@96x64.*square"):
        restuning.load_backbone("timm:test_vit@96x64", random=True)


def test_what_answers_once_an_image_is_refused_with_those_that_do_not(trained):
    place, _ = trained
    with pytest.raises(NoSitesError, match="(?s)answers once an input.*ensemble, mixing-bypass"):
        restuning.train(place / "shapes", method="knn", out=place / "no", progress=False)


def test_an_ensemble_goes_through_the_backbone_once(tmp_path):
    for seed, (name, count) in enumerate((("train", 24), ("val", 6), ("test", 6))):
        write_masks(tmp_path / "shapes" / name, count, seed, classes=())
    (tmp_path / "shapes" / "classes.txt").write_text("\n".join(CLASSES))
    backbone = restuning.load_backbone("restuning-tiny")
    forwards = []
    backbone.model.register_forward_hook(lambda _, args, __: forwards.append(len(args[0])))
    run = restuning.train(
        tmp_path / "shapes",
        backbone=backbone,
        method="ensemble",
        epochs=2,
        out=tmp_path / "run",
        store=tmp_path / "stores",
        class_weights="balanced",
        progress=False,
    )
    # Few at a time are those by which sites and rounding are proved.
    assert sum(n for n in forwards if n > 4) == 36
    assert run.metrics["test"]["mean_iou"] > 0.4
    assert sorted(p.name for p in (tmp_path / "run").glob("*.task")) == ["shapes.task"]


@pytest.mark.slow
def test_a_choice_tries_an_ensemble_on_masks(trained, tmp_path):
    place, _ = trained
    chosen = restuning.train(
        place / "shapes",
        method="auto",
        epochs=1,
        out=tmp_path / "choice",
        store=place / "stores",
        progress=False,
    )
    tried = {row["method"]: row["status"] for row in chosen.choice.rows}
    assert tried["ensemble"] == tried["ridge"] == tried["linear"] == "tried"


def test_a_crop_leaves_an_edge_without_an_answer(trained):
    place, run = trained
    predictor = restuning.Predictor.load(run.folder)
    inputs = predictor.inputs
    inputs.preprocessing = replace(inputs.preprocessing, squash=False)
    image = draw_mask(np.random.default_rng(9))[0]
    mask = predictor(image)[0].mask
    assert mask.shape == (HEIGHT, WIDTH)
    assert (mask[:, :5] == 255).all()
    assert (mask[:, 5:35] != 255).all()
    assert (mask[:, 35:] == 255).all()


def test_settings_are_swept_over_masks(trained, tmp_path):
    place, run = trained
    grid = (
        "sweep",
        place / "shapes",
        "--method",
        "linear",
        "--grid",
        "lr=0.005,0.02",
        "--seeds",
        1,
    )
    more = ("--epochs", 1, "--store", place / "stores", "--out", tmp_path / "sweep")
    said = run_command(*grid, *more)
    assert said.returncode == 0, said.stderr
    assert "val mean iou" in said.stdout
    refused = run_command("update", run.task_folder, place / "shapes")
    assert "problem segmentation" in refused.stderr


def test_a_picture_says_255_where_there_is_no_answer_whatever_the_problem_says():
    answer = MaskAnswer(CLASSES, ignore=-1, drawn=torch.tensor([[0, -1], [2, 1]]))
    assert from_png(to_png(answer)).tolist() == [[0, 255], [2, 1]]
    assert len(answer.shares) == 3
    many = MaskAnswer([str(n) for n in range(256)], ignore=-1, drawn=torch.tensor([[255]]))
    with pytest.raises(WrongTaskError, match="no picture with a palette"):
        to_png(many)


def test_no_class_has_the_number_of_pixels_without_one():
    Segmentation().check_outputs(255)
    Segmentation(-1).check_outputs(300)
    for ignore, outputs in ((255, 256), (0, 3)):
        with pytest.raises(FormatError, match="is the number of one"):
            Segmentation(ignore).check_outputs(outputs)

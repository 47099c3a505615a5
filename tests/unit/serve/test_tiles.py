"""Images in windows: where these lie, how answers are blended, and that memory has a bound."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

import restuning
from commands import restuning as run_command
from restuning import Predictor
from restuning._errors import DataError
from restuning.backbones import Preprocessing
from restuning.problems import Depth, MaskAnswer, Segmentation, SingleLabel
from restuning.problems.answers import Window, blend, join_windows
from restuning.serve.tiles import Tiles

SIDE = 24
"""Of training images."""
SAME_TOLERANCE = 1e-4
"""Batches of other sizes round elsewhere."""
MOST_STEP = 0.2
"""Of an answer from pixel to pixel, in what it changes by inside of one window: a seam would be a step of its own."""


def make(window, tasks=("a",), others=False):
    return Tiles(window, frozenset(tasks), others)


@pytest.mark.parametrize("side", [1, 2, 3, 16, 224])
@pytest.mark.parametrize("pixels", [1, 2, 16, 17, 223, 225, 500, 1000])
def test_windows_cover_all_and_overlap_by_a_fourth(side, pixels):
    boxes = make((side, side)).place((pixels, 1))
    spans = [(top, bottom) for _, top, _, bottom in boxes]
    assert spans[0][0] == 0
    assert spans[-1][1] == pixels
    assert all(bottom - top == min(side, pixels) for top, bottom in spans)
    for (_, end), (begin, _) in zip(spans, spans[1:], strict=False):
        # Of a window of one pixel nothing can be shared.
        assert end - begin >= (math.ceil(side / 4) if side > 1 else 0)
    if pixels <= side:
        assert len(boxes) == 1


def test_who_answers_no_pixels_sees_the_whole_once():
    assert make((10, 10), others=True).place((10, 8)) == [(0, 0, 8, 10)]
    boxes = make((10, 10), others=True).place((25, 8))
    assert boxes[0] == (0, 0, 8, 25)
    assert boxes[1:] == make((10, 10)).place((25, 8))


WHOLE = Preprocessing((32, 32)).whole()


def test_the_size_of_a_window_is_that_of_training_or_is_said():
    known, other = Segmentation(window=(30, 40)), Depth(1.0, 1.0, window=(50, 60))
    assert Tiles.of({"a": known, "b": SingleLabel()}, True, WHOLE) == make((30, 40), others=True)
    assert Tiles.of({"a": known, "b": other}, 64, WHOLE) == make((64, 64), ("a", "b"))
    for problems, said, preprocessing, wrong in (
        ({"a": known, "b": other}, True, WHOLE, "how large is a window"),
        ({"a": Segmentation()}, True, WHOLE, "how large is a window"),
        ({"a": SingleLabel()}, True, WHOLE, "tasks that answer its pixels"),
        ({"a": known}, 0, WHOLE, "without pixels"),
        ({"a": known}, True, Preprocessing((32, 32), crop=0.9), "crops its images"),
    ):
        with pytest.raises(DataError, match=wrong):
            Tiles.of(problems, said, preprocessing)


def test_windows_that_say_the_same_of_every_pixel_leave_no_trace(monkeypatch):
    """Of a plane, which bilinear interpolation keeps away from edges, and of a constant everywhere."""
    monkeypatch.setattr("restuning.problems.answers.NUMBERS_AT_ONCE", 60 * 3 * 7)
    size, tiles = (50, 60), make((20, 30))
    constant = torch.tensor([1.0, -2.0, 0.5]).expand(4, 6, 3)
    windows = [Window(constant, box) for box in tiles.place(size)]
    rows = [drawn for _, drawn, there in blend(windows, size) if there.all()]
    drawn = torch.cat(rows)
    assert drawn.shape == (*size, 3)
    torch.testing.assert_close(drawn, constant[0, 0].expand(*size, 3))
    middles = torch.tensor([2.5, 7.5, 12.5, 17.5])
    planes = [
        Window((top + middles).view(4, 1, 1).expand(4, 6, 1), (left, top, right, bottom))
        for left, top, right, bottom in tiles.place(size)
    ]
    plane = torch.cat([drawn for _, drawn, _ in blend(planes, size)])[..., 0]
    steps = plane[:, 0].diff()[3:-3]
    assert ((steps > 1 - MOST_STEP) & (steps < 1 + MOST_STEP)).all()
    # It hangs on no column.
    torch.testing.assert_close(plane, plane[:, :1].expand(*size))


def test_one_window_is_the_answer_itself():
    answer = MaskAnswer(["a", "b"], logits=torch.randn(2, 2, 2), size=(5, 6), seen=(0, 0, 6, 5))
    assert join_windows([answer], [(0, 0)], (5, 6)) is answer


# From images to answers.


def draw(rng, height, width):
    mask = np.zeros((height, width), np.uint8)
    for _ in range(max(1, height * width // SIDE**2)):
        y, x = rng.integers(0, height - 8), rng.integers(0, width - 8)
        mask[y : y + 8, x : x + 8] = 1
    image = np.array([[40, 90, 40], [200, 60, 60]])[mask] + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), mask


def write(folder, count, height, width, seed=0):
    rng = np.random.default_rng(seed)
    for name in ("images", "masks", "depth"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        image, mask = draw(rng, height, width)
        image.save(folder / "images" / f"{number:02}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:02}.png")
        np.save(folder / "depth" / f"{number:02}.npy", 5.0 - 3 * mask)
    (folder / "classes.txt").write_text("ground\nbox\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiles")
    write(place / "small", 24, SIDE, SIDE)
    for kind in ("segmentation", "depth"):
        restuning.train(
            place / "small",
            problem=kind,
            method="ridge",
            out=place / kind,
            store=place / "stores",
            progress=False,
        )
    return place


def load(trained, **more):
    tasks = {"mask": trained / "segmentation", "far": trained / "depth"}
    return Predictor.load(tasks, tiles=True, **more)


def test_an_image_no_larger_than_a_window_is_answered_as_ever(trained):
    predictor = load(trained)
    plain = Predictor.load({"mask": trained / "segmentation", "far": trained / "depth"})
    rng = np.random.default_rng(5)
    images = [draw(rng, SIDE, SIDE)[0], draw(rng, 12, 20)[0]]
    for one, other in zip(predictor(images), plain(images), strict=True):
        torch.testing.assert_close(
            one["far"].depth, other["far"].depth, rtol=0, atol=SAME_TOLERANCE
        )
        assert torch.equal(one["mask"].mask, other["mask"].mask)


def test_a_window_answers_as_its_part_of_the_image_alone_does(trained):
    """Translation: in the middle of a window that no other lies over, what it alone would say."""
    predictor = load(trained)
    image, _ = draw(np.random.default_rng(6), SIDE, 100)
    whole = predictor(image)[0]["far"].depth
    boxes = make((SIDE, SIDE)).place((SIDE, 100))
    plain = Predictor.load(trained / "depth")
    for number, (left, top, right, bottom) in enumerate(boxes):
        own = plain(image.crop((left, top, right, bottom)))[0].depth
        # Of this window alone: from the end of the one before to the beginning of the next.
        begin = boxes[number - 1][2] if number else 0
        end = boxes[number + 1][0] if number + 1 < len(boxes) else 100
        assert end > begin
        torch.testing.assert_close(
            whole[:, begin:end], own[:, begin - left : end - left], rtol=0, atol=SAME_TOLERANCE
        )


def test_large_images_are_answered_better_than_squeezed_and_in_their_size(trained):
    image, mask = draw(np.random.default_rng(7), 120, 100)
    truth = torch.from_numpy(mask)
    right = []
    for predictor in (load(trained), Predictor.load({"mask": trained / "segmentation"})):
        found = predictor(image)[0]["mask"].mask
        assert found.shape == (120, 100)
        right.append(float((found == truth).float().mean()))
    assert right[0] > right[1]
    assert right[0] > 0.93


def test_a_constant_image_has_no_seams(trained):
    grey = Image.new("RGB", (4 * SIDE, 3 * SIDE), (90, 90, 90))
    one = Predictor.load(trained / "depth")(grey.crop((0, 0, SIDE, SIDE)))[0].depth
    whole = load(trained)(grey)[0]["far"].depth
    inside = max(float(one.diff(dim=d).abs().max()) for d in (0, 1))
    across = max(float(whole.diff(dim=d).abs().max()) for d in (0, 1))
    assert across <= inside * (1 + MOST_STEP)
    assert float(whole.min()) >= float(one.min()) - SAME_TOLERANCE
    assert float(whole.max()) <= float(one.max()) + SAME_TOLERANCE


def test_no_more_windows_than_a_batch_are_held_and_images_share_batches(trained):
    predictor = load(trained, batch_size=4)
    seen = []
    hook = predictor.backbone.model.register_forward_hook(
        lambda _, args, __: seen.append(len(args[0]))
    )
    rng = np.random.default_rng(8)
    images = (draw(rng, height, SIDE)[0] for height in (SIDE, 100, SIDE, SIDE))
    answers = list(predictor.stream(images))
    hook.remove()
    windows = len(make((SIDE, SIDE)).place((100, SIDE)))
    assert [len(a["mask"].mask) for a in answers] == [SIDE, 100, SIDE, SIDE]
    assert max(seen) == 4
    assert sum(seen) == windows + 3
    # And an iterator is read no further than that.
    read = []

    def endless():
        while True:
            read.append(1)
            yield Image.new("RGB", (SIDE, SIDE))

    next(predictor.stream(endless()))
    assert len(read) == 4


def test_files_that_cannot_be_read_are_left_out_and_prepared_tensors_refused(trained, tmp_path):
    predictor = load(trained, skip_bad=True)
    (tmp_path / "x.png").write_bytes(b"nothing")
    draw(np.random.default_rng(0), 60, 60)[0].save(tmp_path / "y.png")
    (answer,) = predictor(tmp_path)
    assert answer.input.endswith("y.png")
    assert [name.rpartition("/")[2] for name in predictor.skipped] == ["x.png"]
    with pytest.raises(DataError, match="no image in its own size"):
        predictor(torch.zeros(3, 32, 32))
    pixels = torch.zeros(3, 50, 40, dtype=torch.uint8)
    assert predictor(pixels)[0]["mask"].mask.shape == (50, 40)
    assert predictor.exchange({"mask": predictor.tasks["mask"]}).tiles == make(
        (SIDE, SIDE), ("mask",)
    )


def test_the_commands_answer_and_test_in_windows(trained, tmp_path):
    write(tmp_path / "large" / "train", 2, 70, 90, seed=3)
    write(tmp_path / "large" / "test", 3, 70, 90, seed=4)
    (tmp_path / "large" / "classes.txt").write_text("ground\nbox\n")
    left = tmp_path / "left"
    said = run_command(
        *("predict", tmp_path / "large" / "test" / "images", "--task", trained / "segmentation"),
        *("--tiles", "--out", left),
    )
    assert said.returncode == 0, said.stderr
    found = np.array(Image.open(left / "01.png"))
    truth = np.array(Image.open(tmp_path / "large" / "test" / "masks" / "01.png"))
    assert (found == truth).mean() > 0.93
    ask = (
        "eval",
        trained / "segmentation",
        tmp_path / "large",
        "--problem",
        "segmentation",
        "--json",
    )
    import json

    whole, tiles, said = (
        json.loads(run_command(*ask, *more).stdout)
        for more in ((), ("--tiles",), ("--tiles", "--window", "48"))
    )
    assert tiles["mean_iou"] > whole["mean_iou"]
    assert (tiles["window"], said["window"]) == (f"{SIDE} x {SIDE}", "48 x 48")
    alike = [
        float((np.array(Image.open(left / f"{n:02}.png")) == np.array(Image.open(file))).mean())
        for n, file in enumerate(sorted((tmp_path / "large" / "test" / "masks").iterdir()))
    ]
    assert tiles["pixel_accuracy"] == pytest.approx(np.mean(alike), abs=1e-5)
    left = run_command(*ask, "--tiles", "--out", tmp_path / "judged")
    assert left.returncode == 0, left.stderr
    assert json.loads(left.stdout) == json.loads((tmp_path / "judged" / "eval.json").read_text())
    assert json.loads(left.stdout) == tiles
    # What is left of windows is what is left of whole images.
    plain = run_command(*ask, "--out", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    assert {f.name for f in (tmp_path / "judged").iterdir()} == {
        *("report.html", "eval.json", "predictions.csv", "outputs.csv")
    }
    for name in ("predictions.csv", "outputs.csv"):
        one, other = ((tmp_path / of / name).read_text().splitlines() for of in ("judged", "plain"))
        assert one[0] == other[0] and len(one) == len(other)
    rows = list(csv.DictReader((tmp_path / "judged" / "predictions.csv").open(newline="")))
    assert [float(row["pixel accuracy"]) for row in rows] == pytest.approx(alike)
    assert tiles["loss"] == pytest.approx(np.mean([float(row["loss"]) for row in rows]))
    page = (tmp_path / "judged" / "report.html").read_text()
    assert f"{SIDE} x {SIDE}" in page and "--tiles" in page and "tiles=True" in page
    assert "--tiles" not in (tmp_path / "plain" / "report.html").read_text()
    refused = run_command("eval", trained / "depth", tmp_path / "large", "--window", "9")
    assert "give --tiles as well" in refused.stderr
    depth = run_command(
        *("eval", trained / "depth", tmp_path / "large", "--problem", "depth", "--tiles", "--json"),
        *("--out", tmp_path / "deep"),
    )
    assert json.loads(depth.stdout)["r2"] > 0.5
    assert (tmp_path / "deep" / "report.html").exists()

"""Folders of images and depth maps: how they are read, and every way in which they may be wrong."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import restuning
from commands import restuning as run_command
from pixels import HEIGHT, STEP, WIDTH, draw_depth, write_depths
from restuning._errors import DataError
from restuning.backbones.images import read_depth
from restuning.data import load_data
from restuning.problems import Depth, DepthAnswer
from restuning.serve.depths import (
    BAR,
    LINE,
    SHADES,
    STEPS,
    pack,
    to_image,
    unpack,
    with_scale,
)


@pytest.fixture
def folder(tmp_path):
    return write_depths(tmp_path / "room")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("depths")
    write_depths(place / "room", 24)
    run = restuning.train(
        place / "room", method="ridge", out=place / "run", store=place / "stores", progress=False
    )
    return place, run


def test_a_folder_of_images_and_depth_maps_is_a_depth_scaled_by_what_is_trained_on(folder, tiny):
    data = load_data(folder, tiny)
    assert isinstance(data.problem, Depth)
    assert data.labels == ["depth"]
    assert data.problem.window == (HEIGHT, WIDTH)
    image, depth = data.train[0]
    assert image.shape == (3, 32, 32)
    assert (depth.shape, depth.dtype) == ((32, 32), torch.float32)
    own = [np.load(data.train.targets[n]).astype(np.float64) for n in range(len(data.train))]
    assert data.problem.mean == pytest.approx(np.mean(own))
    assert data.problem.deviation == pytest.approx(np.std(own))
    assert "resized whole" in data.assumed
    final = load_data(folder, tiny, final=True).problem
    assert final.mean != data.problem.mean


def test_png_and_arrays_say_the_same_in_their_units(tmp_path, tiny):
    one = load_data(write_depths(tmp_path / "a"), tiny)
    other = load_data(write_depths(tmp_path / "b", ending=".png"), tiny)
    torch.testing.assert_close(
        other.train[2][1] / STEP, one.train[2][1], rtol=0, atol=0.5 / STEP + 1e-6
    )
    assert other.problem.mean / STEP == pytest.approx(one.problem.mean, abs=1 / STEP)


def test_what_is_unknown_stays_so_at_any_size(folder, tiny):
    before = load_data(folder, tiny).problem
    for file in (folder / "depth").iterdir():
        depth = np.load(file)
        depth[:, :20] = np.nan
        depth[:10] = 0
        np.save(file, depth)
    data = load_data(folder, tiny)
    depth = data.train[0][1]
    # Half of the columns and a third of the rows.
    assert (depth[:, :16] == 0).all()
    assert (depth[11:, 16:] > 0).all()
    assert data.problem != before
    assert data.problem.mean > 1


def test_numbers_are_read_from_paths_bytes_and_arrays():
    depth = np.array([[1.5, np.nan], [0.0, 70.0]], np.float32)
    stream = io.BytesIO()
    np.save(stream, depth)
    wanted = [[1.5, 0.0], [0.0, 70.0]]
    assert np.asarray(read_depth(stream.getvalue())).tolist() == wanted
    assert np.asarray(read_depth(depth)).tolist() == wanted
    stream = io.BytesIO()
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(stream, "PNG")
    assert np.asarray(read_depth(stream.getvalue())).tolist() == [[0.0, 65535.0]]

    def read_tiff(image, **told):
        stream = io.BytesIO()
        image.save(stream, "TIFF", **told)
        return np.asarray(read_depth(stream.getvalue())).tolist()

    numbers = Image.fromarray(depth)
    assert read_tiff(numbers) == wanted
    assert read_tiff(Image.fromarray(np.array([[0, 65535]], np.uint16))) == [[0.0, 65535.0]]
    grey = Image.new("L", (2, 2))
    several = {"save_all": True, "append_images": [numbers]}
    for image, told in ((numbers, several), (numbers, {"tiffinfo": {262: 0}}), (grey, {})):
        with pytest.raises(DataError, match="a TIFF of numbers"):
            read_tiff(image, **told)


@pytest.mark.parametrize("side", [10**5, 10**7, 2**40])
def test_an_array_whose_header_says_more_than_there_is_cannot_be_read(side, tmp_path):
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (side, side)}
    np.lib.format.write_array_header_1_0(stream, header)
    file = tmp_path / "x.npy"
    file.write_bytes(stream.getvalue())
    for source in (stream.getvalue(), file):
        with pytest.raises(DataError, match="cannot be read"):
            read_depth(source)


def test_of_masks_and_depths_the_one_that_is_asked_for_is_read(folder, tiny):
    (folder / "masks").mkdir()
    assert isinstance(load_data(folder, tiny, problem="depth").problem, Depth)
    with pytest.raises(DataError, match="an image has no mask"):
        load_data(folder, tiny, problem="segmentation")


def test_a_header_that_python_itself_fails_to_parse_beside_other_threads_is_read_again(
    folder, monkeypatch
):
    file = sorted((folder / "depth").iterdir())[0]
    wanted, real, failed = np.array(read_depth(file)), np.load, []

    def fail_twice(source, **how):
        if len(failed) < 2:
            failed.append(source)
            if hasattr(source, "read"):
                source.read(20)
            raise SystemError("AST constructor recursion depth mismatch")
        return real(source, **how)

    monkeypatch.setattr(np, "load", fail_twice)
    for source in (file, file.read_bytes()):
        failed.clear()
        np.testing.assert_array_equal(np.array(read_depth(source)), wanted)
        assert len(failed) == 2


def test_arrays_without_an_image_and_corrupt_ones_are_left_out_by_name(folder, tiny):
    np.save(folder / "depth" / "more.npy", np.ones((2, 2)))
    file = folder / "depth" / "03.npy"
    file.write_bytes(file.read_bytes()[:200])
    data = load_data(folder, tiny, skip_bad=True)
    assert data.skipped == 1
    assert "1 depth map without an image (depth/more.npy)" in data.describe()


def test_names_of_classes_are_refused_where_there_are_no_masks(folder, tiny):
    with pytest.raises(DataError, match="there are none"):
        load_data(folder, tiny, classes=["a", "b"])


def test_a_task_answers_in_units_in_the_size_of_each_image_with_its_error(trained):
    place, run = trained
    assert run.metric == "r2"
    assert run.metrics["test"].keys() == {"r2", "rmse", "mae", "abs_rel", "delta_1"}
    assert run.metrics["test"]["r2"] > 0.5
    predictor = restuning.Predictor.load(run.folder)
    image, truth = draw_depth(np.random.default_rng(7))
    answers = predictor([image, image.resize((100, 60))])
    assert [answer.depth.shape for answer in answers] == [(HEIGHT, WIDTH), (60, 100)]
    off = (answers[0].depth.numpy() - truth).astype(np.float64)
    assert 0.2 < np.sqrt((off**2).mean()) / next(iter(answers[0].predictions.values())).error < 3
    assert "median" in answers[0].label
    assert restuning.Predictor.load(run.folder).tasks


@pytest.mark.parametrize("method", ["linear", "res-tuning", "res-tuning-bypass", "mixing-bypass"])
def test_every_method_that_answers_at_places_trains_depths(method, trained, tmp_path):
    place, _ = trained
    run = restuning.train(
        place / "room",
        method=method,
        epochs=2,
        out=tmp_path / "run",
        store=place / "stores",
        progress=False,
    )
    assert run.metrics["test"]["rmse"] < 3
    assert run.metrics["temperature"] == 1.0


def test_the_command_leaves_arrays_and_pictures_with_their_scale(trained, tmp_path):
    place, run = trained
    (tmp_path / "new").mkdir()
    image, _ = draw_depth(np.random.default_rng(8))
    image.resize((120, 60)).save(tmp_path / "new" / "a.png")
    ask = ("predict", tmp_path / "new", "--task", run.task_folder)
    said = run_command(*ask, "--out", tmp_path / "left")
    assert said.returncode == 0, said.stderr
    assert "depths in" in said.stdout
    depth = np.load(tmp_path / "left" / "a.npy")
    assert (depth.shape, depth.dtype) == ((60, 120), np.float32)
    assert Image.open(tmp_path / "left" / "a-depth.png").size == (120, 60 + BAR + LINE)
    # An array of somebody's own has no picture beside it, and stays.
    (tmp_path / "left" / "a-depth.png").unlink()
    assert "written over" in run_command(*ask, "--out", tmp_path / "left").stderr
    assert run_command(*ask, "--out", tmp_path / "table.csv").returncode == 0
    head, row = (tmp_path / "table.csv").read_text().splitlines()
    assert head == "image,answer,least,median,most,error"
    assert float(row.split(",")[-4]) == pytest.approx(float(depth.min()), rel=1e-5)
    tested = run_command("eval", run.task_folder, place / "room", "--json")
    assert f"{run.metrics['test']['rmse']:.6f}"[:6] in tested.stdout


def test_pictures_say_where_numbers_are_least_and_where_there_is_no_answer():
    numbers = torch.linspace(2, 10, 60).reshape(6, 10)
    numbers[5, 9] = torch.nan
    answer = DepthAnswer(drawn=numbers)
    shades = np.asarray(to_image(answer))
    assert (shades[0, 0], shades[5, 8], shades[5, 9]) == (0, SHADES - 1, SHADES)
    # Bright is far: of every perceptual map grey grows with the number.
    grey = np.asarray(to_image(answer).convert("RGB").convert("L")).ravel()[:59].astype(int)
    assert (np.diff(grey) >= 0).all()
    back = unpack(pack(answer))
    torch.testing.assert_close(back, numbers, rtol=0, atol=8 / STEPS, equal_nan=True)
    flat = DepthAnswer(drawn=torch.full((2, 2), 3.0))
    assert torch.equal(unpack(pack(flat)), flat.depth)
    none = DepthAnswer(drawn=torch.full((2, 2), torch.nan))
    assert unpack(pack(none)).isnan().all()
    assert (np.asarray(to_image(none)) == SHADES).all()
    assert with_scale(none).size == (2, 2 + BAR + LINE)

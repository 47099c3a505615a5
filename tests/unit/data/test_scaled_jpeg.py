"""JPEG files that are decoded scaled: what of them is the same as whole, and who knows of it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import restuning
from pixels import write_masks
from restuning import load_data
from restuning._errors import DataError
from restuning.backbones import images
from restuning.backbones.images import measure, read_image, scaled_from
from restuning.backbones.preprocessing import Preprocessing
from restuning.data.digests import digest_value
from restuning.features import StoreOptions, build_store
from restuning.serve.inputs import ImageInputs

PLAIN = Preprocessing((32, 32), crop=0.9)
SCALED = Preprocessing((32, 32), crop=0.9, scaled_jpeg=True)
CLOSE = 0.02
"""Mean difference of values in -1..1 of a smooth picture: two averages of the same pixels, rounded once more."""


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, form="JPEG", **how):
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def share(length, times):
    """Of each pixel of a side that is decoded scaled, how much of it the whole fills."""
    return np.minimum(length / times - np.arange(-(-length // times)), 1).astype(np.float32)


def prepare(content, how=SCALED):
    return how.image(read_image(content, least=how.least))


@pytest.mark.parametrize("form", ["large enough", "a PNG", "held by Pillow", "an array"])
def test_what_is_small_or_no_jpeg_file_is_the_same_bit_for_bit(form):
    # 35 pixels are what is resized to: what is not twice as much even at half its sides is decoded whole.
    image = picture(300, 139 if form == "large enough" else 260)
    content = encoded(image, "PNG" if form == "a PNG" else "JPEG")
    given = {
        "held by Pillow": lambda: Image.open(io.BytesIO(content)),
        "an array": lambda: np.array(image),
    }
    make = given.get(form, lambda: content)
    assert torch.equal(prepare(make()), prepare(make(), PLAIN))
    read = read_image(make(), least=SCALED.least)
    assert scaled_from(read).size == read.size == (300, image.height)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(601, 307), (1021, 590), (307, 601)])
def test_the_size_of_the_whole_is_told_and_its_edges_lie_where_they_do(size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(*size), exif=exif, quality=95)
    read = read_image(content, least=SCALED.least)
    whole = read_image(content)
    scaled = scaled_from(read)
    assert scaled.size == whole.size == measure(content).size
    assert max(read.size) < max(whole.size) / 1.9
    assert min(a // b for a, b in zip(read.size, SCALED.least(*whole.size), strict=True)) >= 1
    # Left, top, right and bottom: how much of the outermost pixels the whole covers, turned as the pixels are.
    times = round(max(size) / max(read.size))
    cover = Image.fromarray(np.outer(*(share(n, times) for n in size[::-1])))
    if orientation > 1:
        cover = cover.transpose(images._TRANSPOSED[orientation])
    covered = np.asarray(cover)
    left, top, right, bottom = scaled.box
    wide, high = read.size
    ends = 1 - left, 1 - top, 1 - (wide - right), 1 - (high - bottom)
    assert ends == pytest.approx((covered[5, 0], covered[0, 5], covered[5, -1], covered[-1, 5]))
    # Resized to one size both show the same: of what lies beyond the last block nothing is seen.
    both = [
        i.resize((36, 36), Image.Resampling.BICUBIC, b)
        for i, b in ((read, scaled.box), (whole, None))
    ]
    values = [np.asarray(each, np.float32) / 127.5 for each in both]
    assert np.abs(values[0] - values[1]).mean() < CLOSE
    assert (prepare(content) - prepare(content, PLAIN)).abs().mean() < CLOSE
    # Answers are given in the size of the image.
    places = [ImageInputs(how).batch([content]).places for how in (SCALED, PLAIN)]
    assert places[0] == places[1]


def test_files_and_digests_of_whole_decoding_say_nothing_of_it():
    assert "scaled_jpeg" not in PLAIN.to_dict()
    assert Preprocessing.from_dict(PLAIN.to_dict()) == PLAIN
    assert Preprocessing.from_dict(SCALED.to_dict()) == SCALED
    assert digest_value(PLAIN.image) != digest_value(SCALED.image)
    assert SCALED.whole().scaled_jpeg


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for name in ("one", "two"):
        (root / name).mkdir()
        for number in range(10):
            image = picture(400, 300, seed=number + 100 * (name == "two"))
            (root / name / f"{number}.jpg").write_bytes(encoded(image))
    return root


def test_a_store_of_whole_decoding_is_not_taken_for_one_of_scaled(photos, tmp_path):
    options = StoreOptions(tmp_path, progress=False)
    made = [
        build_store(
            photos,
            "restuning-tiny",
            tokens="cls",
            options=options,
            reading=restuning.data.DataOptions(scaled_jpeg=s),
        )
        for s in (False, True, True)
    ]
    paths = [each.store.path for each in made]
    assert paths[0] != paths[1] == paths[2]
    assert [each.store.key.preprocessing.get("scaled_jpeg") for each in made] == [None, True, True]
    rows = [each.store.rows("train", 0, range(4)) for each in made[:2]]
    assert any(not torch.equal(whole, scaled) for whole, scaled in zip(*rows, strict=True))


def test_a_saved_task_reads_as_it_was_trained(photos, tmp_path):
    restuning.train(
        str(photos),
        backbone="restuning-tiny",
        method="ridge",
        scaled_jpeg=True,
        out=tmp_path / "run",
        store=False,
        report=False,
    )
    predictor = restuning.Predictor.load(tmp_path / "run")
    assert predictor.inputs.preprocessing.scaled_jpeg
    backbone = predictor.backbone
    loaded = load_data(str(photos), backbone, scaled_jpeg=True, whole=True)
    assert loaded.notes["preprocessing"] == backbone.preprocessing.whole().to_dict() | {
        "scaled_jpeg": True
    }
    test = load_data(str(photos), backbone, scaled_jpeg=True).test
    batch = predictor.inputs.batch(test.files)
    assert torch.equal(batch.args[0], torch.stack([test[n][0] for n in range(len(test))]))
    assert not torch.equal(batch.args[0][0], backbone.preprocessing.image(test.image(0)))


def test_where_it_would_be_wrong_it_is_refused_in_words(tmp_path, photos):
    backbone = restuning.load_backbone("restuning-tiny")
    write_masks(tmp_path / "masks")
    with pytest.raises(DataError, match="decoded whole"):
        load_data(str(tmp_path / "masks"), backbone, scaled_jpeg=True)
    with pytest.raises(DataError, match="random sizes"):
        load_data(str(photos), backbone, scaled_jpeg=True, augment="timm")

"""Folders of images with a mask or a depth beside each: every way in which they may be wrong."""

import numpy as np
import pytest
from PIL import Image

from pixels import HEIGHT, WIDTH, write_depths, write_masks
from restuning._errors import DataError
from restuning.data import load_data


def _picture(name, mode, *value, rows=HEIGHT, form=None):
    """A picture in the place of the mask or the depth of the image 03."""

    def spoil(folder):
        (folder / name).with_suffix(".npy").unlink(missing_ok=True)
        Image.new(mode, (WIDTH, rows), *value).save(folder / name, form)

    return spoil


def _missing(name):
    return lambda folder: (folder / name).unlink()


def _text(name, text):
    return lambda folder: (folder / name).write_text(text)


# Of masks.


def _damaged(folder):
    (folder / "masks" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n and so on")


def _two_images(folder):
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "03.jpg")


def _empty(folder):
    for image in (folder / "images").iterdir():
        image.unlink()


def _one_class(folder):
    for mask in (folder / "masks").iterdir():
        Image.new("L", (WIDTH, HEIGHT)).save(mask)


MASK, NAMES = "masks/03.png", "classes.txt"
OF_MASKS = {
    "colours": (_picture(MASK, "RGB"), "no class numbers", MASK),
    "jpeg": (_picture(MASK, "L", form="JPEG"), "file of JPEG", MASK),
    "another size": (
        _picture(MASK, "L", rows=HEIGHT + 1),
        "another size.*40 x 31; the image is 40 x 30",
        MASK,
    ),
    "a class beyond": (_picture(MASK, "L", 3), "3 at row 0, column 0; 3 classes", MASK),
    "a damaged mask": (_damaged, "cannot be read", MASK),
    "no mask": (_missing(MASK), "an image has no mask", "images/03.png"),
    "two images": (_two_images, "two images of one mask.*03.jpg and 03.png", MASK),
    "no image": (_empty, "a split without images", "folder"),
    "no classes.txt": (_missing(NAMES), "names of their classes", NAMES),
    "one class in it": (_text(NAMES, "one\n"), "malformed", NAMES),
    "a class twice": (_text(NAMES, "a\nb\na\n"), "2 names", NAMES),
    "an empty line": (_text(NAMES, "a\n\nb\n"), "1 of them empty", NAMES),
    "masks of one class": (_one_class, "teach nothing", "folder"),
}

# Of depths.


class Opened:
    """What a pickle would make when it is read."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def _array(numbers):
    return lambda folder: np.save(folder / ARRAY, numbers)


def _number(value):
    def spoil(folder):
        depth = np.load(folder / ARRAY)
        depth[3, 5] = value
        np.save(folder / ARRAY, depth)

    return spoil


def _two_depths(folder):
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.uint16)).save(folder / DEPTH)


def _short(folder):
    file = folder / ARRAY
    file.write_bytes(file.read_bytes()[:200])


def _unknown(folder):
    for file in (folder / "depth").iterdir():
        np.save(file, np.zeros((HEIGHT, WIDTH), np.float32))


def _masks_as_well(folder):
    (folder / "masks").mkdir()


DEPTH, ARRAY = "depth/03.png", "depth/03.npy"
OF_DEPTHS = {
    "another size": (
        _array(np.ones((HEIGHT, WIDTH + 1))),
        "41 x 30; the image is 40 x 30",
        "03",
    ),
    "below zero": (_number(-1), "-1 at row 3, column 5", ARRAY),
    "infinite": (_number(np.inf), "inf at row 3, column 5", ARRAY),
    "whole numbers": (_array(np.ones((HEIGHT, WIDTH), int)), "an array of int64", ARRAY),
    "three axes": (_array(np.ones((HEIGHT, WIDTH, 1))), r"shape \(30, 40, 1\)", ARRAY),
    "8 bits": (_picture(DEPTH, "L"), "a file of PNG, mode L", DEPTH),
    "colours": (_picture(DEPTH, "RGB"), "a file of PNG, mode RGB", DEPTH),
    "cut off": (_short, "cannot be read", ARRAY),
    "a pickle": (_array(np.array([[Opened()]], object)), "cannot be read.*Python objects", ARRAY),
    "no depth": (_missing(ARRAY), "has no depth map.*03.png or .*03.npy", "03.png"),
    "two depths": (_two_depths, "has two depth maps", "images/03.png"),
    "nothing known": (_unknown, "of which nothing is known", "folder"),
    "masks as well": (_masks_as_well, "--problem segmentation or depth", "folder"),
}

WRONG = {
    f"{beside}: {what}": (write, *case)
    for beside, write, cases in (
        ("masks", write_masks, OF_MASKS),
        ("depths", write_depths, OF_DEPTHS),
    )
    for what, case in cases.items()
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_refused_with_its_file(kind, tmp_path, tiny):
    write, spoil, said, file = WRONG[kind]
    spoil(write(tmp_path / "folder"))
    with pytest.raises(DataError, match=f"(?s){said}") as refused:
        load_data(tmp_path / "folder", tiny)
    assert file in refused.value.where

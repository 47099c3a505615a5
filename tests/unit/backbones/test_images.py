"""One way to read an image: the same pixels from every source, limits before work, errors in words."""

import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

from restuning import load_data
from restuning._errors import DataError, MissingExtraError
from restuning.backbones import Backbone, Preprocessing, images
from restuning.data import read_image
from restuning.data.digests import digest_value
from restuning.serve.inputs import ImageInputs

SIZE = 16
PREPARED = Preprocessing((SIZE, SIZE))
IMAGES = Backbone("images", nn.Identity(), (), {}, PREPARED)

EXACT = 0
JPEG = 12  # grey levels: what quality 95 without chroma subsampling loses on smooth colours
COLOURS = 6  # grey levels: 8 bits of YCbCr, HSV and LAB do not hold all of RGB
PALETTE = 30  # grey levels: 256 colours in place of all

_RAMP = np.linspace(0, 255, 24).astype(np.uint8)[None].repeat(20, 0)
RGB = np.stack(
    [_RAMP, _RAMP[::-1, ::-1], np.arange(20, dtype=np.uint8)[:, None] * 9 + 0 * _RAMP], -1
)
GREY = np.stack([_RAMP] * 3, -1)
ALPHA = np.where(np.arange(24) < 12, 255, 0).astype(np.uint8)[None].repeat(20, 0)
OPAQUE = Image.fromarray(RGB)


def on_white(pixels):
    return np.where(ALPHA[..., None] == 255, pixels, 255).astype(np.uint8)


def with_alpha(image):
    image = image.copy()
    image.putalpha(Image.fromarray(ALPHA))
    return image


def lab(image):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


def encoded(image, form, **how):
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def turned(orientation):
    """What a camera stores that was held so, of an image that is upright."""
    undone = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return OPAQUE.transpose(undone), {"exif": exif}


def palette_with_a_hole():
    """Colour 7 is transparent; it is that of the right half."""
    pixels = np.where(ALPHA == 255, _RAMP // 2, 7).astype(np.uint8)
    image = Image.fromarray(pixels, "L").convert("P")
    image.putpalette([value for level in range(256) for value in (min(255, 2 * level),) * 3])
    return image


sixteen, sideways = Image.fromarray(_RAMP.astype(np.uint16) * 257), turned(6)
BLACK = Image.new("RGB", OPAQUE.size)
MODES = {
    "colours": (encoded(OPAQUE, "PNG"), RGB, EXACT),
    "jpeg": (encoded(OPAQUE, "JPEG", quality=95, subsampling=0), RGB, JPEG),
    "jpeg on its side": (
        encoded(sideways[0], "JPEG", quality=95, subsampling=0, **sideways[1]),
        RGB,
        JPEG,
    ),
    "png on its side": (encoded(sideways[0], "PNG", **sideways[1]), RGB, EXACT),
    "tiff on its head": (encoded(turned(3)[0], "TIFF", **turned(3)[1]), RGB, EXACT),
    "webp on its side": (encoded(sideways[0], "WEBP", lossless=True, **sideways[1]), RGB, EXACT),
    "grey": (encoded(Image.fromarray(_RAMP), "PNG"), GREY, EXACT),
    "grey, alpha": (encoded(with_alpha(Image.fromarray(_RAMP)), "PNG"), on_white(GREY), EXACT),
    "alpha": (encoded(with_alpha(OPAQUE), "PNG"), on_white(RGB), EXACT),
    "alpha of webp": (encoded(with_alpha(OPAQUE), "WEBP", lossless=True), on_white(RGB), EXACT),
    "a colour that is transparent": (
        encoded(Image.fromarray(on_white(RGB // 2)), "PNG", transparency=(255, 255, 255)),
        on_white(RGB // 2),
        EXACT,
    ),
    "palette": (encoded(OPAQUE.quantize(256), "PNG"), RGB, PALETTE),
    "palette with a hole": (
        encoded(palette_with_a_hole(), "PNG", transparency=7),
        on_white(_RAMP[..., None] // 2 * 2),
        EXACT,
    ),
    "1 bit": (encoded(Image.fromarray(_RAMP > 99), "PNG"), (GREY > 99) * np.uint8(255), EXACT),
    "16 bits": (encoded(sixteen, "PNG"), GREY, EXACT),
    "16 bits of tiff": (encoded(sixteen, "TIFF"), GREY, EXACT),
    "16 bits of pgm": (encoded(sixteen.convert("I"), "PPM"), GREY, EXACT),
    "32 bits": (encoded(sixteen.convert("I"), "TIFF"), GREY, EXACT),
    "floats": (encoded(Image.fromarray(_RAMP.astype(np.float32) / 255), "TIFF"), GREY, EXACT),
    "white is nothing": (encoded(sixteen, "TIFF", tiffinfo={262: 0}), 255 - GREY, EXACT),
    "cmyk": (encoded(OPAQUE.convert("CMYK"), "TIFF"), RGB, EXACT),
    "cmyk of jpeg": (encoded(OPAQUE.convert("CMYK"), "JPEG", quality=95, subsampling=0), RGB, JPEG),
    "ycbcr": (
        encoded(OPAQUE.convert("YCbCr"), "TIFF", compression="tiff_adobe_deflate"),
        RGB,
        COLOURS,
    ),
    "lab": (encoded(lab(OPAQUE), "TIFF"), np.asarray(OPAQUE), 40),
    "animated gif": (
        encoded(OPAQUE.quantize(256), "GIF", save_all=True, append_images=[BLACK]),
        RGB,
        PALETTE,
    ),
    "animated webp": (
        encoded(OPAQUE, "WEBP", lossless=True, save_all=True, append_images=[BLACK]),
        RGB,
        EXACT,
    ),
    "animated png": (encoded(OPAQUE, "PNG", save_all=True, append_images=[BLACK]), RGB, EXACT),
    "pages": (encoded(OPAQUE, "TIFF", save_all=True, append_images=[BLACK]), RGB, EXACT),
    "bmp": (encoded(OPAQUE, "BMP"), RGB, EXACT),
    "jpeg 2000": (encoded(OPAQUE, "JPEG2000"), RGB, EXACT),
    "tga": (encoded(with_alpha(OPAQUE), "TGA"), on_white(RGB), EXACT),
    "icon": (encoded(with_alpha(OPAQUE), "ICO", sizes=[(24, 20)]), on_white(RGB), EXACT),
}
"""Contents of a file, the pixels that are meant, and how far they may be off."""


def far(found, wanted):
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(wanted).astype(int)).max())


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_is_read_as_it_is_meant(mode):
    content, wanted, tolerance = MODES[mode]
    found = read_image(content)
    assert found.mode == "RGB"
    assert found.size == OPAQUE.size
    assert far(found, wanted) <= tolerance


def vtab_list(root, files):
    lines = "".join(f"{os.path.relpath(f, root)} {i % 2}\n" for i, f in enumerate(files))
    for name in ("train800", "val200", "test"):
        (root / f"{name}.txt").write_text(lines)
    return load_data(str(root), IMAGES).train


def class_folders(root, files):
    for i, file in enumerate(files):
        place = root / "train" / f"class {i % 2}" / f"{i:03d}{file.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    train = load_data(str(root), IMAGES).train
    order = sorted(range(len(files)), key=lambda i: (i % 2, i))
    return [train[order.index(i)] for i in range(len(files))]


def hugging_face(root, files, how):
    hf = pytest.importorskip("datasets")
    kinds = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["a", "b"])})
    rows = {"image": [how(f) for f in files], "label": [i % 2 for i in range(len(files))]}
    part = hf.Dataset.from_dict(rows, features=kinds)
    hf.DatasetDict({"train": part, "test": part}).save_to_disk(root / "saved")
    return load_data(f"hf:{root / 'saved'}", IMAGES).train


def torchvision_set(root, files, monkeypatch):
    sets = pytest.importorskip("torchvision.datasets")

    class Known(sets.VisionDataset):
        classes = ("a", "b")

        def __init__(self, root, train):
            super().__init__(root)

        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            return Image.open(files[index]), index % 2

    monkeypatch.setattr(sets, "Known", Known, raising=False)
    return load_data("torchvision:Known", IMAGES, root=str(root)).test


def test_the_same_picture_is_the_same_tensor_whatever_it_comes_from(tmp_path, monkeypatch):
    endings = {b"\x89P": ".PNG", b"\xff\xd8": ".JPG", b"GI": ".Gif", b"BM": ".BMP", b"RI": ".WebP"}
    files = []
    for i, (content, _, _) in enumerate(MODES.values()):
        # Suffixes of the TIFF, PPM, JPEG 2000, TGA and ICO files among them do not say what they are.
        file = tmp_path / "files" / f"{i:03d}{endings.get(content[:2], '.tif')}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        files.append(file)
    predict = ImageInputs(PREPARED)
    wanted = predict.batch(files).args[0]
    sources = {
        "bytes": predict.batch([f.read_bytes() for f in files]).args[0],
        "pil": predict.batch([Image.open(f) for f in files]).args[0],
        "preprocessing": [PREPARED.image(Image.open(f)) for f in files],
        "folder": predict.batch(list(predict.expand([tmp_path / "files"]))).args[0],
        "list": [x for x, _ in vtab_list(tmp_path, files)],
        "classes": [x for x, _ in class_folders(tmp_path / "classes", files)],
        "hub, bytes": [
            x for x, _ in hugging_face(tmp_path, files, lambda f: {"bytes": f.read_bytes()})
        ],
        "torchvision": [x for x, _ in torchvision_set(tmp_path, files, monkeypatch)],
    }
    for source, tensors in sources.items():
        for mode, found, tensor in zip(MODES, tensors, wanted, strict=True):
            assert torch.equal(found, tensor), f"{mode} of {source}"


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (RGB, "colours"),
        (np.dstack([RGB, ALPHA]), "alpha"),
        (_RAMP, "grey"),
        (_RAMP[..., None], "grey"),
        (np.dstack([_RAMP, ALPHA]), "grey, alpha"),
        (_RAMP > 99, "1 bit"),
        (_RAMP.astype(np.uint16) * 257, "16 bits"),
        (_RAMP.astype(np.int64) * 257, "32 bits"),
        (_RAMP / 255, "floats"),
        (RGB.astype(np.uint16) * 257, "colours"),
        (RGB.astype(np.float16) / 255, "colours"),
    ],
)
def test_an_array_is_read_as_the_file_of_the_same_picture(array, mode):
    assert far(read_image(array), read_image(MODES[mode][0])) == EXACT


def test_an_image_that_was_read_is_not_turned_again_when_it_is_read_again():
    for content, *_ in MODES.values():
        once = read_image(content)
        assert far(read_image(once), once) == EXACT


def test_what_is_handed_over_stays_as_it_was():
    given = Image.open(io.BytesIO(MODES["png on its side"][0]))
    read_image(given)
    assert given.size == OPAQUE.size[::-1]
    assert given.getexif()[0x0112] == 6


@pytest.mark.parametrize(
    "values",
    [
        _RAMP.astype(np.float32),
        _RAMP.astype(np.float32) / 127 - 1,
        np.where(_RAMP > 99, np.nan, 0.5).astype(np.float32),
        _RAMP.astype(np.int32),
        _RAMP.astype(np.int32) * 2**20,
        -_RAMP.astype(np.int32),
    ],
)
def test_greys_without_a_known_white_are_refused_and_not_clipped(values):
    for source in (values, encoded(Image.fromarray(values), "TIFF")):
        with pytest.raises(DataError, match="which value is white"):
            read_image(source)


def png(width, height, bits=1):
    """A whole PNG of zeros: small, and all that its header says is there."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    rows = zlib.compress(bytes(1 + -(-width * bits // 8)) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def claiming(width, height):
    """Heads of small files that say they are large."""
    bmp = bytearray(encoded(BLACK, "BMP"))
    bmp[18:26] = struct.pack("<ii", width, height)
    gif = bytearray(encoded(BLACK, "GIF"))
    gif[6:10] = struct.pack("<HH", width, height)
    return {
        "png": png(width, height)[:2000],
        "bmp": bytes(bmp[:216]),
        "gif": bytes(gif[:216]),
        "ppm": f"P6 {width} {height} 255\n".encode(),
        "tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, 24, 0),
    }


def peak_of(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(13000, 13000), (60000, 60000), (1, 65535), (65535, 2)])
@pytest.mark.parametrize("kind", claiming(8, 8))
def test_a_small_file_that_claims_to_be_large_is_refused_by_its_header(kind, size, tmp_path):
    file = tmp_path / f"large.{kind}"
    file.write_bytes(claiming(*size)[kind])
    with pytest.raises(DataError, match=r"(pixels|narrow): .*large"):
        ImageInputs(PREPARED).batch([file])


def test_nothing_of_its_size_is_allocated_for_an_image_that_is_refused(monkeypatch):
    # Pillow's own memory is not traced; that it is not asked for is seen at its decoder.
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    content = png(13000, 13000)

    def refused():
        with pytest.raises(DataError, match="pixels"):
            read_image(content)

    assert peak_of(refused) < 2**20


def test_the_limit_of_pixels_is_raised_by_whoever_means_it(monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for source in (MODES["colours"][0], RGB):
        with pytest.raises(DataError, match="RESTUNING_MOST_PIXELS=480"):
            read_image(source)
    monkeypatch.setenv("RESTUNING_MOST_PIXELS", "480")
    assert read_image(MODES["colours"][0]).size == OPAQUE.size
    monkeypatch.setenv("RESTUNING_MOST_PIXELS", "many")
    with pytest.raises(DataError, match="many"):
        read_image(MODES["colours"][0])


def test_an_array_and_a_pil_image_have_the_same_limits_as_a_file():
    for narrow in (np.zeros((1, 300, 3), np.uint8), Image.new("L", (300, 1)), png(300, 1)):
        with pytest.raises(DataError, match="narrow"):
            read_image(narrow)


def test_what_is_no_image_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, what in (
        ("pipe.png", "regular"),
        ("folder.png", "a folder"),
        ("gone.png", "nowhere"),
        ("empty.png", "empty.png"),
        ("missing.png", "missing"),
    ):
        with pytest.raises(DataError, match=what):
            read_image(tmp_path / name)
    for wrong in (3, None, "a\0b.png", b"", np.zeros((2, 2, 7), np.uint8), np.array(["x"])):
        with pytest.raises(DataError):
            read_image(wrong)


def test_a_program_in_the_clothes_of_an_image_is_not_run(tmp_path):
    # Pillow hands PostScript to Ghostscript.
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for name in ("a.eps", "a.png"):
        (tmp_path / name).write_bytes(program)
        with pytest.raises(DataError, match="no image of a kind that is read"):
            read_image(tmp_path / name)
    assert ".eps" not in images.image_suffixes()


def test_notes_that_cannot_be_read_leave_the_image_upright():
    broken = encoded(OPAQUE, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert read_image(broken).size == OPAQUE.size


def test_an_image_that_needs_an_extra_says_how_it_is_installed(tmp_path, monkeypatch):
    file = tmp_path / "a.heic"
    file.write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic")
    monkeypatch.setattr(images, "_formats", lambda: ["PNG"])
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    for source in (file, file.read_bytes()):
        with pytest.raises(MissingExtraError, match=r"pip install 'restuning\[heif\]'"):
            read_image(source)
    with pytest.raises(MissingExtraError, match=r"pip install 'restuning\[heif\]'"):
        images.read_format(file.read_bytes())


def test_heic_is_read_where_its_library_is():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    found = read_image(encoded(OPAQUE, "HEIF", quality=-1, chroma=444))
    assert far(found, RGB) <= COLOURS
    assert images.read_format(encoded(OPAQUE, "HEIF", quality=-1))[1:] == OPAQUE.size


def png_of(bits, kind, row, transparent):
    """A PNG of 4 x 2 pixels as its specification has it: Pillow writes no such ones."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 4, 2, bits, kind, 0, 0, 0)
    parts = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress((b"\0" + row) * 2))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in (*parts, (b"IEND", b"")))


@pytest.mark.parametrize(
    ("bits", "kind", "row", "transparent", "wanted"),
    [
        (4, 0, b"\x5a\x5a", b"\0\x05", [255, 170, 255, 170]),
        (2, 0, b"\x1b", b"\0\x02", [0, 85, 255, 255]),
        (1, 0, b"\x50", b"\0\0", [255, 255, 255, 255]),
        (8, 2, bytes([9, 8, 7, 1, 1, 1]) * 2, b"\0\x09\0\x08\0\x07", [255, 1, 255, 1]),
        (
            *(16, 2, bytes([9, 0, 9, 0, 9, 0, 0, 0, 0, 0, 0, 0]) * 2),
            *(bytes([9, 0] * 3), [255, 0, 255, 0]),
        ),
    ],
)
def test_the_transparent_colour_of_a_png_has_the_bits_of_its_pixels(
    bits, kind, row, transparent, wanted
):
    found = np.asarray(read_image(png_of(bits, kind, row, transparent)))
    assert found[..., 0].tolist() == found[..., 2].tolist() == [wanted] * 2


def test_a_png_that_was_known_by_its_contents_is_read_as_before():
    content = png_of(4, 0, b"\x5a\x5a", b"\0\x05")
    image = Image.open(io.BytesIO(content))
    known = digest_value(image)
    assert far(read_image(image), read_image(content)) == EXACT
    assert digest_value(image) == known

"""One way to read an image, whatever it comes from: a file, bytes, Pillow, an array."""

from __future__ import annotations

import importlib.util
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from restuning._errors import DataError, require

T = TypeVar("T")

Least = Callable[[int, int], tuple[int, int]]
"""Of an image of a width and a height, upright, the width and height that are enough of it."""

MOST_PIXELS = 89_478_485
"""Of an image that is read, by its header: Pillow's own first limit. More with `RAISED`."""

RAISED = "RESTUNING_MOST_PIXELS"
"""Environment variable with a number in place of `MOST_PIXELS`."""

MOST_ASPECT = 100
"""How often the shorter side may go into the longer: resizing the shorter grows the other as much."""

NOT_READ = {
    # Ghostscript runs what such a file says.
    "EPS",
    # Drawn by Windows alone.
    "WMF",
    # Pillow knows these by name and cannot decode them.
    "BUFR",
    "GRIB",
    "HDF5",
    "MPEG",
}
"""Formats of Pillow that are not read."""

HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))
AVIF_SUFFIXES = frozenset((".avif", ".avifs"))

_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts an image upright, by the orientation that its EXIF tells; 1 is upright."""

_ON_ITS_SIDE = frozenset((5, 6, 7, 8))
"""Orientations that exchange width and height."""

_PAST_RIGHT = frozenset((2, 3, 6, 7))
"""Orientations whose left was right, or below, in the file."""

_PAST_BOTTOM = frozenset((3, 4, 7, 8))
"""Orientations whose top was below, or right, in the file."""

_SCALED = "restuning scaled"
"""Note on an image that was decoded scaled: what `Scaled` says."""

_BRANDS = (
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    *(b"avif", b"avis"),
)
"""Of files of HEIF and AVIF, after `ftyp`."""

_PNG_STEPS = {"L;2": 85, "L;4": 17}
"""Of a grey of 2 and of 4 bits, in a byte."""

_NUMPY = b"\x93NUMPY"
"""A file of an array begins so."""

_ORIENTATION = 0x0112
_PHOTOMETRIC, _MIN_IS_WHITE = 262, 0

_DAMAGED = (
    # Whatever a decoder of Pillow raises on a file that is not what its header says.
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
    # Of a picture inside of a picture, as in an icon.
    Image.DecompressionBombError,
    struct.error,
    zlib.error,
)


class Scaled(NamedTuple):
    """Of an image that was decoded scaled, what it stands for.

    Attributes:
        size: Width and height of the whole.
        box: Left, top, right and bottom of the whole in the pixels that there are: a last block that the whole does
            not fill is decoded as well.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]


def read_image(source: Any, name: str = "", least: Least | None = None) -> Image.Image:
    """An image in RGB, 8 bits a channel, upright; the same for the same picture from any source.

    - The orientation that EXIF (or XMP) tells is applied.
    - Transparency of any kind (alpha, a transparent colour, a palette with alpha) lies on white.
    - Greys of 16 bits: 0..65535 becomes 0..255. Floats: 0..1. Whole numbers of 32 bits have no range of
      their own: they are taken as 16 bits, and refused where they are negative, above 65535, or
      all below 256 (which may be bytes, or a very dark image of 16 bits).
    - CMYK (of JPEG inverted, as Adobe writes it), YCbCr, HSV and LAB become RGB. Colour profiles (ICC) are
      not applied: backbones were trained on images read without them.
    - Of several pictures in one file (an animation, pages) the first is read, of an icon the largest.

    Args:
        source: A path; the bytes of a file; a PIL image; an array `h w`, or `h w c` with 1 (grey), 2
            (grey, alpha), 3 or 4 (RGB, alpha) channels, of bool, uint8, uint16 or floats in 0..1.
        name: What an error calls it, where it is no path.
        least: What is enough of it; None for all pixels. A JPEG (a path, bytes) that is at least twice as large is
            decoded by libjpeg to 1/2, 1/4 or 1/8 of its sides, the smallest that is enough: `scaled_from` says of
            which whole. Everything else is as without.

    Raises:
        DataError: It is missing or damaged, is no image, has more than `MOST_PIXELS` pixels (told by
            its header, before they are decoded) or is longer than `MOST_ASPECT` times its width.
        MissingExtraError: It is HEIC, or AVIF, and nothing here decodes that.
    """
    # Not of a picture that somebody holds: decoding it scaled would change its size in their hands.
    guard = _guard if least is None else partial(_guard, least=least)
    if isinstance(source, str | Path):
        name = name or str(source)
        _require_file(Path(source))
        return _read(source, name, guard)
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(source), name or "an image in memory", guard)
    if isinstance(source, Image.Image):
        name = name or str(getattr(source, "filename", "")) or "a PIL image"
        return _guard(source, name)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    raise DataError(
        "not an image",
        where=name,
        found=type(source).__name__,
        fix="give paths, PIL images, arrays `h w c` or tensors",
    )


def scaled_from(image: Image.Image) -> Scaled:
    """What an image of `read_image` stands for; of one that was decoded whole its own size."""
    found = image.info.get(_SCALED)
    return Scaled(image.size, (0, 0, *image.size)) if found is None else found


def is_read(image: Image.Image) -> bool:
    """Whether it may have come from `read_image`: what that gives is of no file and has no notes of one."""
    return type(image) is Image.Image and image.mode == "RGB" and not image.info.keys() - {_SCALED}


def read_mask(source: Any, name: str = "") -> Image.Image:
    """A mask in PNG as its class numbers: mode L, a byte a pixel, upright as `read_image` makes images.

    Of a palette the numbers are its indices, of grey its values as the file has them, whatever its bits.

    Args:
        source: A path, the bytes of a file, an array `h w` of whole numbers, or a PIL image of numbers.
        name: What an error calls it, where it is no path.

    Raises:
        DataError: It is missing or damaged, is no PNG, has colours in place of numbers or numbers beyond 255, or
            as `read_image`.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 2 or source.dtype.kind not in "biu" or source.size == 0:
            raise _no_mask(name, f"an array of {source.dtype}, shape {source.shape}")
        return _to_mask(source, name)
    if isinstance(source, Image.Image):
        return _turn(source, _numbers_of(source, name))
    if isinstance(source, str | Path):
        name = name or str(source)
        _require_file(Path(source))
        return _read(source, name, _guard_mask)
    if not isinstance(source, bytes):
        raise _no_mask(name, type(source).__name__)
    return _read(io.BytesIO(source), name or "a mask in memory", _guard_mask)


def _guard_mask(image: Image.Image, name: str) -> Image.Image:
    _check_size(*image.size, name)
    if image.format != "PNG":
        raise _no_mask(name, f"a file of {image.format}")
    tile = getattr(image, "tile", None)
    steps = _PNG_STEPS.get(tile[0][3], 1) if tile else 1
    try:
        image.load()
    except _DAMAGED as error:
        raise _unreadable(name, error) from None
    return _turn(image, _numbers_of(image, name, steps))


def _numbers_of(image: Image.Image, name: str, steps: int = 1) -> Image.Image:
    if image.mode not in ("P", "L", "1", "I", "I;16"):
        raise _no_mask(name, f"mode {image.mode}, colours in place of class numbers")
    return _to_mask(np.asarray(image).astype(np.int64) // steps, name)


def _to_mask(numbers: np.ndarray, name: str) -> Image.Image:
    if numbers.max() > 255 or numbers.min() < 0:
        raise _no_mask(name, f"numbers from {numbers.min()} to {numbers.max()}")
    return Image.fromarray(numbers.astype(np.uint8))


def read_depth(source: Any, name: str = "") -> Image.Image:
    """A depth map: mode F, a number a pixel, upright as `read_image` makes images; 0 where it is unknown.

    A PNG of 16 bits has its values as they are, and so has a TIFF of one page of whole numbers or floats, as which
    Hugging Face's data sets keep arrays; a `.npy` file or an array of floats its own, NaN being unknown.

    Args:
        source: A path, the bytes of a file, or an array `h w`.
        name: What an error calls it, where it is no path.

    Raises:
        DataError: It is missing or damaged, is neither, or has a number below zero or infinity.
    """
    if isinstance(source, np.ndarray):
        return _from_depths(source, name or "an array")
    if isinstance(source, str | Path):
        name = name or str(source)
        _require_file(Path(source))
        with open(source, "rb") as file:
            numpy = file.read(len(_NUMPY)) == _NUMPY
        if not numpy:
            return _read(Path(source), name, _guard_depth)
        return _from_depths(_load_array(source, name), name)
    if not isinstance(source, bytes):
        raise _no_depth(name, type(source).__name__)
    name = name or "a depth map in memory"
    if source[: len(_NUMPY)] == _NUMPY:
        return _from_depths(_load_array(io.BytesIO(source), name), name)
    return _read(io.BytesIO(source), name, _guard_depth)


HEADER_TRIES = 10
"""Of the header of one array, where Python itself failed."""


def _load_array(source: Any, name: str) -> np.ndarray:
    try:
        # Mapped where it is a file: what the header says is looked at before it is read.
        mapped = None if isinstance(source, io.BytesIO) else "r"
        for _ in range(HEADER_TRIES - 1):
            # Python before 3.11.9 and 3.12.2 counts how deep all threads parse together, and a header that two of
            # them read at once may be refused for that (python/cpython#106905): nothing is wrong with the file.
            with suppress(SystemError):
                return np.load(source, mmap_mode=mapped, allow_pickle=False)
            if isinstance(source, io.BytesIO):
                source.seek(0)
        return np.load(source, mmap_mode=mapped, allow_pickle=False)
    except _DAMAGED as error:
        raise _unreadable(name, error) from None


def _from_depths(numbers: np.ndarray, name: str) -> Image.Image:
    if numbers.ndim != 2 or numbers.dtype.kind not in "fu" or numbers.size == 0:
        raise _no_depth(name, f"an array of {numbers.dtype}, shape {numbers.shape}")
    _check_size(numbers.shape[1], numbers.shape[0], name)
    with np.errstate(over="ignore"):
        made = np.nan_to_num(np.array(numbers), nan=0.0, posinf=np.inf, neginf=-np.inf)
        made = made.astype(np.float32)
    wrong = (made < 0) | np.isinf(made)
    if wrong.any():
        y, x = (int(each[0]) for each in wrong.nonzero())
        raise DataError(
            "a depth is below zero, or infinite",
            where=name,
            found=f"{numbers[y, x]:g} at row {y}, column {x}",
            fix="correct it, or write 0 or NaN where it is unknown",
        )
    return Image.fromarray(made)


def _guard_depth(image: Image.Image, name: str) -> Image.Image:
    _check_size(*image.size, name)
    kinds = {"PNG": ("I",), "TIFF": ("I", "F")}.get(str(image.format), ())
    # Of several pages nobody knows which, and of numbers that count from white not what they count.
    other = getattr(image, "n_frames", 1) > 1 or _counts_from_white(image)
    if not image.mode.startswith(kinds) or other:
        raise _no_depth(name, f"a file of {image.format}, mode {image.mode}")
    try:
        image.load()
    except _DAMAGED as error:
        raise _unreadable(name, error) from None
    return _turn(image, _from_depths(np.asarray(image).astype(np.float32), name))


def _no_depth(name: str, found: str) -> DataError:
    return DataError(
        "a depth map that is neither a PNG of 16 bits, a TIFF of numbers nor an array of floats `h w`",
        where=name,
        found=found,
        fix="save it as a grey PNG of 16 bits, or with numpy.save as float32 (.npy)",
    )


def _no_mask(name: str, found: str) -> DataError:
    return DataError(
        "a mask that has no class numbers from 0 to 255",
        where=name,
        found=found,
        fix="save it as PNG, grey or with a palette, whose pixels are the numbers of classes",
    )


def read_format(source: bytes, name: str = "") -> tuple[str, int, int]:
    """The format (as Pillow names it), width and height that an image's header says; nothing is decoded.

    Args:
        source: The bytes of a file.
        name: What an error calls it.

    Raises:
        DataError: It is no image that is read.
        MissingExtraError: Its kind is read by a library that is not installed.
    """
    return _read(
        io.BytesIO(source),
        name or "an image in memory",
        lambda image, _: (str(image.format), *image.size),
    )


class Measured(NamedTuple):
    """What a header says of an image.

    Attributes:
        size: Width and height as `read_image` would give it: upright.
        before: As the file has it, where the file's notes (EXIF) turn or mirror it; None where they do not.
    """

    size: tuple[int, int]
    before: tuple[int, int] | None


def measure(source: Any, name: str = "") -> Measured:
    """Width and height of an image that `read_image` would give, by its header.

    Args:
        source: As for `read_image`.
        name: What an error calls it, where it is no path.

    Raises:
        DataError: As `read_image`, as far as the header tells.
        MissingExtraError: Likewise.
    """
    if isinstance(source, str | Path):
        _require_file(Path(source))
        return _read(source, str(source), _measure)
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), name or "an image in memory", _measure)
    if isinstance(source, Image.Image):
        return _measure(source, name)
    # Of an array there are no notes that would turn it.
    return Measured(read_image(source, name).size, None)


def _measure(image: Image.Image, name: str) -> Measured:
    _check_size(*image.size, name)
    before = None if _noted_turn(image) is None else image.size
    if image.format == "TIFF":
        # Later Pillows turn it when they decode it.
        image.load()
    return Measured(_turn(image, Image.new("1", image.size)).size, before)


@cache
def image_suffixes() -> frozenset[str]:
    """Of the files that are taken from a folder, in small letters: all that can be read here."""
    # Pillow reads its plugins only now.
    known = {s for s, form in Image.registered_extensions().items() if form in _formats()}
    if not _reads_avif():
        known -= AVIF_SUFFIXES
    return frozenset(known | HEIF_SUFFIXES if _has_heif() else known - HEIF_SUFFIXES)


def _formats() -> list[str]:
    """Formats that are read, in Pillow's order."""
    Image.init()
    return [form for form in Image.ID if form not in NOT_READ]


def _has_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


def _reads_avif() -> bool:
    from PIL import features

    # Older Pillows do not know the word, and warn of it.
    return "avif" in getattr(features, "modules", {}) and bool(features.check("avif"))


def _require_file(path: Path) -> None:
    """A pipe or a device would be waited for; a directory has no bytes."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(
            "an image is missing",
            where=str(path),
            found=f"a link to {os.readlink(path)}" if path.is_symlink() else "",
            fix="restore it, or correct the list",
        ) from None
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), error) from None
    if not stat.S_ISREG(kind):
        raise DataError(
            "an image cannot be read",
            where=str(path),
            found="a folder" if stat.S_ISDIR(kind) else "no regular file",
            fix="give an image file",
        )


def _read(source: Any, name: str, use: Callable[[Image.Image, str], T]) -> T:
    """What is made of an image that is open, from a path or a stream of bytes."""
    try:
        return _open(source, name, use)
    except UnidentifiedImageError:
        # Known by contents: suffixes lie, and bytes have none.
        if not _is_heif(source):
            raise _unreadable(name, "no image of a kind that is read") from None
    except _DAMAGED as error:
        raise _unreadable(name, error) from None
    # Registers itself with Pillow, which then opens such files as all others.
    require("pillow_heif", "heif", f"{name}, an image of HEIC or AVIF,").register_heif_opener()
    try:
        return _open(source, name, use)
    except _DAMAGED as error:
        raise _unreadable(name, error) from None


def _open(source: Any, name: str, use: Callable[[Image.Image, str], T]) -> T:
    _allow_more_pixels()
    try:
        # Of the formats that are read alone, whatever the file is called.
        opened = Image.open(source, formats=_formats())
    except Image.DecompressionBombError as error:
        # Pillow's own limit, which is twice ours where nobody set it.
        pixels = "".join(filter(str.isdigit, str(error).partition("pixels")[0]))
        raise _too_many(name, str(error), pixels) from None
    with opened as image:
        return use(image, name)


def _guard(image: Image.Image, name: str, least: Least | None = None) -> Image.Image:
    """Checked by its header, then decoded; an icon says what it is only when it is decoded."""
    _check_size(*image.size, name)
    _scale_transparent_colour(image)
    try:
        scaled = None if least is None else _scale(image, least)
        image.load()
        _check_size(*image.size, name)
        made = _to_rgb(image, name)
    except _DAMAGED as error:
        raise _unreadable(name, error) from None
    if scaled is not None:
        made.info[_SCALED] = scaled
    return made


def _scale(image: Image.Image, least: Least) -> Scaled | None:
    """Have a JPEG that is open decoded smaller, where that leaves enough of it."""
    if not isinstance(image, JpegImageFile):
        return None
    width, height = image.size
    noted = _orientation(image)
    turned = noted in _ON_ITS_SIDE
    wanted = least(height, width) if turned else least(width, height)
    enough = (wanted[1], wanted[0]) if turned else wanted
    if min(width // enough[0], height // enough[1]) < 2:
        return None
    drafted = image.draft(None, enough)
    if drafted is None or image.size == (width, height):
        return None
    right, bottom = drafted[1][2:]
    # Of the last block, what the whole does not fill.
    beyond = image.size[0] - right, image.size[1] - bottom
    (x, y), (w, h) = (beyond[::-1], (bottom, right)) if turned else (beyond, (right, bottom))
    left, top = (x if noted in _PAST_RIGHT else 0.0), (y if noted in _PAST_BOTTOM else 0.0)
    size = (height, width) if turned else (width, height)
    return Scaled(size, (left, top, left + w, top + h))


def _unreadable(name: str, error: Exception | str) -> DataError:
    found = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return DataError(
        "an image cannot be read",
        where=name,
        found=found,
        fix="restore the file, or leave such files out with --skip-bad",
    )


def _is_heif(source: Any) -> bool:
    """Whether a file is of the family of HEIF, which AVIF belongs to."""
    if isinstance(source, io.BytesIO):
        head = source.getvalue()[:12]
    else:
        head = b""
        with suppress(OSError), open(source, "rb") as file:
            head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _BRANDS


def _check_size(width: int, height: int, name: str) -> None:
    """Refuse an image that would fill the memory.

    Raises:
        DataError: It has no pixels, too many, or is too narrow.
    """
    most = _most_pixels()
    if width * height > most:
        raise _too_many(name, f"{width} x {height}, more than {most:,}", width * height)
    if width < 1 or height < 1:
        raise DataError("an image without pixels", where=name, found=f"{width} x {height}")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise DataError(
            "an image is too long and narrow",
            where=name,
            found=f"{width} x {height}",
            fix=f"crop it: its longer side may be {MOST_ASPECT} times the shorter",
        )


def _too_many(name: str, found: str, pixels: object) -> DataError:
    return DataError(
        "an image has too many pixels",
        where=name,
        found=found,
        fix=f"make it smaller, or allow it: {RAISED}={pixels}",
    )


def _most_pixels() -> int:
    said = os.environ.get(RAISED)
    if said is None:
        return MOST_PIXELS
    if not said.isascii() or not said.isdigit() or not 0 < int(said) < 2**62:
        raise DataError(
            "not a number of pixels", where=RAISED, found=said[:40], fix="give a whole number"
        )
    return int(said)


def _allow_more_pixels() -> None:
    # Pillow has a limit of its own, twice of what it warns at; who raises ours means both.
    if RAISED in os.environ and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, _most_pixels())


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    made = _turn(image, _colours(image, name))
    # A new object without the notes of the old: read again, it would be turned again.
    made.info = {}
    return made


def _colours(image: Image.Image, name: str) -> Image.Image:
    """RGB, whatever the mode; always another object."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;"):
        return _from_wide(image, name)
    if mode in ("La", "RGBa"):
        image = image.convert("LA" if mode == "La" else "RGBA")
    if mode == "LAB":
        return _from_lab(image, name)
    if _may_be_transparent(image):
        return _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _may_be_transparent(image: Image.Image) -> bool:
    if image.mode in ("LA", "PA", "RGBA") or image.info.get("transparency") is not None:
        return True
    # Colours of a palette may have alpha of their own.
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _counts_from_white(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE


def _scale_transparent_colour(image: Image.Image) -> None:
    """The transparent colour of a PNG counts in the file's bits; Pillow makes bytes of pixels alone."""
    hidden, tile = image.info.get("transparency"), getattr(image, "tile", None)
    if hidden is None or getattr(image, "format", None) != "PNG" or not tile:
        return
    raw = tile[0][3]
    if raw in _PNG_STEPS and isinstance(hidden, int):
        image.info["transparency"] = hidden * _PNG_STEPS[raw]
    elif raw == "RGB;16B" and isinstance(hidden, tuple):
        # Of 16 bits the upper eight are kept.
        image.info["transparency"] = tuple(value >> 8 for value in hidden)


def _on_white(image: Image.Image) -> Image.Image:
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image.convert("RGB"), mask=alpha)
    return white


def _from_lab(image: Image.Image, name: str) -> Image.Image:
    from PIL import ImageCms, features

    if not features.check("littlecms2"):
        raise DataError(
            "an image in LAB cannot be turned into RGB",
            where=name,
            found="a Pillow without littlecms2",
            fix="save it as RGB",
        )
    # Pillow itself converts between all modes but this.
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    made: Any = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return made


def _from_wide(image: Image.Image, name: str) -> Image.Image:
    """Greys of more than 8 bits."""
    values = np.asarray(image)
    # Pillow says I of a PNG and of a PPM whose greys are scaled to 16 bits.
    declared = getattr(image, "format", None) in ("PNG", "PPM") and image.mode == "I"
    grey = _to_bytes(values.clip(0, 65535).astype(np.uint16) if declared else values, name)
    if _counts_from_white(image):
        # Of 8 bits and less Pillow does it.
        grey = 255 - grey
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        # One grey that is transparent, on white.
        grey = np.where(values == hidden, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Values of any type as bytes.

    Raises:
        DataError: Their range is not known, or they leave it.
    """
    kind = values.dtype
    if kind == np.uint8:
        return values
    if kind == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if kind.kind == "f":
        # As Pillow has floats: an array and a file of one picture are rounded alike.
        values = values.astype(np.float32)
        # Also false of NaN.
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise _no_range(values, name, "floats")
        return (values * np.float32(255)).round().astype(np.uint8)
    if kind.kind not in "iu":
        raise DataError(
            "not an image",
            where=name,
            found=f"an array of {kind}",
            fix="give paths, PIL images, arrays `h w c` of uint8, uint16 or floats in 0..1",
        )
    if kind.kind != "u" or kind.itemsize != 2:
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        if low < 0 or high > 65535 or 0 < high < 256:
            raise _no_range(values, name, f"whole numbers of {8 * kind.itemsize} bits")
        values = values.astype(np.uint16)
    # 257 is 65535 / 255: white stays white.
    return (values // values.dtype.type(257)).astype(np.uint8)


def _no_range(values: np.ndarray, name: str, what: str) -> DataError:
    return DataError(
        "nothing says which value is white",
        where=name,
        found=f"{what} from {values.min():g} to {values.max():g}",
        fix="scale them to 0..255 as 8 bits, to 0..65535 as 16 bits, or to floats in 0..1",
    )


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        # Pillow knows grey images as `h w` only.
        pixels = pixels[:, :, 0]
    if pixels.size == 0 or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (2, 3, 4))
    ):
        raise DataError(
            "an array that is no image",
            where=name,
            found=f"shape {pixels.shape}",
            fix="give `h w`, or `h w c` with 1 to 4 channels",
        )
    name = name or "an array"
    _check_size(pixels.shape[1], pixels.shape[0], name)
    # LA from two channels, RGB from three and RGBA from four: Pillow sees which.
    return _to_rgb(Image.fromarray(np.ascontiguousarray(_to_bytes(pixels, name))), name)


def _turn(image: Image.Image, made: Image.Image) -> Image.Image:
    """Put `made` upright by what `image` notes."""
    turned = getattr(image, "tag_v2", None) is not None and _turns_tiff()
    how = None if turned else _noted_turn(image)
    return made if how is None else made.transpose(how)


def _noted_turn(image: Image.Image) -> Image.Transpose | None:
    """What would put an image upright as it is in its file; of a TIFF asked before it is decoded."""
    return _TRANSPOSED.get(_orientation(image))


def _orientation(image: Image.Image) -> int:
    """As its notes say; 0 where they do not."""
    tags = getattr(image, "tag_v2", None)
    try:
        noted = (image.getexif() if tags is None else tags).get(_ORIENTATION)
    except _DAMAGED:
        # Notes that cannot be read say nothing, and the pixels are whole.
        return 0
    return noted if isinstance(noted, int) else 0


@cache
def _turns_tiff() -> bool:
    """Whether this Pillow turns a TIFF when it decodes it, as later ones do."""
    stream = io.BytesIO()
    Image.new("L", (1, 2)).save(stream, "TIFF", tiffinfo={_ORIENTATION: 6})
    with Image.open(stream) as image:
        image.load()
        return image.size == (2, 1)

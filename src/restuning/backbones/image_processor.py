"""What an image processor of transformers does, as a `Preprocessing`: proposed, measured, proved.

A processor is code with fields, and its class decides what a field means. So nothing is believed:
colours of flat pictures show how bytes become numbers, fields propose how pictures are resized and
cropped, and a proposal counts only where it gives what the processor gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import BackboneError
from restuning.backbones.preprocessing import Preprocessing
from restuning.backbones.trust import hub_arguments, read_config
from restuning.runtime.hub import is_offline

SAME_IMAGE = 0.02
"""Largest mean difference of ours from theirs in normalised units: Pillow and torchvision round a
resized byte apart by one at most, which is 0.017 at a deviation of 0.225."""

SAME_NUMBER = 1e-4
"""Where a measured mean or deviation is the one that the fields say, that is written down."""

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of resampling filters."""

SHAPES = ((300, 400), (401, 299), (37, 53), (640, 91))
"""Width and height of the pictures compared: wide, high, tiny, thin."""

_COLOURS = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))

_ABOUT_SIZE = ("size", "crop", "pad", "patch", "pixels", "split", "edge", "multiple", "aspect")
"""What stands in the names of fields that decide about sizes."""

_CANNOT = (
    # Whatever a processor raises that needs more than an image: a second one, boxes, a reader of texts.
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

_READ = frozenset(
    ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    + ("do_flip_channel_order", "do_reduce_labels", "do_convert_annotations")
)
"""Fields that are understood, or change no image."""


def read_image_processor(hf: Any, name: str) -> Preprocessing | None:
    """What the image processor in a folder does to one image; None where the folder has none.

    Raises:
        BackboneError: It cannot be made, or does what no `Preprocessing` does; says which fields.
    """
    if not _has_processor(hf, name):
        return None
    try:
        processor = hf.AutoImageProcessor.from_pretrained(name, **hub_arguments())
        said = processor.to_dict()
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError) as error:
        raise BackboneError(
            "an image processor cannot be opened",
            where=name,
            found=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}",
            fix="install what it needs, or mend its preprocessor_config.json",
        ) from None
    return translate(processor, said, name)


def _has_processor(hf: Any, name: str) -> bool:
    """Whether a folder or a hub's name has a file of an image processor."""
    quiet = {
        "local_files_only": is_offline(),
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if hf.utils.cached_file(name, "preprocessor_config.json", **quiet) is not None:
        return True
    # Newer folders keep all processors of a model in one file, timm's their settings in the model's.
    return any(
        key in _read_json(found)
        for file, key in (
            ("processor_config.json", "image_processor"),
            ("config.json", "pretrained_cfg"),
        )
        if (found := hf.utils.cached_file(name, file, **quiet)) is not None
    )


def _read_json(file: str) -> dict[str, Any]:
    """What a file of settings says; of one that cannot be read, nothing."""
    try:
        return read_config(Path(file), file)
    except BackboneError:
        return {}


def translate(processor: Any, said: Mapping[str, Any], name: str) -> Preprocessing:
    """A processor as a `Preprocessing` that gives the same tensors.

    Args:
        processor: Of transformers.
        said: Its fields.
        name: Where it comes from, for errors.

    Raises:
        BackboneError: None does.

    Cost: nine pictures through the processor, five through each proposal: 0.1 s for one of 224 pixels.
    """
    where = f"{name} ({type(processor).__name__})"
    pictures = [make_picture(*shape) for shape in SHAPES]
    theirs = [_run(processor, picture, where, said) for picture in pictures]
    sizes = sorted({(t.shape[1], t.shape[2]) for t in theirs})
    if len(sizes) > 1:
        raise _refusal(
            where,
            said,
            f"images of different sizes: {', '.join(f'{h}x{w}' for h, w in sizes)}",
            "give its `size` a height and a width, or a `crop_size` with do_center_crop",
        )
    ((height, width),) = sizes
    # A filter without smoothing shows only where a picture gets smaller.
    pictures.append(make_picture(int(1.7 * width), int(1.4 * height)))
    theirs.append(_run(processor, pictures[-1], where, said))
    measured = _measure_colours(processor, (height, width), where, said)
    nearest = float("inf")
    for proposal in _propose(measured, said):
        error = 0.0
        for picture, wanted in zip(pictures, theirs, strict=True):
            error = max(error, _difference(proposal.image(picture), wanted))
            if error > SAME_IMAGE:
                break
        else:
            return proposal
        nearest = min(nearest, error)
    if said.get("do_rescale") is False:
        # Where it is off, images were scaled before: nothing says that bytes are meant.
        raise _refusal(
            where,
            said,
            "do_rescale=False: numbers up to 255 where a pixel comes as a byte, and up to 1 where it "
            "was scaled before",
            "say do_rescale and rescale_factor as the weights were trained",
        )
    raise _refusal(
        where,
        said,
        f"other pixels than resizing and a centre crop give (mean difference {nearest:.3f})",
        "switch off the fields that are named if the weights were trained so, "
        "or load the model by timm: or torchvision:",
    )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().mean()) if ours.shape == theirs.shape else float("inf")


def make_picture(width: int, height: int) -> Image.Image:
    """Slopes of three colours with a fixed pattern of noise: a shift or another filter shows."""
    y, x = np.mgrid[0:height, 0:width]
    slopes = np.stack([x / width, y / height, (x + y) / (width + height)], -1)
    noise = np.random.default_rng(0).random((height, width, 3))
    return Image.fromarray((178 * slopes + 77 * noise).astype(np.uint8))


def _run(processor: Any, picture: Image.Image, where: str, said: Mapping[str, Any]) -> Tensor:
    """One image as the processor gives it, `3 h w`."""
    try:
        given = processor(images=picture, return_tensors="pt")
        pixels = given["pixel_values"]
        kind = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    except _CANNOT as error:
        words = " ".join(str(error).split())[:200]
        raise _refusal(
            where,
            said,
            f"no pixel_values for one image: {type(error).__name__}: {words}",
            "use a backbone whose processor takes an image and nothing else",
        ) from None
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.shape[:2] != (1, 3):
        raise _refusal(
            where,
            said,
            f"pixel_values of shape {kind} for one image, not (1, 3, height, width)",
            "use a backbone that takes one picture of three channels: no video, tiles or patches",
        )
    return pixels[0].float()


def _measure_colours(
    processor: Any, size: tuple[int, int], where: str, said: Mapping[str, Any]
) -> Preprocessing:
    """Mean, deviation and order of channels, from what becomes of flat pictures of four colours."""
    height, width = size
    flat = [_run(processor, Image.new("RGB", SHAPES[0], c), where, said) for c in _COLOURS]
    # In the middle, where no border is.
    black, *primary = (t[:, height // 2, width // 2].double() for t in flat)
    # Row i: what the three channels of the result gain from input channel i.
    gains = torch.stack(primary) - black
    order = gains.argmax(1).tolist()
    alone = gains.clone()
    alone[range(3), order] = 0
    if order not in ([0, 1, 2], [2, 1, 0]) or float(alone.abs().max()) > SAME_NUMBER:
        raise _refusal(
            where,
            said,
            "channels that are mixed, or not in the order RGB or BGR",
            "set do_grayscale and the like to false if the weights were trained so",
        )
    scale = gains.amax(0)
    if not float(scale.min()) > 0:
        raise _refusal(where, said, "channels that are turned round", "use another backbone")
    # (p / 255 - mean) / std, at p = 0 and at p = 255.
    std, mean = 1 / scale, -black / scale
    return Preprocessing(
        size,
        mean=_as_said(mean, said.get("image_mean"), 0.0),
        std=_as_said(std, said.get("image_std"), 1.0),
        bgr=order == [2, 1, 0],
    )


def _as_said(measured: Tensor, said: Any, without: float) -> tuple[float, ...]:
    """The numbers that the fields say, where they are what was measured; else as measured."""
    for numbers in (said, [without] * 3):
        if isinstance(numbers, (list, tuple)) and len(numbers) == 3:
            wanted = torch.tensor(numbers, dtype=torch.float64)
            if float((wanted - measured).abs().max()) <= SAME_NUMBER:
                return tuple(float(v) for v in numbers)
    # Six digits: what the processor itself computes in single precision.
    return tuple(float(f"{v:.6g}") for v in measured.tolist())


def _propose(measured: Preprocessing, said: Mapping[str, Any]) -> Iterator[Preprocessing]:
    """Ways to resize and crop that the fields may mean, the likeliest first; none twice."""
    resample = said.get("resample")
    timm: Any = said.get("data_config") or {}
    # Without a word both libraries' `resize` is bilinear.
    name = FILTERS.get(int(resample), "bicubic") if resample is not None else "bilinear"
    base = replace(measured, interpolation=str(timm.get("interpolation", name)))
    size: Any = said.get("size") or {}
    size = size if isinstance(size, Mapping) else {}
    crop = said.get("crop_pct") or timm.get("crop_pct") or 0
    seen: list[Preprocessing] = []
    for resize in _propose_sizes(size, crop, measured.size):
        # A whole picture squashed into the size has had its own field, and stores have it in keys.
        squash = resize == measured.size
        proposal = replace(base, resize=None if squash else resize, squash=squash)
        if proposal not in seen:
            seen.append(proposal)
            yield proposal
    if 0 < crop <= 1:
        # As timm crops.
        yield replace(base, crop=float(crop))


def _propose_sizes(
    size: Mapping[str, Any], crop: float, out: tuple[int, int]
) -> Iterator[tuple[int, ...]]:
    short = size.get("shortest_edge")
    whole = (size.get("height"), size.get("width"))
    if short:
        if crop:
            yield (int(short / crop),)
        yield (int(short),)
        # LeViT's own.
        yield (int(256 / 224 * short),)
    if all(whole):
        height, width = (int(side) for side in whole if side)
        if crop:
            yield (int(height / crop),)
            yield (int(height / crop), int(width / crop))
        yield (height, width)
    yield out
    yield (min(out),)
    # Cropped as it is.
    yield ()


def _refusal(where: str, said: Mapping[str, Any], found: str, fix: str) -> BackboneError:
    """What is wrong with a processor, with the fields that may have to do with it."""
    on = [k for k, v in said.items() if k.startswith("do_") and v is True and k not in _READ]
    off = [k for k in ("do_resize", "do_center_crop") if said.get(k) is False]
    sizes = [
        k
        for k, v in said.items()
        if v is not None and not k.startswith("do_") and any(word in k for word in _ABOUT_SIZE)
    ]
    words = ", ".join(f"{k}={_plain(said[k])}" for k in [*on, *off, *sizes])
    return BackboneError(
        "an image processor does what cannot be repeated here",
        where=where,
        found=f"{found}; its fields: {words or 'none that decide about it'}",
        fix=fix,
    )


def _plain(value: Any) -> str:
    return str(dict(value)) if isinstance(value, Mapping) else str(value)

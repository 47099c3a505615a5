"""Images that are asked about in windows: each is a question of its own, and their answers are joined."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from restuning._errors import BusyError, TooLargeError
from restuning.backbones.images import read_image
from restuning.problems import OfPixels
from restuning.serve.batcher import Reply
from restuning.serve.inputs import ImageInputs
from restuning.serve.predictor import Answer
from restuning.serve.service import Entry, Service
from restuning.serve.tiles import Tiles
from restuning.serve.web.questions import gather


async def ask_windows(
    service: Service, content: bytes, tasks: Sequence[str] | None, said: bool | int
) -> list[Reply]:
    """The replies to one image: tasks on pixels see windows of it, all others the whole.

    Windows are asked about as many at a time as a batch has, so that others are answered between them.

    Args:
        service: Of the tasks.
        content: The bytes of its file.
        tasks: Names; None for all that answer images.
        said: Side of a window; True for the size of a task's training images.

    Raises:
        TooLargeError: The image has too many pixels, or too many windows.
        BusyError: There is no room, or a task was exchanged between two windows.
        DataError: No task answers pixels, or how large a window is.
    """
    service.limits.check(content)
    image = await asyncio.to_thread(read_image, content)
    size = (image.height, image.width)
    entries = service.list_asked("image", tasks)
    of_pixels = [each for each in entries if isinstance(each.problem, OfPixels)]
    if not of_pixels:
        # Refused in the words of the predictor.
        _find_tiles(entries, said)
    groups: dict[tuple[Any, Any], list[Entry]] = {}
    for each in of_pixels:
        groups.setdefault((each.batcher, getattr(each.problem, "window", None)), []).append(each)
    planned = [(each, _find_tiles(each, said)) for each in groups.values()]
    count = sum(len(tiles.place(size)) for _, tiles in planned)
    if count > service.limits.windows:
        raise TooLargeError(
            "an image has too many windows",
            found=f"{count:,}, and {service.limits.windows:,} are taken",
            fix="ask for larger ones (window), or send a smaller image",
        )
    others = [each.name for each in entries if each not in of_pixels]
    replies: list[Reply] = []
    if others:
        (replies,) = await gather(service.ask("image", [content], others))
    for group, tiles in planned:
        names, boxes = [each.name for each in group], tiles.place(size)
        parts: list[Reply] = []
        together = min(service.pace.batch, service.limits.inputs)
        for start in range(0, len(boxes), together):
            # The whole image as it came: what is known of it is known by its bytes.
            given = [
                content if len(boxes) == 1 else np.asarray(image.crop(box))
                for box in boxes[start : start + together]
            ]
            for each in await gather(service.ask("image", given, names)):
                parts += each
        replies.append(_join(parts, tiles, boxes, size))
    return replies


def _find_tiles(entries: Sequence[Entry], said: bool | int) -> Tiles:
    inputs = entries[0].batcher.inputs
    assert isinstance(inputs, ImageInputs)
    return Tiles.of({each.name: each.problem for each in entries}, said, inputs.preprocessing)


def _join(parts: Sequence[Reply], tiles: Tiles, boxes: Any, size: tuple[int, int]) -> Reply:
    first = parts[0]
    if any(each.versions != first.versions for each in parts) or len(parts) != len(boxes):
        raise BusyError(
            "a task was exchanged between two windows of an image",
            where=", ".join(first.versions),
            fix="ask again",
        )
    found: Mapping[str, Any] = tiles.join([each.answer.predictions for each in parts], boxes, size)
    seconds = {name: sum(each.seconds.get(name, 0.0) for each in parts) for name in first.seconds}
    cached = all(each.cached for each in parts)
    return replace(first, answer=Answer(first.answer.input, found), cached=cached, seconds=seconds)

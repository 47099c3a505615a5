"""What is asked, read from the body of a request. Nothing in it is fetched, and no path is opened."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.requests import Request

from restuning._errors import DataError
from restuning.backbones.audio import looks_like_audio
from restuning.problems import Depth, Segmentation
from restuning.serve.batcher import Reply
from restuning.serve.service import Service
from restuning.serve.web.schemas import Question

T = TypeVar("T")

MOST_TOP = 10_000

OPTIONS = ("tasks", "top", "probabilities", "tiles", "window")

YES, NO = ("1", "true", "yes"), ("0", "false", "no", "")


@dataclass
class Asked:
    """A question of the own protocol, read.

    Attributes:
        images, sounds, texts: The inputs; images and sounds as the bytes of their files.
        names: What answers call each input, images first, then sounds.
        tasks: Names; None for all.
        top: Classes to tell.
        every: Whether all probabilities are told as well.
        tiles: Side of the windows in which images are read; True for the size of a task's training images, False for none.
    """

    images: list[bytes] = field(default_factory=list)
    sounds: list[bytes] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    tasks: list[str] | None = None
    top: int = 5
    every: bool = False
    tiles: bool | int = False

    @property
    def inputs(self) -> dict[str, list[Any]]:
        """By kind, those that are there, in the order of the answers."""
        given = {"image": self.images, "audio": self.sounds, "text": self.texts}
        return {kind: inputs for kind, inputs in given.items() if inputs}


async def read_question(request: Request, service: Service) -> Asked:
    """A question from whatever form it has: multipart, JSON, or the bytes of one image or sound.

    Raises:
        DataError: It has none of these forms, or is empty.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.query_params and kind in ("multipart/form-data", "application/json"):
        raise DataError(
            "options in the address, and a body that has its own",
            found=", ".join(request.query_params)[:200],
            fix="write them in the body",
        )
    if kind == "multipart/form-data":
        asked = await _from_form(request, service)
    elif kind.startswith(("image/", "audio/")) or kind == "application/octet-stream":
        body = await request.body()
        # Who does not say what it is sends what it looks like.
        sound = kind.startswith("audio/") or (kind[:6] != "image/" and looks_like_audio(body))
        asked = Asked(sounds=[body]) if sound else Asked(images=[body])
        asked = _with_options(asked, request.query_params.multi_items())
    elif kind == "application/json":
        asked = _from_json(Question.model_validate_json(await request.body()))
    else:
        raise DataError(
            "a question of another form",
            found=kind or "no content type",
            fix="send multipart/form-data with files, application/json, or an image or a sound as it is",
        )
    if asked.tasks == []:
        raise DataError("no task is asked", where="tasks", fix="name some, or leave it out for all")
    if asked.tiles is not False and (asked.texts or asked.sounds):
        other = "texts" if asked.texts else "sounds"
        raise DataError(
            "only images are read in windows", where="tiles", fix=f"ask about {other} apart"
        )
    if not asked.inputs:
        raise DataError("nothing to answer", fix="send images, sounds or texts")
    count = sum(map(len, asked.inputs.values()))
    service.limits.check_count(count)
    asked.names = [n or str(i) for i, n in enumerate(asked.names)] or [str(i) for i in range(count)]
    return asked


async def _from_form(request: Request, service: Service) -> Asked:
    asked = Asked()
    options: list[tuple[str, str]] = []
    named: dict[str, list[str]] = {"images": [], "sounds": []}
    most = service.limits.inputs + 16
    async with request.form(
        max_files=most, max_fields=most, max_part_size=4 * service.limits.text
    ) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("image", "images", "sound", "sounds"):
                    raise _unknown(name, "send files as images or as sounds")
                media = "images" if name.startswith("image") else "sounds"
                getattr(asked, media).append(await value.read())
                named[media].append((value.filename or "")[:200])
            elif name in ("text", "texts"):
                asked.texts.append(value)
            else:
                options.append((name, value))
    asked.names = [*named["images"], *named["sounds"], *("" for _ in asked.texts)]
    return _with_options(asked, options)


def _with_options(asked: Asked, given: Iterable[tuple[str, str]]) -> Asked:
    options: dict[str, str] = {}
    for name, value in given:
        if name not in OPTIONS:
            raise _unknown(name, f"options are {', '.join(OPTIONS)}")
        if name == "tasks":
            asked.tasks = [*(asked.tasks or ()), *filter(None, value.split(","))]
        elif name in options:
            raise DataError("an option is given twice", where=name, fix="give it once")
        options[name] = value
    top = options.get("top", "5")
    if not re.fullmatch("[0-9]{1,9}", top) or not 0 < int(top) <= MOST_TOP:
        raise DataError(
            "not a number of classes", where="top", found=top[:40], fix="give 1 or more"
        )
    asked.top = int(top)
    asked.every = _read_switch(options, "probabilities")
    window = options.get("window")
    if window is not None and not re.fullmatch("[0-9]{1,9}", window):
        raise DataError("not a number of pixels", where="window", found=window[:40], fix="give one")
    side = None if window is None else int(window)
    asked.tiles = _read_tiles(_read_switch(options, "tiles"), side)
    return asked


def _read_switch(options: Mapping[str, str], name: str) -> bool:
    said = options.get(name, "false").lower()
    if said not in YES + NO:
        raise DataError(
            "neither true nor false", where=name, found=said[:40], fix="give one of them"
        )
    return said in YES


def _read_tiles(tiles: bool, window: int | None) -> bool | int:
    if window is not None and (not tiles or window < 1):
        raise DataError(
            "a window is of tiles, and has pixels",
            where="window",
            found=f"{window}, tiles {str(tiles).lower()}",
            fix="give tiles=true and 1 or more, or leave window out",
        )
    return window or tiles


def _unknown(name: str, fix: str) -> DataError:
    return DataError("an unknown name in a question", found=name[:80], fix=fix)


def _from_json(said: Question) -> Asked:
    images = [decode_file(each) for each in _listed(said.images)]
    sounds = [decode_file(each, "a sound") for each in _listed(said.sounds)]
    texts, tiles = _listed(said.texts), _read_tiles(said.tiles, said.window)
    return Asked(images, sounds, texts, [], said.tasks, said.top, said.probabilities, tiles)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def decode_file(text: str, noun: str = "an image") -> bytes:
    """The bytes of an image or a sound in base64, alone or as a `data:` address.

    Raises:
        DataError: It is neither. Other addresses are not fetched.
    """
    if text.startswith("data:"):
        text = text.partition("base64,")[2]
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not found:
        raise DataError(
            f"not {noun} in base64",
            found=repr(text[:40]),
            fix=f"send the bytes of {noun} file in base64; addresses are not fetched, paths not opened",
        )
    return found


def as_inputs(kind: str, given: Sequence[Any]) -> list[Any]:
    """Strings of a JSON body as the inputs of a task: of one on images or sounds, base64."""
    nouns = {"image": "an image", "audio": "a sound"}
    return [decode_file(each, nouns[kind]) for each in given] if kind in nouns else list(given)


def note(request: Request, inputs: int, tasks: Iterable[str] = (), **more: int) -> None:
    """What the log and a trace tell of a request that was answered; never what was asked.

    Args:
        request: It.
        inputs: How many.
        tasks: The names of those that answered.
        more: Numbers for the log.
    """
    request.state.tasks = tuple(tasks)
    request.state.told = {"inputs": inputs, "tasks": len(request.state.tasks), **more}


async def write_out(write: Callable[[], T], problems: Collection[str]) -> T:
    """Replies as a protocol writes them.

    A mask or a depth is drawn and packed now, which takes a second of a photograph: others are answered meanwhile.

    Args:
        write: Makes the answer of replies.
        problems: Of the tasks that answered, by kind.
    """
    drawn = not {Segmentation.kind, Depth.kind}.isdisjoint(problems)
    return await asyncio.to_thread(write) if drawn else write()


async def gather(asked: Sequence[Sequence[Future[Reply]]]) -> list[list[Reply]]:
    """The replies to all inputs, once all are there; those of a request that fails are given up.

    Raises:
        RestuningError: What the first of them failed of.
    """
    futures = [future for each in asked for future in each]
    try:
        await asyncio.gather(*map(asyncio.wrap_future, futures))
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [[future.result() for future in each] for each in asked]

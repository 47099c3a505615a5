"""A server of tasks, asked as a `Predictor` is."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning import _errors
from restuning._errors import BusyError, DataError, RestuningError, ServerError, require
from restuning.backbones.audio import take_samples
from restuning.data import read_image
from restuning.serve.inputs import expand, is_single
from restuning.serve.predictor import Answer
from restuning.serve.web.json_answers import prediction_from_json

TRIES = 4
"""Of a question whose task was exchanged before its labels could be asked for."""


class Client:
    """`Client("http://127.0.0.1:8000")(["a.jpg", image])` gives what a `Predictor` of the tasks gives.

    May be called from several threads at once.

    Args:
        url: Of the server.
        tasks: Names; None for all, which must be of one kind of input.
        batch_size: Inputs of one request.
        patience: Seconds that a server which has too much to do is asked again.
        timeout: Seconds for one request.
        tiles: Have images read in windows, as of `Predictor`.

    Attributes:
        kind: "image", "audio", "text" or "words".
        tasks: What each task says of itself, by name, as it was when this client was made.
        left_out: Files of folders that were not asked about so far, by reason.

    Raises:
        MissingExtraError: httpx is not installed.
        ServerError: The server does not answer.
        DataError: Its tasks are of several kinds, or there is none.
        UnknownNameError: No such task.
    """

    def __init__(
        self,
        url: str,
        *,
        tasks: Sequence[str] | None = None,
        batch_size: int = 16,
        patience: float = 60.0,
        timeout: float = 60.0,
        tiles: bool | int = False,
    ) -> None:
        httpx = require("httpx", "serve", "a client")
        self.tiles = tiles
        self.url, self.batch_size, self.patience = url.rstrip("/"), batch_size, patience
        self._broken: type[Exception] = httpx.HTTPError
        self._session = httpx.Client(base_url=self.url, timeout=timeout)
        try:
            named = [each["name"] for each in self._ask("GET", "/v1/tasks")["tasks"]]
            wanted = named if tasks is None else tasks
            found = {name: self._ask("GET", f"/v1/tasks/{name}") for name in wanted}
            kinds = sorted({task["kind"] for task in found.values()})
            self._labels = {(n, t["version"]): list(t["labels"]) for n, t in found.items()}
        except (KeyError, TypeError) as error:
            raise _no_form(f"{type(error).__name__}: {error}", self.url) from None
        if len(kinds) != 1:
            raise DataError(
                "tasks of one kind of input are asked together",
                where=self.url,
                found=", ".join(f"{name}: {task['kind']}" for name, task in found.items())[:300]
                or "no task",
                fix="name those of one kind: Client(url, tasks=[...])",
            )
        (self.kind,) = kinds
        self.left_out: dict[str, list[Path]] = {}
        self.tasks: Mapping[str, Mapping[str, Any]] = found

    @property
    def labels(self) -> dict[str, list[str]]:
        """Class names by task."""
        return {name: list(task["labels"]) for name, task in self.tasks.items()}

    def __call__(self, inputs: Any) -> list[Answer]:
        """Answers to one input or many, in their order.

        Args:
            inputs: As for a `Predictor`; tensors only as pixels, `c h w` of uint8.

        Raises:
            DataError: An input cannot be read, or is of another kind.
            BusyError: The server had too much to do for as long as `patience`.
            ServerError: It does not answer, or fails.
        """
        return list(self.stream(inputs))

    def stream(self, inputs: Any) -> Iterator[Answer]:
        """The same one after the other, a request at a time.

        Args:
            inputs: As for a call.
        """
        single = expand(
            self.kind, [inputs] if is_single(self.kind, inputs) else inputs, self.left_out
        )
        while chunk := list(islice(single, self.batch_size)):
            yield from self._answer(chunk)

    def close(self) -> None:
        """Close its connections."""
        self._session.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Where it asks, and whom."""
        return f"Client({self.url}: {', '.join(self.tasks)})"

    def _answer(self, chunk: list[Any]) -> list[Answer]:
        body: dict[str, Any]
        if self.kind in ("image", "audio"):
            sound = self.kind == "audio"
            name, make = ("sounds", _to_sound_file) if sound else ("images", _to_file)
            files = [(name, (self.kind, make(each))) for each in chunk]
            options = {"tasks": ",".join(self.tasks), "top": "1", "probabilities": "true"}
            if self.tiles is not False:
                options["tiles"] = "true"
            # A side of 1 equals True, and is another thing.
            if not isinstance(self.tiles, bool):
                options["window"] = str(self.tiles)
            body = {"files": files, "data": options}
        else:
            asked = {"texts": chunk, "tasks": [*self.tasks], "top": 1, "probabilities": True}
            body = {"json": asked}
        for _ in range(TRIES):
            said = self._ask("POST", "/v1/predict", **body)
            if self._knows_labels(said["versions"]):
                return [
                    self._read(given, each["tasks"], said["versions"])
                    for given, each in zip(chunk, said["answers"], strict=True)
                ]
        raise ServerError(
            "tasks are exchanged faster than their labels can be asked for",
            where=self.url,
            fix="ask when nobody puts tasks in",
        )

    def _knows_labels(self, versions: Mapping[str, str]) -> bool:
        for name, version in versions.items():
            if (name, version) not in self._labels:
                task = self._ask("GET", f"/v1/tasks/{name}")
                self._labels[name, task["version"]] = list(task["labels"])
        return all(each in self._labels for each in versions.items())

    def _read(self, given: Any, said: Mapping[str, Any], versions: Mapping[str, str]) -> Answer:
        labels = {name: self._labels[name, version] for name, version in versions.items()}
        if self.kind != "words":
            answers = {name: prediction_from_json(said[name], labels[name]) for name in self.tasks}
            return Answer(given, answers)
        # Words beyond the tokens that are read have no answer, so there may be fewer.
        places = range(len(next(iter(said.values()))))
        words = (
            {name: prediction_from_json(said[name][place], labels[name]) for name in self.tasks}
            for place in places
        )
        names = (said[next(iter(said))][place]["word"] for place in places)
        return Answer(given, {}, tuple(Answer(n, w) for n, w in zip(names, words, strict=True)))

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        """One answer in JSON; a server that has too much to do is asked again."""
        end = time.monotonic() + self.patience
        while True:
            try:
                answer = self._session.request(method, path, **body)
            except self._broken as error:
                raise ServerError(
                    "the server does not answer",
                    where=self.url,
                    found=str(error)[:200] or type(error).__name__,
                    fix="check the address, and that `restuning serve` runs there",
                ) from None
            if answer.status_code < 400:
                return _read_json(answer, self.url)
            error = _read_error(answer, self.url)
            wait = _read_wait(answer.headers.get("retry-after", ""))
            if not isinstance(error, BusyError) or time.monotonic() + wait > end:
                raise error
            time.sleep(wait)


def _read_wait(header: str) -> float:
    """Seconds; a proxy may say a date instead, and is asked again after one."""
    return float(header) if re.fullmatch("[0-9]{1,6}", header) else 1.0


def _read_error(answer: Any, url: str) -> RestuningError:
    """The server's error as one of ours, by the name that it has there."""
    try:
        said = answer.json()["error"]
        kind = getattr(_errors, said["type"], ServerError)
        kind = kind if isinstance(kind, type) and issubclass(kind, RestuningError) else ServerError
        parts = {n: str(said.get(n) or "") for n in ("where", "found", "fix")}
        return kind(str(said.get("what") or said["message"]), **parts)
    except (ValueError, KeyError, TypeError):
        return _no_form(_tell_form(answer), url)


def _read_json(answer: Any, url: str) -> Any:
    try:
        said = answer.json()
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise _no_form(_tell_form(answer), url)
    return said


def _tell_form(answer: Any) -> str:
    return f"status {answer.status_code}, {answer.headers.get('content-type', 'no type')[:80]}"


def _no_form(found: str, url: str) -> ServerError:
    # Whatever stands between us and the server, or in its place.
    return ServerError(
        "a server answers in no form of ours", where=url, found=found[:200], fix="check the address"
    )


def _to_file(given: Any) -> bytes:
    """The bytes of an image file; what is no file becomes a PNG, which loses nothing.

    Raises:
        DataError: It is no image.
    """
    if isinstance(given, bytes | str | Path):
        return _read_bytes(given, "image")
    if isinstance(given, Tensor):
        if given.dtype != torch.uint8 or given.dim() != 3:
            raise DataError(
                "a tensor that cannot be sent",
                found=f"{tuple(given.shape)} of {given.dtype}",
                fix="give pixels as `c h w` of torch.uint8",
            )
        given = given.permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    read_image(given).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _to_sound_file(given: Any) -> bytes:
    """The bytes of a sound file; samples with their rate become a WAV of floats, which loses nothing of float32.

    Raises:
        DataError: It is no sound.
    """
    if isinstance(given, bytes | str | Path):
        return _read_bytes(given, "sound")
    samples, rate = take_samples(given)
    soundfile = require("soundfile", "audio", "a client that sends samples")
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def _read_bytes(given: bytes | str | Path, noun: str) -> bytes:
    if isinstance(given, bytes):
        return given
    try:
        return Path(given).read_bytes()
    except OSError as error:
        raise DataError(
            f"no such {noun}", where=str(given), found=error.strerror or "", fix="check the path"
        ) from None

"""The Open Inference Protocol (KServe v2) over REST, with Triton's binary tensors: a model for each task."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from restuning._errors import BusyError, DataError, UnknownNameError
from restuning._version import __version__
from restuning.problems import MultiLabel, NumbersAnswer, Problem, Regression, SingleLabel
from restuning.serve.batcher import Reply
from restuning.serve.limits import Limits
from restuning.serve.service import Entry, Service, asked_as
from restuning.serve.web.questions import as_inputs, gather, note, write_out

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

HEADER = "Inference-Header-Content-Length"
"""How much of the body is JSON; tensors follow it as bytes."""

MOST_DEPTH = 5
"""Lists in lists of data, and axes of a shape: pixels have four."""

FLOATS: dict[type[Problem], str] = {
    Regression: "values",
    SingleLabel: "probabilities",
    MultiLabel: "probabilities",
}
"""The output beside `label`; a kind of answer that another package defines has none that we know the form of."""


@router.get("")
async def server() -> dict[str, Any]:
    """The server."""
    return {"name": "restuning", "version": __version__, "extensions": ["binary_tensor_data"]}


@router.get("/health/live", operation_id="oip_live")
async def live() -> dict[str, Any]:
    """Whether it runs."""
    return {"live": True}


@router.get("/health/ready", operation_id="oip_ready")
async def ready(request: Request) -> JSONResponse:
    """Whether it answers."""
    state: bool = request.app.state.is_ready()
    return JSONResponse({"ready": state}, 200 if state else 503)


@router.get("/models/{name}/versions/{version}/ready", operation_id="oip_version_ready")
@router.get("/models/{name}/ready", operation_id="oip_model_ready")
async def model_ready(request: Request, name: str, version: str = "") -> JSONResponse:
    """Whether a task answers."""
    entry = _find(request, name, version)
    state: bool = request.app.state.is_ready()
    return JSONResponse({"name": entry.name, "ready": state}, 200 if state else 503)


@router.get("/models/{name}/versions/{version}", operation_id="oip_version")
@router.get("/models/{name}", operation_id="oip_model")
async def model(request: Request, name: str, version: str = "") -> dict[str, Any]:
    """What a task takes and gives."""
    entry = _find(request, name, version)
    return {
        "name": entry.name,
        "versions": [entry.version],
        "platform": "restuning",
        "inputs": [{"name": _input_name(entry), "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": name, "datatype": "BYTES", "shape": [-1]}
            if name == "label"
            else {"name": name, "datatype": "FP32", "shape": [-1, len(entry.labels)]}
            for name in _outputs(entry)
        ],
    }


@router.post("/models/{name}/versions/{version}/infer", operation_id="oip_version_infer")
@router.post("/models/{name}/infer", operation_id="oip_infer")
async def infer(request: Request, name: str, version: str = "") -> Response:
    """Answer a batch: `image` as BYTES (files, in JSON as base64) or UINT8 `b h w 3`, `audio` (files) or `text` as BYTES."""
    service: Service = request.app.state.service
    # First: while it comes the task may be exchanged.
    body = await request.body()
    entry = _find(request, name, version)
    said, rest = _split(body, request.headers.get(HEADER))
    inputs = _read_inputs(said, rest, entry, service.limits)
    wanted = _read_outputs(said, _outputs(entry))
    kind = asked_as(entry.batcher.kind)
    replies = [each[0] for each in await gather(service.ask(kind, inputs, [name]))]
    _check_version(name, version, replies[0].versions[name])
    if replies[0].problems[name] != entry.problem.kind:
        # Its outputs are others than those that were read off the task that was here.
        raise BusyError(
            "the task was exchanged for one of another kind", where=name, fix="ask again"
        )
    note(request, len(replies), [name])
    return await write_out(
        lambda: _write(said, wanted, name, replies), {*replies[0].problems.values()}
    )


def _find(request: Request, name: str, version: str) -> Entry:
    entry: Entry = request.app.state.service.entry(name)
    _check_version(name, version, entry.version)
    return entry


def _check_version(name: str, wanted: str, found: str) -> None:
    if wanted not in ("", found):
        raise UnknownNameError(
            "no such version of a task",
            where=f"{name} {wanted[:80]}",
            found=f"{found} answers",
            fix="ask for this one, or for none",
        )


def _input_name(entry: Entry) -> str:
    return asked_as(entry.batcher.kind)


def _malformed(found: str, fix: str = "send a request of the Open Inference Protocol") -> DataError:
    return DataError("an inference request is malformed", found=found[:300], fix=fix)


def _split(body: bytes, length: str | None) -> tuple[dict[str, Any], bytes]:
    """The JSON of a request, and the tensors behind it."""
    if length is None:
        end = len(body)
    elif re.fullmatch("[0-9]{1,12}", length) and int(length) <= len(body):
        end = int(length)
    else:
        raise _malformed(f"{HEADER}: {length[:40]}, and the body has {len(body)} bytes")
    try:
        said = json.loads(body[:end])
    except (ValueError, RecursionError) as error:
        raise _malformed(str(error)) from None
    if not isinstance(said, dict) or not isinstance(said.get("inputs"), list):
        raise _malformed("no list of inputs")
    try:
        str(said.get("id")).encode()
    except UnicodeEncodeError as error:
        raise _malformed(str(error)) from None
    return said, body[end:]


def _read_inputs(said: Mapping[str, Any], rest: bytes, entry: Entry, limits: Limits) -> list[Any]:
    wanted = _input_name(entry)
    if entry.batcher.kind == "words":
        raise DataError(
            "a task on tagged words has answers of no one shape",
            where=entry.name,
            fix=f"ask /v1/predict or /{entry.name}/classify",
        )
    named = [each.get("name") if isinstance(each, dict) else None for each in said["inputs"]]
    if named != [wanted]:
        raise _malformed(f"inputs {named}", f"send one input, {wanted}")
    given: dict[str, Any] = said["inputs"][0]
    shape, kind = given.get("shape"), given.get("datatype")
    if (
        not isinstance(shape, list)
        or len(shape) > MOST_DEPTH
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise _malformed(f"shape {shape!r}"[:300])
    size = _parameters(given).get("binary_data_size")
    if size is not None and (type(size) is not int or size != len(rest)):
        raise _malformed(f"binary_data_size {size!r}, and {len(rest)} bytes follow")
    if kind == "UINT8" and wanted == "image":
        limits.check_count(shape[0] if shape else 0)
        return _read_pixels(given, shape, rest if size is not None else None)
    if kind != "BYTES":
        raise _malformed(f"datatype {kind!r}", "send BYTES (or images as UINT8)")
    if size is not None:
        items: list[Any] = _unpack(rest)
        limits.check_count(len(items))
        found = [_decode(item) for item in items] if wanted == "text" else items
    else:
        items = _flatten(given.get("data"))
        limits.check_count(len(items))
        if not all(isinstance(item, str) for item in items):
            raise _malformed("data that are no strings")
        found = as_inputs(wanted, items)
    if len(found) != math.prod(shape):
        raise _malformed(f"shape {shape}, and {len(found)} elements")
    if not found:
        raise _malformed("no element")
    return found


def _read_pixels(given: Mapping[str, Any], shape: list[int], rest: bytes | None) -> list[Any]:
    if len(shape) != 4 or shape[3] != 3 or not shape[0]:
        raise _malformed(f"shape {shape}", "send pixels as `b h w 3`")
    if rest is not None:
        values = np.frombuffer(rest, np.uint8)
    else:
        flat = _flatten(given.get("data"))
        if not all(type(v) is int and 0 <= v < 256 for v in flat):
            raise _malformed("data that are no bytes")
        values = np.array(flat, np.uint8)
    if values.size != math.prod(shape):
        raise _malformed(f"shape {shape}, and {values.size} elements")
    return list(values.reshape(shape))


def _parameters(of: Mapping[str, Any]) -> Mapping[str, Any]:
    found = of.get("parameters", {})
    if not isinstance(found, dict):
        raise _malformed("parameters that are no object")
    return found


def _flatten(data: Any) -> list[Any]:
    """Nested lists as one, without a recursion that a body could make deep."""
    if not isinstance(data, list):
        raise _malformed("no list of data")
    found: list[Any] = []
    around = [iter(data)]
    while around:
        for each in around[-1]:
            if not isinstance(each, list):
                found.append(each)
                continue
            if len(around) == MOST_DEPTH:
                raise _malformed(f"lists in lists, over {MOST_DEPTH} deep", "send data as one list")
            around.append(iter(each))
            break
        else:
            around.pop()
    return found


def _unpack(data: bytes) -> list[bytes]:
    """Elements of BYTES, each after its length in four bytes."""
    found, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            raise _malformed("an element of BYTES without its length")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4 + length
        if at > len(data):
            raise _malformed("an element of BYTES that is longer than the body")
        found.append(data[at - length : at])
    return found


def _decode(item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise _malformed(str(error), "send texts in UTF-8") from None


def _outputs(entry: Entry) -> tuple[str, ...]:
    floats = next((n for kind, n in FLOATS.items() if isinstance(entry.problem, kind)), None)
    return ("label",) if floats is None else (floats, "label")


def _read_outputs(said: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, bool]:
    """The outputs that are wanted, and which as bytes."""
    binary = bool(_parameters(said).get("binary_data_output"))
    given = said.get("outputs")
    if given is None:
        return dict.fromkeys(known, binary)
    wanted = {}
    for each in given if isinstance(given, list) else [None]:
        each = each if isinstance(each, dict) else {}
        name = each.get("name")
        if name not in known:
            raise _malformed(f"output {name!r}", f"ask for {', '.join(known)}")
        wanted[name] = bool(_parameters(each).get("binary_data", binary))
    return wanted


def _write(
    said: Mapping[str, Any], wanted: Mapping[str, bool], task: str, replies: Sequence[Reply]
) -> Response:
    found = [reply.answer[task] for reply in replies]
    told, parts = [], []
    for name, binary in wanted.items():
        if name != "label":
            values = np.stack([_values(each) for each in found]).astype("<f4")
            shape, kind = list(values.shape), "FP32"
            packed, data = values.tobytes, values.ravel().tolist
        else:
            labels = [p.label for p in found]
            shape, kind = [len(labels)], "BYTES"
            packed, data = _packer(labels), labels.copy
        output: dict[str, Any] = {"name": name, "datatype": kind, "shape": shape}
        if binary:
            parts.append(packed())
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            output["data"] = data()
        told.append(output)
    answer = {"model_name": task, "model_version": replies[0].versions[task], "outputs": told}
    if isinstance(said.get("id"), str):
        answer["id"] = said["id"]
    if not parts:
        return JSONResponse(answer)
    head = json.dumps(answer).encode()
    return Response(
        head + b"".join(parts),
        media_type="application/octet-stream",
        headers={HEADER: str(len(head))},
    )


def _values(said: Any) -> Any:
    if isinstance(said, NumbersAnswer):
        return np.array([number.value for number in said.numbers])
    return said.probabilities.numpy()


def _packer(labels: Sequence[str]) -> Any:
    encoded = [label.encode() for label in labels]
    return lambda: b"".join(struct.pack("<I", len(each)) + each for each in encoded)

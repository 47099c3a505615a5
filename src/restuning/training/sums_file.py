"""The sums of a solved task, beside its folder: what `restuning.update` goes on from.

They lie in `NAME.sums-DIGEST.safetensors`, DIGEST being that of the solution: a task finds the sums that it was
solved from by its own numbers, and no other. New sums are written under their own name before a task is
exchanged, and old ones are removed after, so that at every moment the task that is there has its sums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from restuning._errors import FormatError, TrainingError, warn
from restuning._files import parse_json, refuse_special, replacing
from restuning.bypass import Ridge
from restuning.bypass.sums import Sums
from restuning.features.stored import BY_ITSELF
from restuning.task import Task

FORMAT = 1
SUFFIX = ".safetensors"
DIGITS = 16
"""Of the digest of a solution, in the name of its file."""

_INPUTS, _LABELS = "inputs", "labels of inputs"
"""Tensors beside those of the sums."""


@dataclass(frozen=True)
class KeptSums:
    """Sums, and what they are of.

    Attributes:
        sums: Of all inputs that are in.
        inputs: Digests of their contents, 32 bytes each.
        labels: Their classes, by number.
        about: `describe_sums`, `accuracy` (of kept rows left out) and `updates` (how many there were).
    """

    sums: Sums
    inputs: Sequence[bytes]
    labels: Sequence[int]
    about: Mapping[str, Any]


def describe_sums(task: Task, backbone: str, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What sums belong to: another backbone, other blocks, classes or preprocessing make other rows.

    Args:
        task: That was solved from them.
        backbone: Digest of its backbone (`Extractor.digest`).
        preprocessing: As its file tells it.
    """
    assert isinstance(task.side, Ridge)
    return {
        "backbone": backbone,
        "side": task.side.spec(),
        "labels": task.labels,
        "preprocessing": dict(preprocessing),
    }


def solution_digest(task: Task) -> str:
    """sha256 of the numbers that a task was solved for, 64 hexadecimal digits."""
    assert isinstance(task.side, Ridge)
    digest = hashlib.sha256()
    for tensor in (task.side.weight, task.side.bias):
        plain = tensor.detach().cpu().float().contiguous().reshape(-1)
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


def sums_of(folder: Path, task: Task) -> Path:
    """Where the sums of a task lie that has this folder."""
    return folder.parent / f"{_start(folder)}{solution_digest(task)[:DIGITS]}{SUFFIX}"


def reason_not_kept(task: Task, rows: int, digests: int | None) -> str:
    """Why no sums are kept of a task, in words; empty where they are.

    Args:
        task: Any.
        rows: That it is solved from.
        digests: Of their contents, how many are known; None where they are not.
    """
    if not task.solved or not isinstance(task.side, Ridge):
        return "it is not solved in closed form"
    if task.side.start is not None:
        return "it started from a head, whose answers to new classes no update knows"
    if not task.problem.one_hot:
        return f"an update knows one class an input, and this is {task.problem.kind}"
    if task.side.class_weights is not None:
        return "classes are weighed by how many inputs they have, which an update would change"
    if digests != rows:
        return "its inputs are not known one by one"
    width, classes = sum(task.side.kinds), task.side.classes
    kept = Sums(1, 1).kept
    held = rows if rows <= max(kept, width) else kept
    size = held * width * 4 + classes * width * 8 + (width**2 * 8 if held < rows else 0)
    if size > BY_ITSELF:
        return f"they would be {size / 2**30:.1f} GiB (kept up to {BY_ITSELF / 2**30:.0f})"
    return ""


def write_sums(folder: Path, task: Task, kept: KeptSums) -> Path:
    """Write the sums of a task beside its folder, whole or not at all; those of other solutions stay.

    Raises:
        TrainingError: The disk is full or cannot be written.
    """
    path = sums_of(folder, task)
    tensors = kept.sums.tensors()
    digests = torch.tensor(list(b"".join(kept.inputs)), dtype=torch.uint8)
    tensors[_INPUTS] = digests.view(len(kept.inputs), -1)
    tensors[_LABELS] = torch.tensor(list(kept.labels), dtype=torch.long)
    about = json.dumps({**kept.about, "solution": solution_digest(task)})
    header = {"format": str(FORMAT), "about": about, "sha256": _digest(about, tensors)}
    try:
        with replacing(path, apart=True) as partial:
            save_file(tensors, partial, metadata=header)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            "the sums of a task cannot be written",
            where=str(path),
            found=getattr(error, "strerror", None) or str(error),
            fix="free space or make the folder writable; the task and its sums are as they were",
        ) from None
    return path


def read_sums(folder: Path, task: Task) -> KeptSums:
    """The sums of a task, proved whole and its own.

    Raises:
        FormatError: There are none, they are damaged, or of another task.
    """
    path = sums_of(folder, task)
    if not path.exists():
        others = sorted(p.name for p in _find_all(folder))
        raise FormatError(
            "a task without its sums cannot be updated",
            where=str(folder),
            found=f"no {path.name} beside it"
            + (f"; {others[0]} is of another solution" if others else ""),
            fix="give the task in the folder of its run, where `restuning train --method ridge` left both; "
            "or train it again, without --class-weights (with them no sums are kept: with other rows the weights are others)",
        )
    about, tensors = _read(path)
    digests = tensors.pop(_INPUTS)
    labels = tensors.pop(_LABELS).tolist()
    if about.get("solution") != solution_digest(task):
        raise _damaged(path, "they are of another solution")
    sums = Sums.from_tensors(tensors)
    inputs = [bytes(row) for row in digests.numpy()]
    if not len(inputs) == len(labels) == sums.count:
        raise _damaged(path, f"{len(inputs)} inputs, {sums.count} rows")
    return KeptSums(sums, inputs, labels, about)


def find_updated(folder: Path) -> Path | None:
    """Sums beside a task folder that were updated since training, if there are any."""
    for path in _find_all(folder):
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
            if about["updates"]:
                return path
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            continue
    return None


def remove_other_sums(folder: Path, task: Task) -> None:
    """Remove sums of solutions that a task no longer has; what cannot be removed is named in a warning."""
    own = sums_of(folder, task) if isinstance(task.side, Ridge) else None
    for path in _find_all(folder):
        if path != own:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                warn(
                    "old sums of a task cannot be removed",
                    where=str(path),
                    found=error.strerror or str(error),
                    fix="remove the file; no task reads it any more",
                )


def _start(folder: Path) -> str:
    return f"{folder.name.removesuffix('.task')}.sums-"


def _find_all(folder: Path) -> list[Path]:
    start, digits = _start(folder), set("0123456789abcdef")
    found = []
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        middle = path.name.removeprefix(start).removesuffix(SUFFIX)
        if path.name == f"{start}{middle}{SUFFIX}" and len(middle) == DIGITS:
            found += [path] if set(middle) <= digits else []
    return sorted(found)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        refuse_special(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # `safe_open` has keys() but cannot be iterated.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = parse_json(header["about"], str(path), what="sums of a task", fix="")
        if header["format"] != str(FORMAT):
            raise ValueError(f"format {header['format']}, we read {FORMAT}")
        if header["sha256"] != _digest(header["about"], tensors):
            raise ValueError("their contents do not match their sha256")
        if not {_INPUTS, _LABELS} <= tensors.keys() or not isinstance(about, dict):
            raise ValueError("they do not say of which inputs they are")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    return about, tensors


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, found: str) -> FormatError:
    return FormatError(
        "the sums of a task cannot be read",
        where=str(path),
        found=found[:300],
        fix="train the task again; the task itself answers without them",
    )

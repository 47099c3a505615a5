"""Checkpoints of the task, never of the backbone: one safetensors file each, no pickle.

Tensors are tensors of the file; everything else is JSON in its header, so that one rename makes
both appear together. No generator state is kept: `randomness.py` says why none is needed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from restuning._errors import FormatError, TrainingError
from restuning._files import parse_json, refuse_special, replacing

FORMAT = 1
KEEP = 2
"""The newest, and one to fall back to if the newest is damaged."""
FINAL = "final.safetensors"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Snapshot:
    """What a run needs to go on.

    Args:
        tensors: By name: `task.*`, `optimiser.INDEX.KEY`, `ema.*`, `callback.PLACE.KEY`.
        state: Plain JSON values.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix.`, without it."""
        start = f"{prefix}."
        return {n[len(start) :]: t for n, t in self.tensors.items() if n.startswith(start)}


def take(
    task: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    mean: Mapping[str, Tensor] | None,
    state: dict[str, Any],
    callbacks: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> Snapshot:
    """Copy a run's tensors to the CPU, and those that callbacks remember."""
    tensors = {f"task.{n}": t for n, t in task.state_dict().items()}
    if optimiser is not None:
        # AdamW's step count is a tensor, too, so all that an entry holds fits into safetensors.
        for index, entry in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": v for k, v in entry.items()}
    tensors |= {f"ema.{n}": t for n, t in (mean or {}).items()}
    plain = []
    for place, (name, own) in enumerate(callbacks):
        held = {n: v for n, v in own.items() if isinstance(v, Tensor)}
        tensors |= {f"callback.{place}.{n}": t for n, t in held.items()}
        plain.append([name, {n: v for n, v in own.items() if n not in held}])
    if plain:
        state = {**state, "callbacks": plain}
    # A clone each: safetensors refuses tensors that share memory.
    copies = {
        n: t.detach().to("cpu", copy=True).clone(memory_format=torch.contiguous_format)
        for n, t in tensors.items()
    }
    return Snapshot(copies, state)


def read_callbacks(snapshot: Snapshot) -> list[tuple[str, dict[str, Any]]]:
    """What callbacks remember, as `take` was given it."""
    return [
        (name, {**own, **snapshot.part(f"callback.{place}")})
        for place, (name, own) in enumerate(snapshot.state.get("callbacks", ()))
    ]


def restore_optimiser(optimiser: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    """Put an optimiser's moments back; its groups are those it was built with."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in snapshot.part("optimiser").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    # Rates are set anew at every step and the decay stands in the run's identity: nothing is lost.
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def write(folder: Path, snapshot: Snapshot, *, final: bool = False) -> Path:
    """Write a checkpoint whole or not at all, then remove those no longer needed.

    Args:
        folder: Where the checkpoints of the run lie.
        snapshot: `state["step"]` names the file.
        final: The run is finished: no other checkpoint is kept.

    Raises:
        TrainingError: The disk is full or the folder cannot be written; older ones are untouched.
    """
    path = folder / (FINAL if final else f"step-{snapshot.state['step']:09d}{SUFFIX}")
    header = {
        "format": str(FORMAT),
        "state": json.dumps(snapshot.state),
        # safetensors checks lengths, not contents: a flipped bit would go unnoticed.
        "sha256": _digest(snapshot),
    }
    try:
        with replacing(path, apart=True) as partial:
            save_file(snapshot.tensors, partial, metadata=header)
        # Only now that the new one has its name: a kill in between leaves one too many, never none.
        for old in [p for p in _list_checkpoints(folder) if p != path][0 if final else KEEP - 1 :]:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            "a checkpoint cannot be written",
            where=str(path),
            found=getattr(error, "strerror", None) or str(error),
            fix="free space or make the folder writable, and run the same command again: it goes "
            "on from the checkpoint before this one, which is whole",
        ) from None
    return path


def read(path: Path) -> Snapshot:
    """Read a checkpoint and prove it whole.

    Raises:
        FormatError: Truncated, damaged, or of another format.
    """
    try:
        refuse_special(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # `safe_open` has keys() but cannot be iterated.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = parse_json(header["state"], str(path), what="a checkpoint", fix="")
        snapshot = Snapshot(tensors, state)
        intact = header["sha256"] == _digest(snapshot) and isinstance(state["step"], int)
        version = header["format"]
    # A damaged file fails where the damage lies: in the header, in its JSON, or in a tensor.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise FormatError("a checkpoint is damaged", where=str(path), found=found[:200]) from None
    if version != str(FORMAT):
        raise FormatError("a checkpoint of another format", where=str(path), found=version)
    if not intact:
        found = "its contents do not match their checksum"
        raise FormatError("a checkpoint is damaged", where=str(path), found=found)
    return snapshot


def read_newest(folder: Path, *, warn: bool = True) -> Snapshot | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning."""
    for path in _list_checkpoints(folder):
        try:
            return read(path)
        except FormatError as error:
            if warn:
                what = f"{error}\n  going on from the checkpoint before it, or from the start"
                warnings.warn(what, RuntimeWarning, stacklevel=2)
    return None


def is_finished(folder: Path) -> bool:
    """Whether a run ended here."""
    return (folder / FINAL).exists()


def clear(folder: Path) -> None:
    """Remove the checkpoints of a folder and nothing else.

    Raises:
        TrainingError: One cannot be removed.
    """
    try:
        for path in _list_checkpoints(folder):
            path.unlink(missing_ok=True)
        # What a killed `write` left beside: `replacing` writes under a hidden name first.
        for path in folder.glob(f".*{SUFFIX}.*partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(
            "an old checkpoint cannot be removed",
            where=str(folder),
            found=error.strerror or str(error),
            fix="remove it, or choose another --out",
        ) from None


def _list_checkpoints(folder: Path) -> list[Path]:
    """Newest first; a finished run's comes before all others."""
    # Steps are padded to nine digits, so that names sort as numbers do.
    steps = sorted(folder.glob(f"step-*{SUFFIX}"), reverse=True)
    final = folder / FINAL
    return [final, *steps] if final.exists() else steps


def _digest(snapshot: Snapshot) -> str:
    digest = hashlib.sha256(json.dumps(snapshot.state).encode())
    for name in sorted(snapshot.tensors):
        tensor = snapshot.tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel():
            # As bytes, because NumPy knows no bfloat16.
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

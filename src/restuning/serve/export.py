"""Tasks and their backbone as one file that answers without this library: an ONNX file, or a `torch.export` program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import EngineError
from restuning._version import __version__
from restuning.backbones.engines.export import refuse_sounds
from restuning.backbones.engines.program import (
    RUNTIMES,
    explain_failures,
    input_names,
    make_three,
    make_two_inputs,
    replace_when_done,
    run_once,
    trace,
    write_onnx,
    write_pt2,
)
from restuning.host import Host
from restuning.serve.predictor import Predictor
from restuning.task import MultiTask

KEY = "restuning.tasks"
"""Of the text beside the graph: what goes in, and what each output stands for."""
TOLERANCE = 1e-3
"""Largest difference of a probability, or of a number relative to its size, from PyTorch's: other kernels add in another
order. Millionths are usual; a classifier that is sure of all it has seen has logits of hundreds, and makes more of it."""


@dataclass(frozen=True)
class ExportedTasks:
    """What was written.

    Attributes:
        file: Where.
        bytes: Of it.
        runtime: "onnx" or "pt2".
        tasks: Names, which are those of the outputs in their order.
        forwards: Passes through the backbone in it: one for all tasks beside it, one more for each inside.
        largest: Difference from PyTorch on random inputs; see `TOLERANCE`.
    """

    file: Path
    bytes: int
    runtime: str
    tasks: tuple[str, ...]
    forwards: int
    largest: float


class _Answers(nn.Module):
    """Inputs by position to what each task tells: probabilities or numbers, in the order of the tasks."""

    def __init__(self, predictor: Predictor, names: tuple[str, ...]) -> None:
        super().__init__()
        # Made anew: a server's may hold several banks.
        self.multi = MultiTask(predictor.host, predictor.tasks)
        self.names = names
        # Not the tasks themselves, of which the bank has copies.
        self.told = [(task.problem, task.temperature) for task in predictor.tasks.values()]

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """One tensor a task."""
        named = dict(zip(self.names, args, strict=True)) if self.names else {}
        logits = self.multi(**named) if named else self.multi(*args)
        read = zip(self.told, logits.values(), strict=True)
        return tuple(problem.values(z, temperature) for (problem, temperature), z in read)


def export_tasks(predictor: Predictor, out: str | Path, *, runtime: str = "onnx") -> ExportedTasks:
    """Write a backbone and all tasks on it as one file, and compare what that answers with PyTorch.

    Its inputs are prepared as the backbone's (for images `b 3 h w`); its outputs have the names of the tasks and hold what
    a `Predictor` tells: a probability for each label, at the task's temperature, or numbers in their units. Beside
    the graph lies a JSON text under `KEY`: preprocessing, the form of inputs, labels and problem of each output.

    Args:
        predictor: `Predictor.load(tasks)`, on the CPU and in fp32.
        out: The file, by habit `NAME.onnx` or `NAME.pt2`.
        runtime: "onnx", or "pt2" (`torch.export`).

    Raises:
        EngineError: It cannot be exported, is larger than 2 GiB (ONNX), or answers otherwise than PyTorch.
        MissingExtraError: `onnx`, `onnxscript` or `onnxruntime` is not installed.

    Cost: half a minute for a ViT-B, and about three times its memory. A pass through the file is one through the
    backbone, and one more for each task inside it.
    """
    out, backbone = Path(out), predictor.backbone
    if runtime not in RUNTIMES:
        raise EngineError("no such runtime", found=runtime, fix=f"give {' or '.join(RUNTIMES)}")
    if not isinstance(predictor.host, Host):
        raise EngineError(
            "this is an engine already, and cannot be put into a file with its tasks",
            where=backbone.name,
            fix="open the tasks on the PyTorch backbone (any_backbone=True, --any-backbone), and export that",
        )
    refuse_sounds(backbone)
    if predictor.host.device.type != "cpu":
        raise EngineError(
            "tasks are exported from the CPU",
            where=backbone.name,
            found=str(predictor.host.device),
            fix='open them with device="cpu"',
        )
    names, example = input_names(backbone), make_two_inputs(backbone)
    module = _Answers(predictor, tuple(backbone.kwargs)).eval()
    tasks = tuple(predictor.tasks)
    if taken := set(tasks) & set(names):
        raise EngineError(
            "a task has the name of an input of the backbone",
            found=", ".join(sorted(taken)),
            fix="give it another name: Predictor.load({NAME: FOLDER}), or rename its folder",
        )
    metadata = {KEY: json.dumps(_describe(predictor, names, example))}
    with (
        explain_failures(", ".join(tasks), "another runtime (onnx, pt2), or `restuning serve`"),
        torch.no_grad(),
    ):
        program = trace(module, example, any_length=bool(module.names))
        with replace_when_done(out) as partial:
            if runtime == "pt2":
                write_pt2(program, partial, metadata)
            else:
                write_onnx(program, partial, names, tasks, metadata)
            three = make_three(example)
            ours, theirs = module(*three), run_once(runtime, partial, names, three)
            largest = max(
                float((mine - other).abs().max() / mine.abs().max().clamp(min=1))
                for mine, other in zip(ours, theirs, strict=True)
            )
            if not largest <= TOLERANCE:
                raise EngineError(
                    "the exported file answers otherwise than PyTorch",
                    where=", ".join(tasks),
                    found=f"differences up to {largest:.2g}, at most {TOLERANCE:g} is rounding",
                    fix="another runtime, or `restuning serve`; nothing was written",
                )
    forwards = module.multi.forwards
    return ExportedTasks(out, out.stat().st_size, runtime, tasks, forwards, largest)


def _describe(
    predictor: Predictor, names: Sequence[str], example: Sequence[Tensor]
) -> dict[str, Any]:
    any_length = bool(predictor.backbone.kwargs)
    return {
        "format": 1,
        "restuning": __version__,
        "backbone": {"name": predictor.backbone.name, "digest": predictor.host.digest()},
        "inputs": {
            name: {
                # None where any size goes: batches, and lengths of texts.
                "shape": [None if n == 0 or any_length else k for n, k in enumerate(x.shape)],
                "dtype": str(x.dtype).removeprefix("torch."),
            }
            for name, x in zip(names, example, strict=True)
        },
        "preprocessing": predictor.preprocessing,
        "outputs": {
            name: {
                "problem": task.problem.spec(),
                "labels": predictor.labels[name],
                "temperature": task.temperature,
            }
            for name, task in predictor.tasks.items()
        },
    }

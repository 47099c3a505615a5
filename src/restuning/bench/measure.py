"""What a run is measured by: right answers, counted memory, times, versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from restuning._errors import FormatError
from restuning._files import parse_json, read_bytes
from restuning.training.evaluate import autocast, find_task_device, iterate_logits

# Those whose releases change numbers.
PACKAGES = ("restuning", "torch", "timm", "numpy", "peft", "transformers", "ms-swift")
ROUNDS = 5
"""Timed forwards, the bare backbone's and the method's in turns; the medians count."""

INFERRED = 32
"""Images of a timed forward."""


def predict_split(
    tuned: nn.Module, data: Any, collate: Callable | None, batch_size: int, precision: str
) -> tuple[np.ndarray, np.ndarray]:
    """Classes that a model in eval mode answers with, and those that are right.

    Args:
        tuned: Gives logits.
        data: `(input, label)`, map-style.
        collate: As `Data.collate`.
        batch_size: Inputs of one forward.
        precision: "bf16" runs under autocast, as the training did.
    """
    classes: list[Tensor] = []
    right: list[Tensor] = []
    with autocast(find_task_device(tuned), precision):
        for logits, labels in iterate_logits(tuned, data, batch_size, collate):
            classes.append(logits.argmax(1).cpu())
            right.append(labels.cpu())
    return torch.cat(classes).numpy(), torch.cat(right).numpy()


def measure_inference(
    tuned: nn.Module, bare: nn.Module, images: Tensor, precision: str
) -> dict[str, float]:
    """Seconds an image, from pixels to logits, and of the bare backbone in turns with it."""
    device = next(bare.parameters()).device
    images = images.to(device)
    times: dict[str, list[float]] = {"tuned": [], "bare": []}
    with torch.no_grad(), autocast(device, precision):
        for number in range(ROUNDS + 1):
            # In turns, so that a machine that slows down slows both.
            for name, module in (("tuned", tuned), ("bare", bare)):
                start = time.perf_counter()
                module(images)
                if device.type == "cuda":
                    # A launch returns before the work is done.
                    torch.cuda.synchronize()
                # The first round warms caches and is not counted.
                if number:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) / len(images) for name, values in times.items()}


def read_step_seconds(log: Path) -> float | None:
    """Seconds of a training step: the median over the stretches of a run's log."""
    each: list[float] = []
    before: tuple[int, float] | None = None
    try:
        text = read_bytes(log).decode()
    except (OSError, ValueError) as error:
        raise _malformed_log(log, str(error)) from None
    for line in text.split("\n"):
        entry = parse_json(line, str(log), what="a line of a log") if line else {}
        # Lines of validation and of the end carry no time of a step.
        if "lr" not in entry or "loss" not in entry or "accuracy" in entry:
            continue
        step, seconds = entry.get("step"), entry.get("seconds")
        if not isinstance(step, int) or not isinstance(seconds, int | float):
            raise _malformed_log(log, line)
        now = step, float(seconds)
        # A resumed run begins again at an earlier step: that stretch is no time of a step.
        if before is not None and now[0] > before[0]:
            each.append((now[1] - before[1]) / (now[0] - before[0]))
        before = now
    return statistics.median(each) if each else None


def _malformed_log(log: Path, found: str) -> FormatError:
    return FormatError(
        "a log is malformed",
        where=str(log),
        found=found[:200],
        fix="delete the folder of this run and make it again",
    )


def count_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def read_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of the packages that change numbers."""
    numbers = {"python": platform.python_version()}
    for package in packages:
        try:
            numbers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return numbers


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Describe the machine that a run computed on."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(errors="replace").splitlines() if facts.exists() else []
    name = next((ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name")), "")
    machine = {
        "device": device.type,
        "cpu": name or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine

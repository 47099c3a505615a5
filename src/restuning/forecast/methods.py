"""Forecasts by the name of a method, for backbones whose weights need not be there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from restuning._errors import ForecastError
from restuning.backbones import QUANTIZED, Backbone, load_backbone
from restuning.backbones.variants import split_variants
from restuning.features import Cached
from restuning.features.codec import BYTES, check_dtype
from restuning.features.key import pool_taps
from restuning.forecast.shapes import AbsentWeights, expand_example, shapes_only, strip_weights
from restuning.forecast.step import StepForecast, forecast_step, split_inputs
from restuning.host import Host
from restuning.runtime.meta import without_contents
from restuning.sites import Needs
from restuning.task import Task, Tuned, prepare_example

Form = Literal["cached", "live", "checkpointing"]
"""How a task is trained: from stored features, through the backbone, or so with its blocks run again
in backward."""


def load_shapes(name: str) -> tuple[Backbone, Host]:
    """A backbone by name without weights, and a host on it.

    Its tensors are on `meta`; its sites are those that a host with weights finds, without the
    projections (see `AbsentWeights`).

    Raises:
        UnknownNameError: No such backbone.
        ForecastError: The backbone is quantised.
        NoSitesError: None found.
    """
    if quantised := [v for v in split_variants(name)[1] if v in QUANTIZED]:
        raise ForecastError(
            "a forecast is of a backbone in its own precision",
            where=name,
            found=quantised[0],
            fix="leave it out; docs/planning.md says what quantised weights take",
        )
    with without_contents():
        backbone = load_backbone(name, random=True)
    backbone = replace(
        backbone,
        example=tuple(map(_real, backbone.example)),
        kwargs={k: _real(v) for k, v in backbone.kwargs.items()},
        weights="none",
    )
    with AbsentWeights():
        return backbone, Host(backbone.model, *backbone.example, **backbone.kwargs)


def load_drawn(name: str) -> tuple[Backbone, Host]:
    """The same with random weights, for methods that borrow projections."""
    backbone = load_backbone(name, random=True)
    return backbone, Host(backbone.model, *backbone.example, **backbone.kwargs)


def _real(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value.dtype)
    return torch.ones(value.shape, dtype=value.dtype)


def storable(task: Task) -> bool:
    """Whether a task can be trained from stored features: nothing of it is inside the backbone."""
    return not task.inline_tuners and not len(task.weights)


def forms(task: Task) -> tuple[Form, ...]:
    """How a task can be trained."""
    if storable(task):
        return ("cached", "live")
    return ("live", "checkpointing")


def tap_shapes(host: Host, needs: Needs, example: Any) -> dict[str, Tensor]:
    """The taps of one input, as tensors that hold nothing."""
    mode = shapes_only()
    fake: Any = strip_weights(host, mode)
    taps = tuple(host.sites.taps[-1] if t == "last" else t for t in needs.taps)
    args, kwargs = split_inputs(expand_example(example, 1, mode))
    with mode:
        found = fake.features(*args, keep=Needs(taps, needs.tokens), **kwargs)
        return dict(pool_taps(found, needs.pool_patches, host.sites.taps[-1]))


def store_bytes(taps: Mapping[str, Tensor], rows: int, dtype: str = "fp32") -> int:
    """Bytes of the values of a store: rows times the numbers of all taps of one input.

    Args:
        taps: Of `tap_shapes`.
        rows: Inputs of all splits, each view of the training split counted.
        dtype: "fp32", "bf16", "fp16" or "int8".

    Raises:
        StoreError: No such dtype.
    """
    values = sum(tap[0].numel() for tap in taps.values())
    return rows * values * BYTES[check_dtype(dtype)]


class OnTaps(Cached):
    """What `Cached` runs, without a store."""

    def __init__(self, host: Host, task: Task) -> None:
        nn.Module.__init__(self)
        self.host, self.task = host, task
        self._last, self._needs = host.sites.taps[-1], task.needs(host.readout_rule)


@contextmanager
def checkpointed(host: Host, on: bool) -> Iterator[None]:
    """Activation checkpointing of a host's blocks for a while."""
    if not on:
        yield
        return
    host.checkpoint()
    try:
        yield
    finally:
        host.checkpoint(False)


def forecast_task(
    host: Host,
    task: Task,
    example: Any,
    batch: int,
    *,
    form: Form = "live",
    precision: str = "no",
    pieces: int = 1,
    device: str = "cpu",
) -> StepForecast:
    """One training step of a task.

    Args:
        host: Its backbone, which may be on `meta`.
        task: Only shapes are read.
        example: One input with a batch axis of 1.
        batch: Inputs of a step.
        form: "cached" trains from stored features, "checkpointing" runs each block again in
            backward; see `forms`.
        precision: Autocast.
        pieces: Of gradient accumulation.
        device: Whose kernels are used.
    """
    more: dict[str, Any] = {"precision": precision, "pieces": pieces, "device": device}
    trained = [p for p in task.parameters() if p.requires_grad]
    if form == "cached":
        taps = tap_shapes(host, task.needs(host.readout_rule), example)
        example = prepare_example(task, taps)
        return forecast_step(OnTaps(host, task), example, batch, trained=trained, **more)
    with checkpointed(host, form == "checkpointing"):
        example = prepare_example(task, example)
        return forecast_step(Tuned(host, task).train(), example, batch, trained=trained, **more)

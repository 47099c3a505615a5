"""Metrics of torchmetrics, several together, and what they have found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def read_meter(meter: Any) -> float | None:
    """What a metric has found; None where it is not defined on what it was shown."""
    try:
        value = float(meter.compute())
    except ValueError:
        # Of a single example there is no share of variance.
        return None
    return value if math.isfinite(value) else None


def read_meters(meters: Any) -> dict[str, float | None]:
    """What every metric of a collection has found."""
    return {name: read_meter(meter) for name, meter in meters.items()}


def collect(metrics: Mapping[str, Any]) -> Any:
    """A `MetricCollection` of these, each with a state of its own."""
    from torchmetrics import MetricCollection

    return MetricCollection(dict(metrics), compute_groups=False)


def keep_order(logits: Tensor) -> Tensor:
    """Numbers from 0 to 1 in the order of logits: softmaxes and sigmoids of large ones are all 1, and no order any more."""
    # In double precision none that differ come out the same; MPS has none.
    exact = logits.float() if logits.device.type == "mps" else logits.double()
    exact = exact.clamp(-1e30, 1e30)
    return (1 + exact / (1 + exact.abs())) / 2

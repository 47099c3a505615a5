"""Ways a run fails that more than a message can help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from restuning._errors import TrainingError
from restuning.train.settings import FitSettings


def diverged(
    step: int, rate: float, found: str, settings: FitSettings, folder: Path
) -> TrainingError:
    """The loss or a weight is NaN or infinite."""
    other = ', precision="bf16" or "no"' if settings.precision == "fp16" else ""
    return TrainingError(
        "training diverged",
        where=f"step {step}, learning rate {rate:.3g}",
        found=found,
        fix=f"lower lr (it is {settings.lr:g}), set clip=1.0{other}, or look for NaN in the data; "
        "start again with --no-resume or another --out. The last good checkpoint is kept in "
        f"{folder}",
    )


def short_of_memory(error: Exception, settings: Any) -> TrainingError:
    """The device has no room for a piece of a batch."""
    return TrainingError(
        "the device is out of memory",
        found=str(error).splitlines()[0][:200],
        fix=f"run each batch in more pieces (accumulate={2 * settings.accumulate}; the steps stay "
        'the same), or use precision="bf16" or a bypass method; with --no-resume or another --out',
    )

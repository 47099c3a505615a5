"""The optimiser and the schedule of `fit`, for training loops of others."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from restuning._errors import TrainingError
from restuning.training import FitSettings, build_optimiser, learning_rate
from restuning.training.optimiser import set_rates
from restuning.training.settings import is_number

WARMUP = 0.1
"""Share of all steps in which the rate rises, as `FitSettings` has it of epochs."""


def make_optimizers(
    task: nn.Module,
    steps: int,
    *,
    lr: float = FitSettings.lr,
    weight_decay: float = FitSettings.weight_decay,
    lambda_rate: float = FitSettings.lambda_rate,
    warmup: float = WARMUP,
) -> tuple[AdamW, LambdaLR]:
    """AdamW over the task's groups, and linear warm-up and half a cosine over `steps` steps.

    The same rates as `fit` sets: `lr` times `lambda_rate` for lambdas, no decay of vectors.

    Args:
        task: What is trained.
        steps: Optimiser steps of the whole run.
        lr: Highest rate; this and what follows with the defaults of `FitSettings`.
        weight_decay: Of matrices.
        lambda_rate: What multiplies the rate of the lambdas of a bypass.
        warmup: Share of the steps.

    Raises:
        TrainingError: A value is out of its range, or the task has nothing to train.
    """
    settings = FitSettings(lr=lr, weight_decay=weight_decay, lambda_rate=lambda_rate)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise TrainingError(
            "a setting is out of its range",
            where="steps",
            found=repr(steps),
            fix="give the number of optimiser steps of the whole run, epochs times batches of one; of "
            "Lightning max_steps, or max_epochs and a loader with a length",
        )
    if not is_number(warmup) or not 0 <= warmup <= 1:
        raise TrainingError(
            "a setting is out of its range",
            where="warmup",
            found=repr(warmup),
            fix="give a share of the steps, from 0 to 1",
        )
    optimiser = build_optimiser(
        task, lr=lr, weight_decay=weight_decay, lambda_rate=settings.lambda_rate
    )
    # Before the schedule reads them: it multiplies what each group has by one number.
    set_rates(optimiser.param_groups, lr)
    rising = round(warmup * steps)

    def factor(step: int) -> float:
        return learning_rate(step, total=steps, warmup=rising, peak=1.0)

    return optimiser, LambdaLR(optimiser, factor)

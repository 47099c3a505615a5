"""White-box attacks on the pixels: FGSM and PGD, through backbone and side networks alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from restuning._torch import is_gradient_switch
from restuning.task import Tuned

STEPS = 10
"""Number of steps of PGD (Madry et al. 2018 use 7 to 20 on CIFAR)."""

STRIDE = 2.5
"""Steps of PGD together are this many times its radius, as in the code of Madry et al."""


class _Through(TorchFunctionMode):
    """Gradients pass where a detached method cuts them: an attacker is not bound by that.

    Without this a bypass would look robust only because its gradient is hidden (Athalye et al.
    2018).
    """

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The tensor itself, graph and all.
        if func in (torch.Tensor.detach, torch.detach):
            return args[0]
        # Switching on is let through; only `no_grad` and its kin would hide the gradient.
        if is_gradient_switch(func) and not args[0]:
            return None
        return func(*args, **(kwargs or {}))


def attackable_logits(tuned: nn.Module, x: Tensor) -> Tensor:
    """Logits of images, differentiable in the images whatever the method detaches."""
    with _Through():
        task: Any = getattr(tuned, "task", None)
        if isinstance(tuned, Tuned) and not (task.inline_tuners or len(task.weights)):
            host: Any = tuned.host
            features, _ = host.run_tuned({}, task.needs(host.readout_rule), x)
            return task(features, host.readout)
        return tuned(x)


def input_gradient(
    tuned: nn.Module, x: Tensor, labels: Tensor, normalise: Callable[[Tensor], Tensor]
) -> Tensor:
    """Gradient of the cross entropy in the pixels, `b 3 h w` in 0..1."""

    def loss(pixels: Tensor) -> Tensor:
        logits = attackable_logits(tuned, normalise(255 * pixels))
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    # A transform rather than `backward`: the fused bypass, which has no gradient in taps, then steps
    # back for the bypass as it is written.
    return torch.func.grad(loss)(x)


def fgsm(
    tuned: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    radius: float,
) -> Tensor:
    """Images one signed step away (Goodfellow et al. 2015).

    Args:
        tuned: In eval mode.
        pixels: `b 3 h w`, bytes.
        labels: Right classes.
        normalise: Bytes to what the backbone takes.
        radius: Largest change of a value, of 255.

    Returns:
        `b 3 h w` as floats between 0 and 255.
    """
    x = pixels.float() / 255
    # Pixels from 0 to 1, as in the papers; the radius is told in 255ths.
    step = input_gradient(tuned, x, labels, normalise).sign()
    return 255 * (x + radius / 255 * step).clamp(0, 1)


def pgd(
    tuned: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    radius: float,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Images after several signed steps inside the radius, from a random start (Madry et al. 2018).

    Args as for `fgsm`, and
        steps: Number.
        seed: Of the start.
    """
    x, reach = pixels.float() / 255, radius / 255
    # The same start for every method.
    generator = torch.Generator().manual_seed(seed)
    attacked = (x + reach * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(steps):
        step = input_gradient(tuned, attacked, labels, normalise).sign()
        attacked = attacked + STRIDE * reach / steps * step
        # Back into the ball of the radius, then into what an image can be.
        attacked = torch.minimum(torch.maximum(attacked, x - reach), x + reach).clamp(0, 1)
    return 255 * attacked

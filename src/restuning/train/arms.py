"""Arms of a sweep trained together: stacked weights, each arm with an optimiser of its own.

Nothing is shared between arms but the features they read: own learning rate, moments, clipping
and schedule. An arm that turns NaN stays alone with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from restuning._errors import TrainingError
from restuning.features import StoredFeatures
from restuning.host import Host
from restuning.sites import one_token
from restuning.task import Task
from restuning.train.optimiser import learning_rate
from restuning.train.randomness import Order
from restuning.train.settings import FitSettings

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""AdamW's, as torch's defaults that `fit` uses."""

EVALUATED = 256
"""Inputs of one evaluation batch."""


@dataclass
class ArmResult:
    """What became of one arm.

    Attributes:
        task: With its final weights.
        val_accuracy: After each epoch; empty without validation data.
        train_loss: Mean over the last epoch.
        died_at: Step (from 1) at which its loss was no longer finite, or None.
    """

    task: Task
    val_accuracy: list[float]
    train_loss: float
    died_at: int | None


def train_arms(
    host: Host,
    tasks: Sequence[Task],
    settings: Sequence[FitSettings],
    train: StoredFeatures,
    val: StoredFeatures | None,
    *,
    each_epoch: Callable[[int, list[float]], None] = lambda epoch, accuracy: None,
) -> list[ArmResult]:
    """Train tasks of one form at once; each ends as its own `fit` from the store would.

    Args:
        host: Lends its readout.
        tasks: Bypass tasks (or heads alone) whose weights have the same shapes.
        settings: One each; all but `lr`, `weight_decay`, `clip` and `label_smoothing` equal.
        train: Stored features.
        val: Stored features, evaluated after every epoch.
        each_epoch: Told the number of the epoch and the arms' validation accuracies.

    Raises:
        TrainingError: Settings differ where arms must agree.
    """
    first = settings[0]
    for one in settings:
        same = ("epochs", "batch_size", "seed", "warmup", "accumulate", "precision", "ema")
        differs = [n for n in same if getattr(one, n) != getattr(first, n)]
        if differs or one.ema is not None or one.precision != "no":
            raise TrainingError(
                "arms of one bank must share their order of examples and precision",
                found=", ".join(differs) or "ema or mixed precision", fix="train them apart",
            )  # fmt: skip
    arms = _Arms(host, tasks, settings)
    order = Order(len(train), first.batch_size, first.epochs, first.seed)
    warmup = round(first.warmup * order.per_epoch)
    history: list[list[float]] = []
    sums = torch.zeros(len(tasks), dtype=torch.float64)
    for step in range(order.total):
        indices = order.batch(step)
        taps, labels = train.gather(indices, _views(train, first.seed, step, order, indices))
        rate = [
            learning_rate(step, total=order.total, warmup=warmup, peak=one.lr) for one in settings
        ]
        sums += arms.step(taps, labels, rate, step + 1).double().cpu() * len(indices)
        if (step + 1) % order.per_epoch == 0:
            accuracy = arms.accuracy(val) if val is not None else []
            history.append(accuracy)
            each_epoch(len(history), accuracy)
            last, sums = sums / len(train), torch.zeros_like(sums)
    return [
        ArmResult(task, [e[k] for e in history if e], float(last[k]), arms.died_at[k])
        for k, task in enumerate(arms.tasks())
    ]


def _views(
    train: StoredFeatures, seed: int, step: int, order: Order, indices: Sequence[int]
) -> list[int]:
    if train.views == 1:
        return [0] * len(indices)
    from restuning.train.randomness import own_randomness, seed_everything

    views = []
    with own_randomness():
        for index in indices:
            # The draw that `fit` makes for this example in this epoch.
            seed_everything("example", seed, step // order.per_epoch, index, devices=False)
            views.append(train.view())
    return views


class _Arms:
    """Stacked weights and moments of K tasks."""

    def __init__(self, host: Host, tasks: Sequence[Task], settings: Sequence[FitSettings]) -> None:
        self.host, self.members, self.settings = host, list(tasks), settings
        self.device = next(host.model.parameters()).device
        self.template = tasks[0].train()
        weights, self.buffers = stack_module_state([t.to(self.device) for t in tasks])  # type: ignore[arg-type]
        self.weights: dict[str, Tensor] = {
            n: w.detach().clone().requires_grad_() for n, w in weights.items()
        }
        self.first = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.second = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.died_at: list[int | None] = [None] * len(tasks)
        self.last = host.sites.taps[-1]

    def logits(self, taps: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """`k b c`."""
        if self.template.bypass is None:
            taps = {"last": taps[self.last]}
        tokens = self.template.needs(self.host.readout_rule).tokens
        if tokens != "all":
            taps = {name: one_token(tap, tokens) for name, tap in taps.items()}
        fed = {name: tap.to(self.device) for name, tap in taps.items()}

        def one(own: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return functional_call(self.template, (own, buffers), (fed, self.host.readout))

        # With one arm nothing is stacked in vain; random masks differ from arm to arm.
        return vmap(one, randomness="different")(dict(weights), dict(self.buffers))

    def step(
        self, taps: Mapping[str, Tensor], labels: Tensor, rates: Sequence[float], number: int
    ) -> Tensor:
        """One AdamW step of every arm; their mean losses, `k`."""
        logits = self.logits(taps, self.weights)
        labels = labels.to(self.device)
        losses = torch.stack(
            [F.cross_entropy(each, labels, label_smoothing=one.label_smoothing)
             for each, one in zip(logits.float(), self.settings, strict=True)]
        )  # fmt: skip
        for k, loss in enumerate(losses.tolist()):
            if self.died_at[k] is None and not math.isfinite(loss):
                self.died_at[k] = number
        names = list(self.weights)
        # The sum keeps arms apart: each loss depends on the weights of its own arm alone.
        gradients = torch.autograd.grad(losses.sum(), [self.weights[n] for n in names])
        self._update(dict(zip(names, gradients, strict=True)), rates, number)
        return losses.detach()

    @torch.no_grad()
    def _update(self, gradients: dict[str, Tensor], rates: Sequence[float], number: int) -> None:
        rate = torch.tensor(rates, device=self.device)
        decay = torch.tensor([s.weight_decay for s in self.settings], device=self.device)
        if any(s.clip is not None for s in self.settings):
            norms = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()  # type: ignore[union-attr]
            limits = torch.tensor(
                [math.inf if s.clip is None else s.clip for s in self.settings], device=self.device
            )
            factor = (limits / (norms + 1e-6)).clamp(max=1.0)
            gradients = {n: g * _wide(factor, g) for n, g in gradients.items()}
        one, two = BETAS
        corrected, root = 1 - one**number, math.sqrt(1 - two**number)
        for name, weight in self.weights.items():
            gradient, first, second = gradients[name], self.first[name], self.second[name]
            if weight.dim() > 2:
                # As `parameter_groups`: matrices decay; one dimension more for the arms.
                weight.mul_(1 - _wide(rate * decay, weight))
            first.lerp_(gradient, 1 - one)
            second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
            weight.sub_(_wide(rate / corrected, weight) * first / (second.sqrt() / root + EPSILON))

    @torch.no_grad()
    def accuracy(self, data: StoredFeatures) -> list[float]:
        """Of every arm, on a data set; 0 for an arm that died."""
        self.template.eval()
        right = torch.zeros(len(self.members))
        for start in range(0, len(data), EVALUATED):
            indices = list(range(start, min(start + EVALUATED, len(data))))
            taps, labels = data.gather(indices, [0] * len(indices))
            found = self.logits(taps, self.weights).argmax(-1).cpu()
            right += (found == labels).sum(1)
        self.template.train()
        alive = [died is None for died in self.died_at]
        return [float(r) / len(data) if ok else 0.0 for r, ok in zip(right, alive, strict=True)]

    def tasks(self) -> list[Task]:
        """The tasks with their weights."""
        for k, task in enumerate(self.members):
            own = {n: w[k].detach() for n, w in self.weights.items()}
            task.load_state_dict({**task.state_dict(), **own})
            task.eval()
        return self.members


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def form(task: Task) -> Any:
    """Tasks of one form can be arms of one bank."""
    return tuple((n, tuple(w.shape)) for n, w in task.state_dict().items()), repr(task)


def evaluate_arm(host: Host, task: Task, data: StoredFeatures) -> float:
    """Accuracy of one task on stored features."""
    arms = _Arms(host, [task], [FitSettings()])
    return arms.accuracy(data)[0]


__all__ = ["ArmResult", "evaluate_arm", "form", "train_arms"]

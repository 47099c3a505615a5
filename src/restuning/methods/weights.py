"""Methods that train no tuner: the head alone, all weights, or the biases."""

from __future__ import annotations

from torch import nn

from restuning.copies import copies
from restuning.extractor import Extractor
from restuning.host import Host
from restuning.methods.method import Method, Options
from restuning.task import Task


def _linear(host: Extractor, head: nn.Linear | None, options: Options) -> Task:
    return Task(head=head)


def _full(host: Host, head: nn.Linear | None, options: Options) -> Task:
    return Task(head=head, weights=copies(host.model, lambda name, weight: True))


def _bitfit(host: Host, head: nn.Linear | None, options: Options) -> Task:
    weights = copies(host.model, lambda name, weight: name.endswith("bias") and weight.dim() < 2)
    return Task(head=head, weights=weights)


ROWS: dict[str, Method] = {
    "linear": Method(_linear, "a linear head on the frozen feature", "-", inside=False),
    "full": Method(_full, "all backbone weights, as a trained copy", "-"),
    "bitfit": Method(_bitfit, "the backbone's biases, as a trained copy", "Ben Zaken et al. 2022"),
}

"""Methods that train no tuner: the head alone, all weights, or the biases."""

from __future__ import annotations

from torch import nn

from restuning.host import Host
from restuning.methods.method import Method, Options
from restuning.task import Task


def _linear(host: Host, head: nn.Linear | None, options: Options) -> Task:
    return Task(head=head)


def _full(host: Host, head: nn.Linear | None, options: Options) -> Task:
    return Task(head=head, weights={n: p.clone() for n, p in host.model.named_parameters()})


def _bitfit(host: Host, head: nn.Linear | None, options: Options) -> Task:
    weights = {
        n: p.clone() for n, p in host.model.named_parameters() if n.endswith("bias") and p.dim() < 2
    }
    return Task(head=head, weights=weights)


ROWS: dict[str, Method] = {
    "linear": Method(_linear, "a linear head on the frozen feature", "-"),
    "full": Method(_full, "all backbone weights, as a trained copy", "-"),
    "bitfit": Method(_bitfit, "the backbone's biases, as a trained copy", "Ben Zaken et al. 2022"),
}

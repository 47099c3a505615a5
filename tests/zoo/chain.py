"""The chain that every backbone of the zoo must pass, from finding sites to loading a saved task."""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from awake import wake
from restuning import Host, Tuned, load, methods, save
from restuning.sites import first_tensor, read_vector

Made = tuple[nn.Module, tuple, dict[str, Any]]
CLASSES = 3
BATCH_TOLERANCE = 1e-2
"""One input alone or in a batch, relative to the largest logit: other kernels round elsewhere, and
batch norms of small variance magnify it (3e-3 was seen). Inputs that mix differ by its whole size."""


@dataclass
class Passed:
    """What the chain found out about one backbone.

    Attributes:
        name: Of the backbone.
        family: Of its table row.
        ok: Whether every link held.
        link: The link that broke.
        reason: Why it broke.
        sites: Number of sites by operation.
        proofs: Number of sites by proof.
        readout: How the feature is read.
        inline, bypass: Trained parameters without the head.
        tokens: What the bypass reads of each tap.
        maps: Layers whose projections are lent.
        compiles: Whether inline and bypass trace into one graph; None where it was not tried.
    """

    name: str
    family: str = ""
    ok: bool = False
    link: str = ""
    reason: str = ""
    sites: dict[str, int] = field(default_factory=dict)
    proofs: dict[str, int] = field(default_factory=dict)
    readout: str = ""
    inline: int = 0
    bypass: int = 0
    tokens: str = ""
    maps: int = 0
    parameters: int = 0
    compiles: bool | None = None
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Broken(AssertionError):
    """A link of the chain does not hold."""


def hold(true: bool, why: str) -> None:
    """Go on only if it is true."""
    if not true:
        raise Broken(why)


def run(name: str, make: Callable[[], Made], *, family: str = "", compiled: bool = False) -> Passed:
    """Pass one backbone through the chain; what breaks is written down, not raised."""
    passed = Passed(name, family)
    started = time.perf_counter()
    try:
        _links(passed, make, compiled)
        passed.ok, passed.link = True, ""
    except Exception as error:  # noqa: BLE001 (the reason is the result)
        passed.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    passed.seconds = round(time.perf_counter() - started, 2)
    return passed


def _links(passed: Passed, make: Callable[[], Made], compiled: bool) -> None:
    passed.link = "build"
    torch.manual_seed(0)
    model, args, kwargs = make()
    scaled(wake(model))
    passed.parameters = sum(p.numel() for p in model.parameters())
    args, kwargs = tuple(map(_two, args)), {k: _two(v) for k, v in kwargs.items()}
    calibrate(model, args, kwargs)
    # Frozen first: nn.MultiheadAttention takes another kernel where a weight wants a gradient.
    reference = copy.deepcopy(model.requires_grad_(False))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    passed.link = "sites"
    host = Host(model, *(a[:1] for a in args), **{k: v[:1] for k, v in kwargs.items()})
    passed.sites = dict(Counter(s.op for s in host.sites.values()))
    passed.proofs = dict(Counter(s.proof for s in host.sites.values()))
    passed.maps = len({s.layer for s in host.sites.values() if s.projections is not None})
    rule = host.readout_rule
    passed.readout = f"{rule.pool} ({rule.proof})"
    hold(_alike(host, reference, args, kwargs), "the bare host changes the output")
    tasks = {}
    for form, method in (("inline", "res-tuning"), ("bypass", "res-tuning-bypass")):
        passed.link = form
        task = methods.build(method, host, num_classes=CLASSES)
        setattr(passed, form, task.tuner_parameters())
        tasks[form] = _trained(host, task, args, kwargs)
    passed.tokens = tasks["bypass"].task.needs(rule).tokens
    passed.link = "detach"
    hold(_alike(model, reference, args, kwargs), "the backbone's output has changed")
    after = model.state_dict()
    hold(list(after) == list(before), "the backbone's keys have changed")
    hold(all(torch.equal(after[k], before[k]) for k in before), "the backbone's state has changed")
    for form, tuned in tasks.items():
        passed.link = f"save and load {form}"
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save(tuned.task, host, Path(folder) / "x.task")
            again = Tuned(host, load(Path(folder) / "x.task", host))
            hold(torch.equal(again(*args, **kwargs), tuned(*args, **kwargs)), "logits differ")
    if compiled:
        passed.compiles = all(_compiles(t, args, kwargs) for t in tasks.values())
    passed.link = "release"
    host.release()
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    hold(not hooks, "hooks are left")
    hold(_alike(model, reference, args, kwargs), "the released backbone answers otherwise")


def _trained(host: Host, task: nn.Module, args: tuple, kwargs: dict) -> Tuned:
    """One step from drawn weights: gradients for the task alone, and for all of it."""
    tuned = Tuned(host, task)
    start = tuned.eval()(*args, **kwargs).detach()
    with torch.no_grad():
        for p in task.parameters():
            # Gains below one: thirty tuners in a row must not overflow either.
            p.copy_(torch.randn_like(p) * (0.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1))
    host.model.requires_grad_(False)
    tuned.train()
    hold(not any(m.training for m in host.model.modules()), "the backbone trains")
    logits = tuned(*args, **kwargs)
    hold(logits.shape == (2, CLASSES), f"logits are {tuple(logits.shape)}")
    hold(bool(torch.isfinite(logits).all()), "logits are not finite")
    hold(not torch.equal(logits, start), "the tuners change nothing")
    logits.square().sum().backward()
    hold(all(p.grad is None for p in host.model.parameters()), "the backbone has gradients")
    # A backbone that is deaf to its own last stream would leave tuners there without gradient.
    quiet = [n for n, p in task.named_parameters() if p.grad is None or not p.grad.any()]
    hold(not quiet, f"{len(quiet)} parameters without gradient: {', '.join(quiet[:3])}")
    torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
    torch.optim.SGD(task.parameters(), 1e-2).step()
    tuned.eval()
    with torch.no_grad():
        both = tuned(*args, **kwargs)
        one = tuned(*(a[:1] for a in args), **{k: v[:1] for k, v in kwargs.items()})
    error = (both[:1] - one).abs().max() / both.abs().max()
    hold(bool(error < BATCH_TOLERANCE), f"one input alone answers otherwise ({float(error):.1e})")
    return tuned


def _compiles(tuned: Tuned, args: tuple, kwargs: dict) -> bool:
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(tuned, fullgraph=True, backend="eager")(*args, **kwargs)
    except Exception:  # noqa: BLE001 (whatever dynamo cannot do)
        return False
    return True


def _alike(model: nn.Module, reference: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Bit-equal to an untouched copy, which is asked anew: some kernels round by alignment."""
    return any(
        torch.equal(_answer(model, args, kwargs), _answer(reference, args, kwargs))
        for _ in range(3)
    )


def _answer(model: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    with torch.no_grad():
        output = model(*args, **kwargs)
    answer = read_vector(output)
    answer = first_tensor(output) if answer is None else answer
    assert answer is not None
    return answer.clone()


def scaled(model: nn.Module) -> None:
    """Weights as one over the root of their fan-in: woken ones overflow in wide networks."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.dim() >= 2:
                p.mul_(10 / max(1, p[0].numel()) ** 0.5)


def calibrate(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Batch norms take the statistics of one batch: at their first ones woken maps overflow."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(*args, **kwargs)
    for norm in norms:
        norm.eval()
        norm.momentum = 0.1
        norm.running_var.clamp_(min=1e-3)  # type: ignore[union-attr]


def _two(value: Any) -> Any:
    """Two different inputs: a batch of one hides what mixes inputs."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(2, *value.shape[1:], generator=torch.Generator().manual_seed(1))
    return torch.cat([value, value.flip(1)]) if value.dim() > 1 else value.repeat(2)

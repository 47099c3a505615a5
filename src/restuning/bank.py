"""A bank: many bypass tasks as stacked tensors, run on the features of one backbone forward."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import FormatError, TunerShapeError, UnknownNameError
from restuning.bypass import Bypass, Needs, readout_of
from restuning.task import TOKENS, Task
from restuning.tuners import DropPath, ResAdapter, Scaled, Tuner

RANKS = (4, 8, 16, 32, 64, 128, 256)
"""Ranks are padded with zeros to one of these, so that tasks of near ranks share one stack: a zero
column passes gelu, relu and silu as zero and changes nothing."""

_ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Bank(nn.Module):
    """N bypass tasks of one backbone, answered together: `bank(features) -> {name: logits}`.

    Bypasses of Res-Adapters are stacked: all horizontal down-projections of a layer are one matrix
    product, everything else is batched. Other tuners run one task after the other. A bank is
    immutable and holds copies; to add a task, build a new one and swap the reference.

    Args:
        tasks: By name: bypass tasks, or heads alone (linear probing), on one backbone.

    Attributes:
        keep: What to keep of a forward: `host.features(x, keep=bank.keep)`.
        names: Of the tasks.

    Raises:
        FormatError: A task has tuners inside the backbone, or does not say what it reads.

    Cost: per input and task, `4 * L * (2 d r)` flops and `2 L d` values of state on one token.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        if not tasks:
            raise FormatError("a bank needs a task", found="none", fix="give {name: task}")
        for name, task in tasks.items():
            if task.bypass is None and (task.inline_tuners or len(task.weights)):
                raise FormatError(
                    "a bank runs bypass tasks", where=name, found=f"{task.method}, whose tuners "
                    "are inside the backbone", fix="run it alone: Tuned(host, task)(x)",
                )  # fmt: skip
            if task.pool is None:
                raise FormatError(
                    "a task does not say what it reads", where=name, found="pool=None",
                    fix='set task.pool = host.readout_rule.pool ("cls", "mean", ...)',
                )  # fmt: skip
        self.names = tuple(tasks)
        self.labels = {name: task.labels for name, task in tasks.items()}
        needs = [t.bypass.needs(str(t.pool)) if t.bypass is not None
                 else Needs(("last",), TOKENS.get(str(t.pool), "all"))
                 for t in tasks.values()]  # fmt: skip
        taps = dict.fromkeys(tap for need in needs for tap in need.taps)
        kinds = {need.tokens for need in needs}
        if "pool" in kinds and len(kinds) > 1:
            raise FormatError(
                "tasks of one bank must read the backbone alike",
                found=", ".join(f"{n}: {t.pool}" for n, t in tasks.items()),
                fix='give tasks of readout "own" a bank of their own',
            )
        self.keep = Needs(tuple(taps), "all" if "all" in kinds else needs[0].tokens)
        groups: dict[str, dict[str, Task]] = {}
        for name, task in tasks.items():
            groups.setdefault(_form(name, task), {})[name] = task
        self.groups = nn.ModuleList(
            _Stack(group) if _stacks(next(iter(group.values()))) else _One(group)
            for group in groups.values()
        )
        self.eval().requires_grad_(False)

    def forward(
        self, features: Mapping[str, Tensor], readout: Callable[..., Tensor] | None = None,
        tasks: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Logits of the tasks asked for.

        Args:
            features: `host.features(x, keep=bank.keep)`, or stored ones.
            readout: The host's, where the features do not carry it.
            tasks: Names; None for all.

        Raises:
            UnknownNameError: No such task.
        """
        wanted = self.names if tasks is None else tuple(tasks)
        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            raise UnknownNameError(
                "no such task in the bank", where=", ".join(unknown[:4]),
                fix=f"one of: {', '.join(self.names[:8])}",
            )  # fmt: skip
        _check_taps(features, self.keep)
        lent = readout_of(features, readout)
        answers: dict[str, Tensor] = {}
        for group in self.groups:
            chosen = [n for n in group.names if n in wanted]  # type: ignore[operator, union-attr]
            if chosen:
                answers |= group(features, lent, chosen)
        return {name: answers[name] for name in wanted}

    def extra_repr(self) -> str:
        """Its size."""
        return f"{len(self.names)} tasks in {len(self.groups)} groups"


class _One(nn.Module):
    """Tasks that do not stack, one after the other."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.names = tuple(tasks)
        self.tasks = nn.ModuleList(Task.from_spec(t.spec()) for t in tasks.values())
        for mine, theirs in zip(self.tasks, tasks.values(), strict=True):
            mine.load_state_dict(theirs.state_dict())

    def forward(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        """Logits by name."""
        return {
            name: task(taps, readout)
            for name, task in zip(self.names, self.tasks, strict=True)
            if name in names
        }


class _Stack(nn.Module):
    """Bypasses of adapters of one form. Letters: `k` tasks, `m` rows (batch times tokens)."""

    gate: Tensor
    head: Tensor
    bias: Tensor

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.names = tuple(tasks)
        members = list(tasks.values())
        first = members[0]
        bypasses: list[Bypass] = [t.bypass for t in members]  # type: ignore[misc]
        self.taps, self.pool = bypasses[0].taps, first.pool
        self.classes = [t.head.out_features if t.head is not None else None for t in members]
        self.across = nn.ModuleList(
            _stacked([b.horizontal[i] for b in bypasses]) for i in range(len(self.taps) - 1)
        )
        self.below = nn.ModuleList(
            _stacked([b.vertical[i] for b in bypasses]) for i in range(len(self.taps) - 1)
        )
        self.register_buffer("gate", torch.stack([b.gate.detach().sigmoid() for b in bypasses]))
        if first.head is not None:
            widest = max(t.head.out_features for t in members)  # type: ignore[union-attr]
            heads = [_padded_head(t.head, widest) for t in members]  # type: ignore[arg-type]
            self.register_buffer("head", torch.stack([w for w, _ in heads]))
            self.register_buffer("bias", torch.stack([b for _, b in heads]))

    def forward(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        """Logits by name."""
        members = [self.names.index(n) for n in names]
        pick = None if len(members) == len(self.names) else torch.tensor(
            members, device=self.gate.device
        )  # fmt: skip
        gate = self.gate if pick is None else self.gate[pick]
        token = self.pool == "cls"
        streams = [taps[name][:, :1] if token else taps[name] for name in self.taps]
        shape = streams[-1].shape
        state = streams[0].reshape(-1, shape[-1])
        for layer, stream in enumerate(streams[1:]):
            below = self.below[layer](state, len(members), pick)
            across = self.across[layer](stream.reshape(-1, shape[-1]), len(members), pick)
            state = torch.lerp(below, across, gate[:, layer].to(across.dtype)[:, None, None])
        feature = readout(state.reshape(-1, *shape[1:]), pool=self.pool)
        feature = feature.unflatten(0, (len(members), -1))
        if self.classes[0] is None:
            return dict(zip(names, feature, strict=True))
        head = self.head if pick is None else self.head[pick]
        bias = self.bias if pick is None else self.bias[pick]
        if feature.dim() > 3:
            bias = bias[:, None]
        logits = torch.einsum("k...d,kcd->k...c", feature.to(head.dtype), head) + bias[:, None]
        return {n: logits[i, ..., : self.classes[m]] for i, (n, m) in
                enumerate(zip(names, members, strict=True))}  # fmt: skip


class _StackedAdapter(nn.Module):
    """`x + s W_up phi(W_down x)` of k tasks; the scale is folded in."""

    down: Tensor
    shift: Tensor
    up: Tensor
    bias: Tensor

    def __init__(self, adapters: list[ResAdapter], scales: list[Tensor | None]) -> None:
        super().__init__()
        rank = next((r for r in RANKS if r >= max(a.rank for a in adapters)), None)
        rank = rank or max(a.rank for a in adapters)
        self.activation = adapters[0].activation
        down, shift, up, bias = [], [], [], []
        for adapter, scale in zip(adapters, scales, strict=True):
            more = rank - adapter.rank
            weight, offset = (t.detach() for t in adapter._up(scale))
            down.append(F.pad(adapter.down.weight.detach(), (0, 0, 0, more)))
            shift.append(F.pad(adapter.down.bias.detach(), (0, more)))
            up.append(F.pad(weight, (0, more)))
            bias.append(offset)
        self.register_buffer("down", torch.stack(down))
        self.register_buffer("shift", torch.stack(shift))
        self.register_buffer("up", torch.stack(up))
        self.register_buffer("bias", torch.stack(bias))

    def forward(self, x: Tensor, count: int, pick: Tensor | None) -> Tensor:
        """`m d` shared by all, or `k m d`, to `k m d`."""
        down, shift, up, bias = (
            t if pick is None else t[pick] for t in (self.down, self.shift, self.up, self.bias)
        )
        if x.dim() == 2:
            hidden = F.linear(x, down.flatten(0, 1), shift.flatten())
            hidden = hidden.unflatten(1, (count, -1)).transpose(0, 1)
            x = x.expand(count, *x.shape)
        else:
            hidden = torch.baddbmm(shift.unsqueeze(1), x, down.mT)
        hidden = _ACTIVATIONS[self.activation](hidden)
        return torch.baddbmm(x + bias.unsqueeze(1), hidden, up.mT)


class _Same(nn.Module):
    """No tuner here."""

    def forward(self, x: Tensor, count: int, pick: Tensor | None) -> Tensor:
        """`m d` or `k m d` to `k m d`."""
        return x if x.dim() == 3 else x.expand(count, *x.shape)


def _taken_apart(tuner: Tuner) -> tuple[ResAdapter, Tensor | None] | None:
    """The adapter and its scale a channel; None for what does not stack."""
    if isinstance(tuner, DropPath):
        return _taken_apart(tuner.tuner)
    if isinstance(tuner, Scaled) and tuner.form in ("none", "scalar", "channel"):
        inner = _taken_apart(tuner.tuner)
        if inner is None or inner[1] is not None:
            return None
        scale = None if tuner.form == "none" else tuner.scale.expand(tuner.dim)
        return inner[0], scale
    return (tuner, None) if type(tuner) is ResAdapter else None


def _stacked(tuners: list[nn.Module]) -> nn.Module:
    if not isinstance(tuners[0], Tuner):
        return _Same()
    parts = [_taken_apart(t) for t in tuners]  # type: ignore[arg-type]
    return _StackedAdapter([p[0] for p in parts if p], [p[1] for p in parts if p])


def _stacks(task: Task) -> bool:
    bypass = task.bypass
    return (
        bypass is not None
        and len(set(bypass.dims)) == 1
        and all(_taken_apart(t) is not None for t in bypass.tuners)
    )


def _form(name: str, task: Task) -> str:
    """Tasks of one form share a stack."""
    if task.bypass is None or not _stacks(task):
        return f"alone {name}"

    def one(tuner: nn.Module) -> Any:
        if not isinstance(tuner, Tuner):
            return None
        parts = _taken_apart(tuner)
        assert parts is not None
        rank = next((r for r in RANKS if r >= parts[0].rank), parts[0].rank)
        return [rank, parts[0].activation]

    bypass = task.bypass
    return json.dumps([
        bypass.taps, bypass.dims, [one(t) for t in bypass.horizontal],
        [one(t) for t in bypass.vertical], task.pool, task.head is None,
    ])  # fmt: skip


def _padded_head(head: nn.Linear, classes: int) -> tuple[Tensor, Tensor]:
    more = classes - head.out_features
    weight = F.pad(head.weight.detach(), (0, 0, 0, more))
    bias = head.bias.detach() if head.bias is not None else weight.new_zeros(head.out_features)
    return weight, F.pad(bias, (0, more))


def _check_taps(features: Mapping[str, Tensor], needs: Needs) -> None:
    """Refuse features that lack a tap.

    Raises:
        TunerShapeError: Names the taps that are missing.
    """
    missing = [tap for tap in needs.taps if tap not in features]
    if missing:
        raise TunerShapeError(
            "the features lack taps that the bank reads",
            found=", ".join(missing[:4]),
            fix="keep them: host.features(x, keep=bank.keep)",
        )

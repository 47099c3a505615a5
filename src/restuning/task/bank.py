"""A bank: many bypass tasks as stacked tensors, run on the features of one backbone forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import FormatError, MissingInputError, UnknownNameError
from restuning.sites import Needs, Tokens, resolve_readout, resolve_tokens, take_one_token
from restuning.task.task import Task


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
        FormatError: A task has tuners inside the backbone, does not say what it reads, or reads
            pooled vectors where another reads tokens.

    Cost: per input and task, `4 * L * (2 d r)` flops and `2 L d` values of state on one token.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        if not tasks:
            raise FormatError("a bank needs a task", found="none", fix="give {name: task}")
        for name, task in tasks.items():
            if task.side is None and (task.inline_tuners or len(task.weights)):
                raise FormatError(
                    "a bank runs bypass tasks",
                    where=name,
                    found=f"{task.method}, whose tuners are inside the backbone",
                    fix="run it alone: Tuned(host, task)(x)",
                )
            if task.pool is None:
                raise FormatError(
                    "a task does not say what it reads",
                    where=name,
                    found="pool=None",
                    fix='set task.pool = host.readout_rule.pool ("cls", "mean", ...)',
                )
        self.names = tuple(tasks)
        self.labels = {name: task.labels for name, task in tasks.items()}
        needs = [
            t.side.needs(str(t.pool))
            if t.side is not None
            else Needs(("last",), resolve_tokens(t.pool))
            for t in tasks.values()
        ]
        told = ", ".join(f"{n}: {t.pool}" for n, t in tasks.items())
        self.keep = keep_for_all(needs, told)
        groups: dict[str, dict[str, Task]] = {}
        for name, task in tasks.items():
            groups.setdefault(_group_key(name, task), {})[name] = task
        self.groups = nn.ModuleList(
            _Alone(group) if key.startswith("alone ") else _Stack(group)
            for key, group in groups.items()
        )
        # These are copies: training them would change no task.
        self.eval().requires_grad_(False)

    def forward(
        self,
        features: Mapping[str, Tensor],
        readout: Callable[..., Tensor] | None = None,
        tasks: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Logits of the tasks asked for.

        Args:
            features: `host.features(x, keep=bank.keep)`, or stored ones.
            readout: The host's, where the features do not carry it.
            tasks: Names; None for all.

        Raises:
            UnknownNameError: No such task.
        """
        asked_names = self.names if tasks is None else tuple(tasks)
        unknown = [name for name in asked_names if name not in self.names]
        if unknown:
            raise UnknownNameError(
                "no such task in the bank",
                where=", ".join(unknown[:4]),
                fix=f"one of: {', '.join(self.names[:8])}",
            )
        _check_taps(features, self.keep)
        lent = resolve_readout(features, readout)
        answers: dict[str, Tensor] = {}
        for group in cast("list[_Alone | _Stack]", list(self.groups)):
            chosen = [n for n in group.names if n in asked_names]
            if chosen:
                answers |= group(features, lent, chosen)
        return {name: answers[name] for name in asked_names}

    def extra_repr(self) -> str:
        """How many tasks it holds, in how many groups."""
        return f"{len(self.names)} tasks in {len(self.groups)} groups"


def keep_for_all(needs: Sequence[Needs], told: str = "") -> Needs:
    """What one forward keeps for all of these; all tokens have in them whatever any readout takes.

    Args:
        needs: Of tasks, or of banks.
        told: What reads so, for an error.

    Raises:
        FormatError: Some read pooled vectors and others tokens.
    """
    taps = dict.fromkeys(tap for need in needs for tap in need.taps)
    kinds: set[Tokens] = {need.tokens for need in needs}
    # One mapping of features cannot hold a tap both as one vector and as tokens.
    if "pool" in kinds and len(kinds) > 1:
        raise FormatError(
            "tasks of one bank must read the backbone alike",
            found=told,
            fix='give tasks of readout "own" a bank of their own',
        )
    return Needs(tuple(taps), kinds.pop() if len(kinds) == 1 else "all")


class _Alone(nn.Module):
    """Tasks that do not stack and run one after the other."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.names = tuple(tasks)
        # Copies: a task that is trained on must not change a bank that answers.
        self.tasks = nn.ModuleList(Task.from_spec(t.spec()) for t in tasks.values())
        for mine, theirs in zip(self.tasks, tasks.values(), strict=True):
            mine.load_state_dict(theirs.state_dict())

    def forward(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        """Compute the logits of some of these tasks, by name."""
        return {
            name: task(taps, readout)
            for name, task in zip(self.names, self.tasks, strict=True)
            if name in names
        }


class _Stack(nn.Module):
    """Bypass tasks whose side networks and heads are stacked.

    Args:
        tasks: By name, of one `_group_key`.
    """

    head: Tensor
    bias: Tensor

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.names = tuple(tasks)
        members = list(tasks.values())
        sides = [t.side for t in members if t.side is not None]
        self.network = type(sides[0]).stack(sides)
        self.taps, self.pool = sides[0].taps, members[0].pool
        self.classes = [t.head.out_features if t.head is not None else None for t in members]
        heads = [t.head for t in members if t.head is not None]
        if heads:
            # One product for all heads: the missing classes of the smaller ones are cut off after it.
            widest = max(h.out_features for h in heads)
            padded = [_padded_head(h, widest) for h in heads]
            self.register_buffer("head", torch.stack([w for w, _ in padded]))
            self.register_buffer("bias", torch.stack([b for _, b in padded]))

    def forward(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        """Compute the logits of some of these tasks, by name."""
        members = [self.names.index(n) for n in names]
        streams = [taps[name] for name in self.taps]
        pick = None
        # Without a pick nothing is indexed, hence no weight is copied.
        if len(members) < len(self.names):
            pick = torch.tensor(members, device=streams[0].device)
        if resolve_tokens(self.pool) in ("cls", "last"):
            mask = getattr(taps, "mask", None)
            streams = [take_one_token(stream, str(self.pool), mask) for stream in streams]
        # `k b n d` to `(k b) n d`: the readout knows one axis of batch.
        feature = readout(self.network(streams, pick).flatten(0, 1), pool=self.pool)
        feature = feature.unflatten(0, (len(members), -1))
        if self.classes[0] is None:
            return dict(zip(names, feature, strict=True))
        head, bias = self.head, self.bias
        if pick is not None:
            head, bias = head[pick], bias[pick]
        # Pool "all" keeps the axis of tokens, `k b n d`, and "grid" those of places.
        bias = bias.view(len(bias), *[1] * (feature.dim() - 2), -1)
        logits = torch.einsum("k...d,kcd->k...c", feature.to(head.dtype), head) + bias
        return {
            n: logits[i, ..., : self.classes[m]]
            for i, (n, m) in enumerate(zip(names, members, strict=True))
        }


def _padded_head(head: nn.Linear, classes: int) -> tuple[Tensor, Tensor]:
    more = classes - head.out_features
    weight = F.pad(head.weight.detach(), (0, 0, 0, more))
    bias = head.bias.detach() if head.bias is not None else weight.new_zeros(head.out_features)
    return weight, F.pad(bias, (0, more))


def _group_key(name: str, task: Task) -> str:
    """The key of the group a task belongs to: tasks with the same key share a stack."""
    key = None if task.side is None else task.side.stack_key()
    if key is None:
        return f"alone {name}"
    return f"{type(task.side).__name__} {key} {task.pool} {task.head is None}"


def _check_taps(features: Mapping[str, Tensor], needs: Needs) -> None:
    """Refuse features that lack a tap.

    Raises:
        MissingInputError: Names the taps that are missing.
    """
    missing = [tap for tap in needs.taps if tap not in features]
    if missing:
        raise MissingInputError(
            "the features lack taps that the bank reads",
            found=", ".join(missing[:4]),
            fix="keep them: host.features(x, keep=bank.keep)",
        )

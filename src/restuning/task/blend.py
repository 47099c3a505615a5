"""Several tasks inside one forward of the backbone: `Blend`, `PerRow` and `Guided`.

They stand where a task stands in `host.using(...)`. They hold the tasks themselves: what is trained
later, or moved to a device, is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from restuning._errors import FormatError, PlacementError, WrongTaskError
from restuning.bypass import SideNetwork
from restuning.host import SideBySide
from restuning.sites import Features, Needs
from restuning.task.rows import RowsOfTasks, Take
from restuning.task.task import Task
from restuning.tuners import (
    FrozenAttention,
    Tuner,
    Wrapper,
    at_time,
    read_real_tokens,
    read_timestep,
    real_tokens,
)


class Blend:
    """Tasks mixed by weight: `stream + sum_i w_i delta_i` at every site.

    One task with a weight is a slider of its strength: 0 is the bare backbone, 1 the task itself,
    more exaggerates it. The changes of several tasks add up, so weights need not sum to 1. A bypass
    adds `w (its last state - the backbone's)` to the last stream.

    Args:
        parts: `(task, weight)` pairs of inline tasks, bypass tasks without a head, or both.

    Raises:
        WrongTaskError: A task cannot run inside the backbone's own forward.
    """

    head = None

    def __init__(self, *parts: tuple[Task, float]) -> None:
        self.parts = tuple((_require_runs_inside(task), float(weight)) for task, weight in parts)
        bypasses = [(t.side, w) for t, w in self.parts if t.side is not None]
        self.side = _WeightedSum(bypasses) if bypasses else None

    @property
    def inline_tuners(self) -> dict[str, Tuner]:
        """One tuner for every site that any task tunes."""
        by_site: dict[str, list[tuple[Tuner, float]]] = {}
        for task, weight in self.parts:
            for name, tuner in task.inline_tuners.items():
                by_site.setdefault(name, []).append((tuner, weight))
        return {name: _Weighted(*zip(*parts, strict=True)) for name, parts in by_site.items()}


class PerRow:
    """A task for every row of the batch: row i is answered by `tasks[i % len(tasks)]`.

    Guidance without a classifier doubles the batch, rows of one kind after those of the other;
    counting on from the start again, both halves are given the same tasks.

    Where `generate()` of transformers makes several rows of an input (`num_beams`,
    `num_return_sequences`), all of them are answered by the task of input i; so are several images of
    each of several prompts in a pipeline of diffusers. What multiplies rows in a way that cannot be
    known is refused while it runs (`WrongTaskError`), and so is a site where windows of an input are rows
    (`PlacementError`).

    Args:
        tasks: Inline or bypass tasks without a head, or None for the bare backbone.

    Raises:
        WrongTaskError: A task cannot run inside the backbone's own forward.
    """

    head = None

    def __init__(self, tasks: Sequence[Task | None]) -> None:
        self.tasks = tuple(None if t is None else _require_runs_inside(t) for t in tasks)
        if not self.tasks:
            raise FormatError("no task for any row", found="an empty list", fix="give [task, ...]")
        bypasses = [t.side if t is not None else None for t in self.tasks]
        self.side = _RowsInTurn(bypasses) if any(b is not None for b in bypasses) else None

    @property
    def inline_tuners(self) -> dict[str, Tuner]:
        """One tuner for every site that any task tunes."""
        tables = [{} if t is None else t.inline_tuners for t in self.tasks]
        names = dict.fromkeys(name for table in tables for name in table)
        return {name: _ByRow([table.get(name) for table in tables]) for name in names}


class Guided:
    """A bypass task whose prediction is led away from the backbone's own, which comes for free.

    `base + scale (tuned - base)`: 0 is the bare backbone, 1 the task, more goes beyond it. Unlike a
    weight of `Blend` it works on predictions, not on the last stream. Both are made in one forward.

    Args:
        task: A bypass task without a head, on a diffusion model.
        scale: How far.

    Raises:
        WrongTaskError: The task is no such bypass.
    """

    head = None

    def __init__(self, task: Task, scale: float) -> None:
        if _require_runs_inside(task).side is None:
            raise WrongTaskError(
                "only a bypass leaves the backbone's own prediction in reach",
                where=task.method,
                found="tuners inside the backbone",
                fix="use Blend((task, weight))",
            )
        self.task, self.scale = task, float(scale)

    @property
    def inline_tuners(self) -> dict[str, Tuner]:
        """Guidance has no tuners inside the backbone."""
        return {}

    @property
    def side(self) -> SideBySide:
        """Both last streams, the backbone's and the task's; a new object for every use."""
        return SideBySide(
            [self.task.side], combine=lambda both: torch.lerp(both[0], both[1], self.scale)
        )


def _require_runs_inside(task: Task) -> Task:
    """The task itself, if it can run inside a forward.

    Raises:
        WrongTaskError: It has a head, or weights of its own in the backbone's place.
    """
    if len(task.weights) or task.head is not None:
        raise WrongTaskError(
            "a task cannot run inside the backbone's own forward",
            where=task.method,
            found="a head" if task.head is not None else "trained copies of backbone weights",
            fix="use tasks of tuners, or bypass tasks without a head",
        )
    return task


class _Several(Wrapper):
    """The tuners of several tasks at one site, which must read the same tensors."""

    def __init__(self, tuners: Sequence[Tuner | None]) -> None:
        present = [t for t in tuners if t is not None]
        if len({(t.dim, t.dim_out, t.reads, t.needs_grid, bool(t.appends)) for t in present}) > 1:
            raise FormatError(
                "tasks cannot be used together",
                found="tuners at one site that read different "
                f"things: {', '.join(t.kind for t in present)}",
                fix="use them one after the other",
            )
        super().__init__(present[0])
        self.tuners = tuple(tuners)

    @property
    def members(self) -> list[Tuner]:
        """The tuners that there are: with `PerRow` a task may leave a site alone."""
        return [t for t in self.tuners if t is not None]

    def reset_parameters(self) -> None:
        """There is nothing to start: the members belong to their tasks."""

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the change alone, without the stream."""
        return self.added(x.new_zeros(*x.shape[:-1], self.dim_out), x, view)


class _Weighted(_Several):
    kind = "blend"

    def __init__(self, tuners: Sequence[Tuner], weights: Sequence[float]) -> None:
        super().__init__(tuners)
        self.weights = tuple(weights)

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Compute `y + sum_i w_i tuner_i(x)`."""
        for tuner, weight in zip(self.members, self.weights, strict=True):
            if weight != 0:
                # As a scale a channel: tuners fold it into their own product, and no delta is made
                # by itself.
                y = tuner.added(
                    y, x, view, None if weight == 1 else y.new_full((self.dim_out,), weight)
                )
        return y


def weighted_members(tuner: Tuner) -> list[tuple[Tuner, float]]:
    """The tuners that a blend adds up at one site, with their weights; none of another tuner."""
    if not isinstance(tuner, _Weighted):
        return []
    return list(zip(tuner.members, tuner.weights, strict=True))


class _ByRow(_Several):
    kind = "rows"
    tells_rows = True

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Let every task's tuner change that task's own rows."""
        if any(t.mixes_tokens and t.needs_view for t in self.members):
            raise FormatError(
                "a tuner that repeats the layer's attention cannot be given rows of a batch",
                found=", ".join(t.kind for t in self.members),
                fix='use another form of scale than "exact", or one task at a time',
            )
        time, mask = read_timestep(), read_real_tokens()

        def run(number: int, take: Take) -> Tensor:
            tuner = self.tuners[number]
            if tuner is None:
                return take(y)
            with (
                # A time step a row is cut like the rows; one for the whole batch stays.
                at_time(time if time is None or time.numel() == 1 else take(time)),
                real_tokens(None if mask is None else take(mask)),
            ):
                return tuner.added(take(y), take(x), view)

        return RowsOfTasks.find(len(self.tuners), y.shape[0]).share(run)


class _Composed(SideNetwork):
    """A side network made of side networks, as a host runs one; it reads all that they read."""

    def __init__(self, members: Sequence[SideNetwork]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        # The last tap, which all end at, stays last.
        taps = dict.fromkeys(tap for m in members for tap in m.taps[:-1])
        self.taps = (*taps, members[0].taps[-1])

    def needs(self, pool: str) -> Needs:
        """All tokens, since the result goes on inside the backbone's forward."""
        return Needs(self.taps)


class _WeightedSum(_Composed):
    """A weighted blend of last states: `last + sum_i w_i (state_i - last)`."""

    def __init__(self, parts: Sequence[tuple[SideNetwork, float]]) -> None:
        super().__init__([network for network, _ in parts])
        self.parts = tuple(parts)

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Blend the last states of the networks."""
        last = total = taps[self.taps[-1]]
        for network, weight in self.parts:
            if weight != 0:
                total = total + weight * (network(taps) - last)
        return total


class _RowsInTurn(_Composed):
    """Rows of the last states of networks in turn, or of the bare last stream for None."""

    def __init__(self, networks: Sequence[SideNetwork | None]) -> None:
        super().__init__([n for n in networks if n is not None])
        self.networks = tuple(networks)

    def forward(self, taps: Features) -> Tensor:
        """Run every network on its own rows."""
        last = taps[self.taps[-1]]
        if any(taps[tap].shape[0] != last.shape[0] for tap in self.taps):
            raise PlacementError(
                "rows of a batch cannot be told apart in this backbone",
                where=", ".join(t for t in self.taps if taps[t].shape[0] != last.shape[0]),
                found="windows or patches that are folded into the batch",
                fix="use one task at a time: host.using(task)",
            )

        def run(number: int, take: Take) -> Tensor:
            network = self.networks[number]
            # Features also carry a mask and a time step a row, which must be cut alike.
            return take(last) if network is None else network(taps.select(take))

        return RowsOfTasks.find(len(self.networks), last.shape[0]).share(run)

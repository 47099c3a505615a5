"""All randomness of a run as a function of (seed, epoch, example or step).

A resumed run therefore needs no generator state: the order is drawn from (seed, epoch), an
example's augmentation from (seed, epoch, index) and dropout from (seed, step, process), whatever
ran before, in however many worker processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from restuning._errors import TrainingError, warn
from restuning.data.loader import Loader
from restuning.runtime.randomness import mix_seed, seed_everything

PIECE = 2**20
"""Bytes of neighbouring rows that are read together: about as fast as a whole file, and many of them in a portion."""

PIECES = 1024
"""The least pieces in a portion, or single rows: neighbours are alike (of one class, one writer, one film), and what is
trained on a few dozen kinds of them at a time lags behind (`benchmarks/beyond_memory.py` shows it where this is 64)."""


@dataclass(frozen=True)
class Portions:
    """How an epoch goes through more rows than memory holds, one portion after the other.

    Rows are cut into pieces of neighbours. Each run of `number` neighbouring pieces is dealt out at random, one to each
    portion: however rows are sorted (folders are, by class), a portion is a sample of all of them. Its steps draw from it at
    random; the next portion is read when they are made.

    Attributes:
        number: Portions of an epoch.
        piece: Neighbouring rows that stay together.
        processes: That divide a portion: each takes a run of its rows in the order of the store, so that no two read the same
            files (but where they meet), and draws its share of every step from them.
    """

    number: int
    piece: int
    processes: int = 1

    @classmethod
    def of(cls, dataset: Any, batch_size: int, world: int) -> Portions | None:
        """The portions that a data set has to be gone through in; None where all of it is at hand.

        Args:
            dataset: That says how many rows a process may hold, `at_once`, and reads them, `hold`.
            batch_size: Examples of a step over all processes.
            world: Processes.

        Raises:
            TrainingError: Less than the rows of one step.
        """
        at_once = getattr(dataset, "at_once", None)
        if at_once is None:
            return None
        per_epoch, own = -(-len(dataset) // batch_size), -(-batch_size // world)
        steps = at_once // own
        if steps == 0:
            size = dataset.bytes_per_input
            raise TrainingError(
                "the memory that stored features may take holds less than the rows of one step",
                found=f"{at_once:,} rows of {size:,} bytes, {own:,} in a step",
                fix=f"allow at least {own * size:,} bytes, and some hundred times as much for a good order (--memory), "
                "or give a smaller batch",
            )
        fair = max(1, at_once * world // PIECES)
        return cls(
            -(-per_epoch // steps), min(fair, max(1, PIECE // dataset.bytes_per_input)), world
        )


def tell_other_portions(begun: Portions | None, now: Portions) -> None:
    """Warn that a run goes on in the order that it was begun in, for which there was other memory."""

    def describe(portions: Portions | None) -> str:
        if portions is None:
            return "all rows in any order"
        return f"{portions.number} portions of an epoch, {portions.processes} processes"

    warn(
        "a run goes on in the order of then, with other memory or processes",
        found=f"begun with {describe(begun)}; now there would be {describe(now)}",
        fix="the order is that of then; should memory not suffice for it, start over with --no-resume or another --out",
    )


class Order:
    """Which examples make up which step, for the whole run and any number of processes.

    Args:
        count: Examples in the training data.
        batch_size: Examples of a step over all processes; the last batch of an epoch may be smaller.
        epochs: Passes.
        seed: Seed of the order.
        groups: Numbers of examples in groups, of each of which an epoch then takes as many: those of a small one
            in turn again and again, of a large one some. None takes every example once.
        portions: Of an epoch over more rows than memory holds; None draws from all rows at every step.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        epochs: int,
        seed: int,
        groups: Sequence[Tensor] | None = None,
        portions: Portions | None = None,
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.groups = None if groups is None else [group for group in groups if len(group)]
        self.per_epoch = -(-count // batch_size)
        self.total = self.per_epoch * epochs
        # Of the epoch asked for last, so that it is drawn once an epoch and not at every step.
        self._epoch_order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))
        self._turns: list[int] = []
        self.portions = portions

    @property
    def portions(self) -> Portions | None:
        """Of an epoch; None where all rows are at hand."""
        return self._portions

    @portions.setter
    def portions(self, portions: Portions | None) -> None:
        # Each has a step at least.
        self._portions = (
            portions
            if portions is None
            else replace(portions, number=min(portions.number, self.per_epoch))
        )
        self._epoch_order = (-1, self._epoch_order[1])

    def batch(self, step: int) -> list[int]:
        """The examples of a step (from 0), over all processes."""
        epoch, place = divmod(step, self.per_epoch)
        if self._epoch_order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed("order", self.seed, epoch))
            self._epoch_order = (epoch, self._draw(generator))
            drawn = self._epoch_order[1]
            self._turns = [] if self.groups is None else _count_turns(drawn.tolist())
        part = slice(place * self.batch_size, (place + 1) * self.batch_size)
        return self._epoch_order[1][part].tolist()

    def _draw(self, generator: torch.Generator) -> Tensor:
        """The examples of an epoch."""
        if self.groups is None and self.portions is None:
            return torch.randperm(self.count, generator=generator)
        drawn = torch.arange(self.count) if self.groups is None else self._draw_groups(generator)
        if self.portions is None:
            return drawn[torch.randperm(len(drawn), generator=generator)]
        return self._deal(drawn.sort().values, self.portions, generator)

    def _draw_groups(self, generator: torch.Generator) -> Tensor:
        """As many examples of each group."""
        assert self.groups is not None
        # What does not divide falls to other groups in every epoch.
        share, rest = divmod(self.count, len(self.groups))
        more = set(torch.randperm(len(self.groups), generator=generator)[:rest].tolist())
        taken = []
        for number, group in enumerate(self.groups):
            wanted = share + (number in more)
            passes = -(-wanted // len(group))
            shuffled = [torch.randperm(len(group), generator=generator) for _ in range(passes)]
            taken.append(group[torch.cat(shuffled)[:wanted]] if shuffled else group[:0])
        return torch.cat(taken)

    def _deal(self, drawn: Tensor, portions: Portions, generator: torch.Generator) -> Tensor:
        """Examples in the order of the store, portion by portion in that of their steps."""
        runs = -(-self.count // (portions.piece * portions.number))
        dealt = torch.rand(runs, portions.number, generator=generator).argsort(1).flatten()
        drawn = drawn[dealt[drawn // portions.piece].argsort(stable=True)]
        # Portions end with a step, so that none needs rows of two.
        ends = [self._end_of_portion(k) * self.batch_size for k in range(portions.number)]
        each = [drawn[a:b].sort().values for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        return torch.cat([self._mix(rows, portions, generator) for rows in each])

    def _mix(self, rows: Tensor, portions: Portions, generator: torch.Generator) -> Tensor:
        """The rows of a portion in the order of its steps, of which each process has a run of its own."""
        whole, rest = divmod(len(rows), self.batch_size)
        batches, last, start = [], [], 0
        for k in range(portions.processes):
            share, last_share = (
                size * (k + 1) // portions.processes - size * k // portions.processes
                for size in (self.batch_size, rest)
            )
            own = rows[start : start + whole * share + last_share]
            start += len(own)
            own = own[torch.randperm(len(own), generator=generator)]
            batches.append(own[: whole * share].view(whole, share))
            last.append(own[whole * share :])
        return torch.cat([torch.cat(batches, 1).flatten(), *last])

    def _end_of_portion(self, number: int) -> int:
        """The step of an epoch that the next portion begins with."""
        assert self.portions is not None
        return self.per_epoch * (number + 1) // self.portions.number

    def end_of_portion(self, step: int) -> int:
        """The first step of the run behind the portion that a step is of."""
        if self.portions is None:
            return self.total
        epoch, place = divmod(step, self.per_epoch)
        # The last portion that begins at or before it.
        number = ((place + 1) * self.portions.number - 1) // self.per_epoch
        return epoch * self.per_epoch + self._end_of_portion(number)

    def rest_of_portion(self, step: int, rank: int, world: int) -> Tensor:
        """One process's examples from a step to the end of its portion, each once."""
        steps = range(step, self.end_of_portion(step))
        return torch.tensor([i for s in steps for i in self.share(s, rank, world)]).unique()

    def turns(self, step: int) -> list[int]:
        """How often each example of a step (from 0) came before in its epoch."""
        examples = self.batch(step)
        start = step % self.per_epoch * self.batch_size
        return self._turns[start : start + len(examples)] or [0] * len(examples)

    def size(self, step: int) -> int:
        """Number of examples of a step, over all processes."""
        place = step % self.per_epoch
        return min(self.batch_size, self.count - place * self.batch_size)

    def share(self, step: int, rank: int, world: int) -> list[int]:
        """One process's examples of a step.

        A batch of fewer examples than processes leaves some without any; they run one that does
        not count, because all processes must take part in the exchange of gradients.
        """
        return [index for index, _ in self._share(step, rank, world)]

    def _share(self, step: int, rank: int, world: int) -> list[tuple[int, int]]:
        batch = list(zip(self.batch(step), self.turns(step), strict=True))
        part = batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]
        return part or batch[:1]

    def examples(self, step: int, rank: int, world: int) -> list[tuple[int, int]]:
        """One process's examples of a step as pairs of what they are drawn by and number.

        What an example is drawn by (its augmentation) is the epoch; where it comes again within one, a number that
        no epoch is.
        """
        epoch = step // self.per_epoch
        return [
            (epoch if not turn else -(epoch * self.count + turn), index)
            for index, turn in self._share(step, rank, world)
        ]

    def counts(self, step: int, rank: int, world: int) -> int:
        """1, or 0 where a process's share is the one example that does not count."""
        size = self.size(step)
        return int(size * (rank + 1) // world > size * rank // world)


def _count_turns(drawn: Sequence[int]) -> list[int]:
    """How often each number stood before it."""
    before: Counter[int] = Counter()
    turns = []
    for number in drawn:
        turns.append(before[number])
        before[number] += 1
    return turns


class Steps(Sampler):
    """One process's batches from a step to the end of the run, or to another step, as `(epoch, index)` pairs."""

    def __init__(
        self, order: Order, start: int, rank: int, world: int, stop: int | None = None
    ) -> None:
        self.order, self.start, self.rank, self.world = order, start, rank, world
        self.stop = order.total if stop is None else stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Lists of `(epoch, index)`; skipped steps are never loaded."""
        for step in range(self.start, self.stop):
            yield self.order.examples(step, self.rank, self.world)

    def __len__(self) -> int:
        """Steps that are left."""
        return self.stop - self.start


class SeededExamples(Dataset):
    """A data set asked by `(epoch, index)`, its augmentation seeded by both."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, at: tuple[int, int]) -> Any:
        """The example with this epoch's augmentation."""
        epoch, index = at
        seed_everything("example", self.seed, epoch, index, devices=False)
        return self.dataset[index]

    def __getitems__(self, ats: list[tuple[int, int]]) -> Any:
        """A batch: of single examples, or whole where the data set gives whole batches."""
        if not getattr(self.dataset, "whole_batches", False):
            return [self[at] for at in ats]
        views = []
        for epoch, index in ats:
            if self.dataset.views > 1:
                seed_everything("example", self.seed, epoch, index, devices=False)
            views.append(self.dataset.view())
        return self.dataset.gather([index for _, index in ats], views)

    def __len__(self) -> int:
        """Examples of the data set."""
        return len(self.dataset)


def batches(
    dataset: Any,
    order: Order,
    start: int,
    rank: int,
    world: int,
    collate: Callable | None,
    workers: int,
    *,
    pin: bool,
) -> Iterable[Any]:
    """One process's batches from a step to the end of the run; one set of workers for all epochs.

    Args:
        dataset: Map-style.
        order: Which examples make up which step. Where it goes through portions, the data set is told to hold each
            (`hold`), and batches are taken from its memory in this process: workers would hold a copy each.
        start: First step.
        rank: This process.
        world: Number of processes.
        collate: Makes a batch of a list of examples.
        workers: Processes that load data.
        pin: Prepare batches for a GPU.
    """

    def load(start: int, stop: int, workers: int) -> Loader:
        return Loader(
            SeededExamples(dataset, order.seed),
            collate,
            batch_sampler=Steps(order, start, rank, world, stop),
            num_workers=workers,
            pin_memory=pin,
            # Else the loader would draw its workers' seeds from the caller's generator.
            generator=torch.Generator().manual_seed(order.seed),
        )

    def load_portions() -> Iterator[Any]:
        step = start
        while step < order.total:
            stop = order.end_of_portion(step)
            dataset.hold(order.rest_of_portion(step, rank, world))
            yield from load(step, stop, 0)
            step = stop

    return load(start, order.total, workers) if order.portions is None else load_portions()

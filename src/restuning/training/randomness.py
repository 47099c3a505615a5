"""All randomness of a run as a function of (seed, epoch, example or step).

A resumed run therefore needs no generator state: the order is drawn from (seed, epoch), an
example's augmentation from (seed, epoch, index) and dropout from (seed, step, process), whatever
ran before, in however many worker processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from restuning.data.loader import Loader
from restuning.runtime.randomness import mix_seed, seed_everything


class Order:
    """Which examples make up which step, for the whole run and any number of processes.

    Args:
        count: Examples in the training data.
        batch_size: Examples of a step over all processes; the last batch of an epoch may be smaller.
        epochs: Passes.
        seed: Seed of the order.
        groups: Numbers of examples in groups, of each of which an epoch then takes as many: those of a small one
            in turn again and again, of a large one some. None takes every example once.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        epochs: int,
        seed: int,
        groups: Sequence[Tensor] | None = None,
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.groups = None if groups is None else [group for group in groups if len(group)]
        self.per_epoch = -(-count // batch_size)
        self.total = self.per_epoch * epochs
        # Of the epoch asked for last, so that it is drawn once an epoch and not at every step.
        self._epoch_order: tuple[int, list[int]] = (-1, [])
        self._turns: list[int] = []

    def batch(self, step: int) -> list[int]:
        """The examples of a step (from 0), over all processes."""
        epoch, place = divmod(step, self.per_epoch)
        if self._epoch_order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed("order", self.seed, epoch))
            self._epoch_order = (epoch, self._draw(generator))
            self._turns = [] if self.groups is None else _count_turns(self._epoch_order[1])
        return self._epoch_order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def _draw(self, generator: torch.Generator) -> list[int]:
        """The examples of an epoch."""
        if self.groups is None:
            return torch.randperm(self.count, generator=generator).tolist()
        # What does not divide falls to other groups in every epoch.
        share, rest = divmod(self.count, len(self.groups))
        more = set(torch.randperm(len(self.groups), generator=generator)[:rest].tolist())
        taken = []
        for number, group in enumerate(self.groups):
            wanted = share + (number in more)
            passes = -(-wanted // len(group))
            shuffled = [torch.randperm(len(group), generator=generator) for _ in range(passes)]
            taken.append(group[torch.cat(shuffled)[:wanted]] if shuffled else group[:0])
        drawn = torch.cat(taken)
        return drawn[torch.randperm(len(drawn), generator=generator)].tolist()

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
    """One process's batches from a step to the end of the run, as `(epoch, index)` pairs."""

    def __init__(self, order: Order, start: int, rank: int, world: int) -> None:
        self.order, self.start, self.rank, self.world = order, start, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Lists of `(epoch, index)`; skipped steps are never loaded."""
        for step in range(self.start, self.order.total):
            yield self.order.examples(step, self.rank, self.world)

    def __len__(self) -> int:
        """Steps that are left."""
        return self.order.total - self.start


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
) -> Loader:
    """One process's batches from a step to the end of the run; one set of workers for all epochs.

    Args:
        dataset: Map-style.
        order: Which examples make up which step.
        start: First step.
        rank: This process.
        world: Number of processes.
        collate: Makes a batch of a list of examples.
        workers: Processes that load data.
        pin: Prepare batches for a GPU.
    """
    return Loader(
        SeededExamples(dataset, order.seed),
        collate,
        batch_sampler=Steps(order, start, rank, world),
        num_workers=workers,
        pin_memory=pin,
        # Else the loader would draw its workers' seeds from the caller's generator.
        generator=torch.Generator().manual_seed(order.seed),
    )

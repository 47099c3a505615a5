"""Lets side networks see the training split before the first step (`SideNetwork.prepare`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from restuning._errors import TrainingError
from restuning.bypass import SideNetwork
from restuning.bypass.side_network import Rows, SharedRows
from restuning.bypass.sums import keys_of
from restuning.data.identity import find_samples
from restuning.runtime.processes import count_processes, process_number
from restuning.runtime.randomness import preserve_randomness, seed_everything
from restuning.task import INPUT, Task
from restuning.training.evaluate import needs_all_processes

ROWS = 256
"""Rows that are read at a time."""
PROBED, DRAWS = 16, 4
"""Inputs that are read again, and how often, to see whether they are the same each time. A coin that
mirrors images falls alike in all of them once in 2^48."""


class PreparedSplit(Dataset):
    """A training split, and beside its rows what side networks made of each.

    Args:
        rows: The split.
        beside: By the names of `SideNetwork.prepared_taps`, `n ...`. All views of a row have the
            same: a mirrored image that of its plain one.
    """

    def __init__(self, rows: Any, beside: Mapping[str, Tensor]) -> None:
        self.rows, self.beside = rows, dict(beside)
        self.whole_batches = bool(getattr(rows, "whole_batches", False))
        self.views = getattr(rows, "views", 1)
        self.at_once = getattr(rows, "at_once", None)

    def __len__(self) -> int:
        """Number of inputs."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """One row with what stands beside it, or with its number, which `collate` takes."""
        if not self.whole_batches:
            return self.rows[index], index
        inputs, label = self.rows[index]
        return self._join(inputs, index), label

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """A whole batch of plain views, where the split gives whole batches."""
        if not self.whole_batches:
            return [self[index] for index in indices]
        return self.gather(indices, [0] * len(indices))

    @property
    def bytes_per_input(self) -> int:
        """That of the split."""
        return self.rows.bytes_per_input

    def hold(self, indices: Tensor) -> None:
        """Read rows of the split into memory; what stands beside them is there."""
        self.rows.hold(indices)

    def view(self) -> int:
        """Draw the view of one example, as the split does."""
        return self.rows.view()

    def gather(self, indices: Sequence[int], views: Sequence[int]) -> tuple[Any, Tensor]:
        """Inputs and labels of a batch."""
        inputs, labels = self.rows.gather(indices, views)
        return self._join(inputs, torch.as_tensor(list(indices))), labels

    def collate(self, collate: Callable | None) -> Callable | None:
        """The collate function for this data set, given the one for the split."""
        return collate if self.whole_batches else _Collate(self, collate or default_collate)

    def _join(self, inputs: Any, at: Any) -> dict[str, Any]:
        named = inputs if isinstance(inputs, Mapping) else {INPUT: inputs}
        return {**named, **{name: rows[at] for name, rows in self.beside.items()}}


class _Collate:
    """A class and not a closure: worker processes are sent it."""

    def __init__(self, prepared: PreparedSplit, collate: Callable) -> None:
        self.prepared, self.inner = prepared, collate

    def __call__(self, batch: Sequence[tuple[Any, int]]) -> tuple[Any, Any]:
        inputs, labels = self.inner([row for row, _ in batch])
        return self.prepared._join(inputs, torch.tensor([at for _, at in batch])), labels


def prepare(
    tasks: Sequence[Task],
    read: Callable[..., Mapping[str, Tensor]],
    train: Any,
    collate: Callable | None = None,
    *,
    together: bool = False,
) -> tuple[Any, Callable | None]:
    """Prepare the side networks of some tasks, in place; the split and its collate to train with.

    Both come back as they were where nothing is prepared. The same data give the same result, so a
    run that was killed goes on as it was.

    Args:
        tasks: That train on the split. Networks without parameters whose specs are equal are
            prepared once.
        read: Inputs to taps: `taps` of `Tuned` or `Cached`.
        train: The training split, also one that is prepared already.
        collate: Makes a batch of a list of examples.
        together: Every process of a launcher calls this now, and reads its share where a network allows it.

    Raises:
        TrainingError: There is something to prepare, and the inputs change from reading to reading; or
            two networks prepare different things under one name.

    Cost: for each network that reads the rows, one pass over them.
    """
    networks = [task.side for task in tasks if isinstance(task.side, SideNetwork)]
    if isinstance(train, PreparedSplit):
        # Prepared before, maybe for other tasks: begin again from the plain rows.
        train, collate = train.rows, collate.inner if isinstance(collate, _Collate) else collate
    beside: dict[str, Tensor] = {}
    done: dict[str, SideNetwork] = {}
    for network in networks:
        key = _key(network)
        if key in done:
            # Same spec and same rows: one pass over the data does for both.
            network.load_state_dict(done[key].state_dict())
            continue
        device = next((t.device for t in (*network.parameters(), *network.buffers())), None)
        rows = _Rows(train, collate or default_collate, read, device, type(network).__name__)
        rows.together = together
        results = _prepare_network(network, rows)
        _check_rows(results, network, len(train))
        _check_names(results, network, beside)
        # Loaders join these to rows on the CPU, maybe in worker processes.
        beside |= {name: tensor.cpu() for name, tensor in results.items()}
        if key:
            done[key] = network
    if not beside:
        return train, collate
    prepared = PreparedSplit(train, beside)
    return prepared, prepared.collate(collate)


def prepare_tuned(
    tuned: nn.Module, train: Any, collate: Callable | None = None
) -> tuple[Any, Callable | None]:
    """Prepare the side network of one module with `.task`, as `fit` trains it; see `prepare`."""
    task = getattr(tuned, "task", None)
    if not isinstance(task, Task) or task.side is None:
        return train, collate

    read = _taps_of(tuned)
    return prepare([task], read, train, collate, together=_in_several())


def is_solved(task: nn.Module) -> bool:
    """Whether a task is solved and takes no step; see `Task.solved`."""
    return isinstance(task, Task) and task.solved


def solve_tuned(
    tuned: nn.Module, train: Any, collate: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """Solve the side network of one module with `.task` that is solved whole (`Task.solved`), in place.

    One pass over the split. Every process of a launcher calls this, and reads its share.

    Args:
        tuned: `Tuned` or `Cached`.
        train: The training split.
        collate: Makes a batch of a list of examples.

    Returns:
        Answers to rows that were left out, `k C`, and their labels, `k`; see `SideNetwork.solve`.

    Raises:
        TrainingError: The inputs change from reading to reading, or what is solved does not fit into memory.
    """
    task: Any = tuned.task
    # Where all processes make each forward, each of them reads all.
    together = _in_several() and not needs_all_processes(tuned)
    return solve_rows([task], _taps_of(tuned), train, collate, together=together)


def solve_rows(
    tasks: Sequence[Task],
    read: Callable[..., Mapping[str, Tensor]],
    train: Any,
    collate: Callable | None = None,
    *,
    together: bool = False,
) -> tuple[Tensor, Tensor]:
    """Solve tasks of one form; the arguments are those of `prepare`, the rest as of `solve_tuned`."""
    if isinstance(train, PreparedSplit):
        train, collate = train.rows, collate.inner if isinstance(collate, _Collate) else collate
    first, *others = [task.side for task in tasks]
    assert first is not None
    device = next((t.device for t in (*first.parameters(), *first.buffers())), None)
    rows = _Rows(train, collate or default_collate, read, device, type(first).__name__)
    rows.together = together
    with preserve_randomness(), torch.no_grad():
        seed_everything("prepare")
        answers, labels = first.solve(rows)
    for other in others:
        assert other is not None
        other.load_state_dict(first.state_dict())
    return answers, labels


def _in_several() -> bool:
    """Whether processes of a launcher train together."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several and count_processes() > 1


def _taps_of(tuned: nn.Module) -> Callable[..., Mapping[str, Tensor]]:
    def read(*args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        taps: Any = getattr(tuned, "taps", None)
        if taps is None:
            raise TrainingError(
                "a side network cannot be prepared here",
                where=type(tuned).__name__,
                found="a module that does not give the taps of an input",
                fix="train Tuned(host, task), or Cached(host, task, store)",
            )
        return taps(*args, **kwargs)

    return read


def conclude_tuned(tuned: nn.Module, train: Any, collate: Callable | None = None) -> None:
    """Let the side network of one module with `.task` end what it trained; see `conclude`.

    Args:
        tuned: `Tuned` or `Cached`.
        train: The split that it was trained on, as `prepare_tuned` gave it.
        collate: Likewise.
    """
    task: Any = getattr(tuned, "task", None)
    if isinstance(task, Task):
        host: Any = getattr(tuned, "host", None)
        conclude(task, host, _taps_of(tuned), train, collate)


def conclude(
    task: Task,
    host: Any,
    read: Callable[..., Mapping[str, Tensor]],
    train: Any,
    collate: Callable | None = None,
) -> bool:
    """Let a side network end what it trained, in place (`SideNetwork.conclude`); whether it had anything to end.

    Args:
        task: Trained.
        host: Lends its readout.
        read: Inputs to taps.
        train: The split that it was trained on, as `prepare` gave it.
        collate: Likewise.
    """
    side = task.side
    if side is None or type(side).conclude is SideNetwork.conclude:
        return False

    def read_prepared(*args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        beside = task.take_prepared(kwargs)
        taps = read(*args, **kwargs)
        # Features bear more than their taps, which a new mapping would lose.
        assert isinstance(taps, dict)
        taps.update(beside)
        return taps

    device = next((t.device for t in (*side.parameters(), *side.buffers())), None)
    rows = _Rows(train, collate or default_collate, read_prepared, device, type(side).__name__)
    with preserve_randomness(), torch.no_grad():
        seed_everything("conclude")
        side.conclude(rows, host.readout, task.pool)
    return True


def prepare_without_rows(tasks: Sequence[Task]) -> None:
    """Prepare the side networks of some tasks, in place, where there are no rows of taps to show them.

    Raises:
        TrainingError: One reads rows, or wants to be handed something in beside them.
    """
    for side in (task.side for task in tasks if task.side is not None):
        rows = _NoRows(type(side).__name__)
        _prepare_network(side, rows)
        if side.prepared_taps:
            rows.refuse(f"it prepares {', '.join(side.prepared_taps)} of every row")


def with_stand_ins(
    tuned: nn.Module, train: Any, collate: Callable | None
) -> tuple[Any, Callable | None]:
    """The split as it will be once it is prepared, with zeros beside its rows: for measurements."""
    task = getattr(tuned, "task", None)
    side = task.side if isinstance(task, Task) else None
    if side is None or not side.prepared_taps or isinstance(train, PreparedSplit):
        return train, collate
    beside = {n: torch.zeros(len(train), *shape) for n, shape in side.prepared_taps.items()}
    prepared = PreparedSplit(train, beside)
    return prepared, prepared.collate(collate)


class _Rows(SharedRows):
    """Taps and labels of a split in its order, read anew by every iteration."""

    def __init__(
        self, train: Any, collate: Callable, read: Callable, device: Any, network: str
    ) -> None:
        self.train, self.collate, self.read = train, collate, read
        self.device, self.network = device, network
        self.together = False

    @cached_property
    def keys(self) -> Tensor | None:
        """Of the contents of inputs, where those are known one by one."""
        samples = find_samples(self.train)
        return None if samples is None else keys_of(samples.inputs)

    def __len__(self) -> int:
        return len(self.train)

    def __iter__(self) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        return ((taps, labels) for _, taps, labels in self._read(0, 1))

    def share(self) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor], Tensor]]:
        """As many batches as others have, each as one process alone would read it."""
        if self.together:
            return self._read(process_number(), count_processes())
        return self._read(0, 1)

    def _read(
        self, first: int, every: int
    ) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor], Tensor]]:
        if not getattr(self.train, "whole_batches", False):
            refuse_changing(self.train, self.network)
        for start in range(first * ROWS, len(self.train), every * ROWS):
            indices = range(start, min(start + ROWS, len(self.train)))
            inputs, labels = self._batch(list(indices))
            inputs = _move(inputs, self.device)
            taps = self.read(**inputs) if isinstance(inputs, Mapping) else self.read(inputs)
            yield indices, taps, labels

    def _batch(self, indices: list[int]) -> tuple[Any, Tensor]:
        # Whole batches are asked for their plain view, so that mirrored ones do no harm.
        if getattr(self.train, "whole_batches", False):
            return self.train.gather(indices, [0] * len(indices))
        return self.collate([self.train[index] for index in indices])


class _NoRows:
    """Stands where there is nothing that a side network could be shown."""

    def __init__(self, network: str) -> None:
        self.network = network

    def __iter__(self) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        self.refuse("it reads the training split")

    def refuse(self, why: str) -> NoReturn:
        raise TrainingError(
            "a side network that is prepared from the data cannot be trained here",
            where=self.network,
            found=f"{why}, and inputs that are noised anew at every step have no rows to show",
            fix="give the task a side network that needs none, such as res-tuning-bypass",
        )


def refuse_changing(train: Any, network: str) -> None:
    """Read some inputs several times under other seeds, and refuse those that change.

    What is made of a row before training would else belong to an image that training never shows.

    Raises:
        TrainingError: One changed.
    """
    count = min(PROBED, len(train))
    for number in range(count):
        index = number * len(train) // count
        with preserve_randomness():
            seed_everything("prepare", 0, index, devices=False)
            first = _flatten_tensors(train[index][0])
            for draw in range(1, DRAWS):
                seed_everything("prepare", draw, index, devices=False)
                again = _flatten_tensors(train[index][0])
                if not all(map(_are_same, first, again)):
                    raise TrainingError(
                        "a side network is prepared from inputs that stay the same",
                        where=network,
                        found=f"input {index} is another one each time it is read "
                        "(random augmentation)",
                        fix="train without random augmentation, or from stored features, whose "
                        "views are fixed (`restuning cache --views`)",
                    )


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Number by number; NaN, of a pixel of which nothing is known, is the same as NaN."""
    if not one.is_floating_point() or one.shape != other.shape:
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _key(network: SideNetwork) -> str:
    """Networks of one key end up equal; empty where weights of their own may tell them apart."""
    if next(network.parameters(), None) is not None:
        return ""
    if any(bool(tensor.any()) for tensor in network.buffers()):
        # Such as a head of class names, or a solution of before.
        return ""
    return json.dumps(network.spec(), sort_keys=True, default=str)


def _prepare_network(network: SideNetwork, rows: Rows) -> Mapping[str, Tensor]:
    with preserve_randomness(), torch.no_grad():
        # A constant: a run that goes on must prepare what it prepared before.
        seed_everything("prepare")
        return network.prepare(rows)


def _check_names(
    results: Mapping[str, Tensor], network: SideNetwork, before: Mapping[str, Tensor]
) -> None:
    """Refuse what would take the place of another network's rows, which would train on it."""
    for name in results.keys() & before.keys():
        if not torch.equal(results[name].cpu(), before[name]):
            raise TrainingError(
                "two side networks prepare different rows under one name",
                where=type(network).__name__,
                found=name,
                fix="train their tasks one at a time",
            )


def _check_rows(results: Mapping[str, Tensor], network: SideNetwork, count: int) -> None:
    announced = {name: (count, *shape) for name, shape in network.prepared_taps.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in results.items()}
    if shapes != announced:
        raise TrainingError(
            "a side network prepared something else than it announced",
            where=type(network).__name__,
            found=f"{shapes}, announced {announced}",
            fix="let prepare return what prepared_taps names, a row for every input",
        )


def _move(inputs: Any, device: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _move(value, device) for name, value in inputs.items()}
    return inputs.to(device) if isinstance(inputs, Tensor) and device is not None else inputs


def _flatten_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        return [t for each in value.values() for t in _flatten_tensors(each)]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in _flatten_tensors(each)]
    return [torch.as_tensor(value)] if not isinstance(value, str) else []

"""Which rows of a batch belong to which of several tasks.

`generate()` of transformers runs every input several times (beams, returned sequences, candidates), and
a pipeline of diffusers makes several images of one prompt: rows of one input then follow one another.
Neither says so to the model, and values of rows do not tell it either (two tasks may be asked the same).
So it is read where it stands, in the running call of the library that multiplied them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from restuning._errors import TunerShapeError, WrongTaskError

Take = Callable[[Tensor], Tensor]

ONE_AT_A_TIME = "use one task at a time: host.using(task)"


@dataclass(frozen=True)
class RowsOfTasks:
    """Rows in groups of `repeats`, and the groups go to the tasks in turn.

    Attributes:
        tasks: Number of tasks.
        repeats: Rows of one input, one after the other.
    """

    tasks: int
    repeats: int = 1

    @classmethod
    def find(cls, tasks: int, batch: int) -> RowsOfTasks:
        """How a batch of the running forward is shared out.

        Raises:
            TunerShapeError: It does not divide among the tasks.
            WrongTaskError: What runs the backbone does not tell which rows belong together.
        """
        rows = cls(tasks, _count_repeats(tasks, batch))
        if batch % (tasks * rows.repeats):
            each = "" if rows.repeats == 1 else f", {rows.repeats} of each input"
            raise TunerShapeError(
                "the batch does not divide among the tasks",
                found=f"{batch} rows{each}, {tasks} tasks",
                fix="give one task for every input, or as many as divide their number",
            )
        return rows

    def share(self, run: Callable[[int, Take], Tensor]) -> Tensor:
        """What every task makes of its rows, in the order of the batch.

        Args:
            run: Given the number of a task and a function that takes rows of a tensor, it answers with
                as many rows.
        """
        if self.repeats == 1:
            parts = [run(i, partial(_take_every, i, self.tasks)) for i in range(self.tasks)]
            # k tensors of every k-th row, back in the order of the batch.
            return torch.stack(parts, 1).flatten(0, 1)
        # A product of fewer rows rounds otherwise, and of two equal beams would prefer the other: here
        # every task runs all rows, which are then bit for bit those of a batch that is its own.
        whole = [self._group(run(i, partial(_take_every, 0, 1))) for i in range(self.tasks)]
        return torch.stack([each[:, i] for i, each in enumerate(whole)], 1).flatten(0, 2)

    def _group(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, self.tasks, self.repeats))


def _take_every(first: int, step: int, values: Tensor) -> Tensor:
    return values[first::step]


def _count_repeats(tasks: int, batch: int) -> int:
    """Rows that follow one another for one input, by the library whose call is running; else 1."""
    if tasks == 1:
        return 1
    # What is looked at is no tensor: a compiled backbone leaves its graph there. To be asked for that
    # imports a compiler, for seconds.
    look: Any = _look_at_callers
    if torch.compiler.is_compiling():
        look = torch.compiler.disable(look)
    return look(tasks, batch)


def _look_at_callers(tasks: int, batch: int) -> int:
    for frame in _callers():
        module, function = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if function == "generate" and module == "transformers.generation.utils":
            _refuse_own_generate(frame.f_back)
            return _repeats_in_generate(frame.f_locals, batch)
        if function == "__call__" and module.startswith("diffusers."):
            return _repeats_in_pipeline(frame.f_locals, tasks)
        if function == "generate" and module.startswith("transformers."):
            raise _unknown(f"{module}.generate")
    return 1


def _callers(start: FrameType | None = None) -> Iterator[FrameType]:
    frame = inspect.currentframe() if start is None else start
    while frame is not None:
        yield frame
        frame = frame.f_back


def _refuse_own_generate(outside: FrameType | None) -> None:
    """A model's own `generate` around the common one may leave rows out or put others in (Whisper)."""
    for frame in _callers(outside) if outside is not None else ():
        module = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "generate" and module.startswith("transformers.models."):
            raise _unknown(f"{module}.generate")


def _repeats_in_generate(values: Mapping[str, Any], batch: int) -> int:
    """Beams, sequences and candidates stand beside one another, whatever the strategy."""
    inputs = values.get("batch_size")
    # An encoder runs before rows are multiplied: the batch itself tells by how much they were.
    if not isinstance(inputs, int) or inputs < 1 or batch % inputs:
        raise _unknown(f"generate() with {inputs} inputs, {batch} rows in the backbone")
    if getattr(values.get("generation_config"), "low_memory", None):
        raise _unknown("generate(low_memory=True), which runs beams one after the other")
    return batch // inputs


def _repeats_in_pipeline(values: Mapping[str, Any], tasks: int) -> int:
    counts = [
        v for n, v in values.items() if n.startswith("num_") and n.endswith("_per_prompt") and v
    ]
    images = counts[0] if counts else 1
    prompt = values.get("prompt")
    prompts = len(prompt) if isinstance(prompt, (list, tuple)) else 1 if prompt else 0
    if images == 1 or prompts == 1:
        # Each row is an image of its own.
        return 1
    if prompts and tasks == prompts * images:
        return 1
    if prompts and prompts % tasks == 0:
        return images
    raise _unknown(f"{images} images of each of {prompts or 'unknown'} prompts, {tasks} tasks")


def _unknown(found: str) -> WrongTaskError:
    return WrongTaskError(
        "it cannot be known which rows of the batch belong to which task",
        found=found,
        fix=f"{ONE_AT_A_TIME}, or give every row as an input of its own",
    )

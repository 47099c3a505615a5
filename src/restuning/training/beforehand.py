"""What would fail after a training, for a reason that was there before it, fails before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from restuning._errors import DataError, TrainingError
from restuning._files import try_writing
from restuning.data import Data
from restuning.data.data import MediaDataset
from restuning.training.together import from_main

OF_A_RUN = ("metrics.json", "settings.json", "log.jsonl", "curves.png")
"""What a run writes beside its task and its checkpoints."""


def check_beforehand(data: Data, out: Path, files: Sequence[str]) -> None:
    """Look at the test split, which is read last, and at the files that are written last.

    Args:
        data: With its splits apart.
        out: The folder of the run; it need not be there.
        files: Names in it.

    Raises:
        DataError: There is a test split, and nothing in it.
        TrainingError: A file could not be written.
    """
    if data.test is not None and len(data.test) == 0:
        raise DataError(
            "the test split is empty",
            where=data.name,
            found="0 examples: nothing could be tested after training",
            fix="give it examples, or leave it out: without one the validation accuracy is shown",
        )
    # By the process that writes; what stops it stops the others in words.
    from_main(lambda: try_files(out, files))


def read_once(*splits: Any) -> None:
    """Read every image or sound of splits that are read only after training has taken its time.

    What is stored was read when it was stored; texts and tensors lie in memory. Inputs of a class of
    the user's own are not looked at: reading them might not be free of effects.

    Raises:
        DataError: One cannot be read; it is named.

    Cost: one decoding of each, as an epoch of training has for each of its own.
    """
    for split in splits:
        inputs, indices = split, None
        while isinstance(inputs, Subset):
            chosen = list(inputs.indices)
            indices = chosen if indices is None else [chosen[i] for i in indices]
            inputs = inputs.dataset
        if isinstance(inputs, MediaDataset):
            for index in range(len(inputs)) if indices is None else indices:
                inputs.read(index)


def try_files(out: Path, files: Sequence[str]) -> None:
    """Look whether files of these names could be written into a folder, which need not be there.

    Raises:
        TrainingError: One could not.
    """
    for name in files:
        try:
            try_writing(out / name)
        except OSError as error:
            raise TrainingError(
                "a result could not be written",
                where=str(out / name),
                found=error.strerror or str(error),
                fix="free space, make the folder writable or choose another --out; nothing was begun",
            ) from None

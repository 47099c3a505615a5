"""The loader of batches, in this process or in others: an error of ours arrives as it was raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from restuning._errors import RestuningError


class Loader(DataLoader):
    """torch's loader, out of whose processes an error of ours comes as itself.

    torch would raise it again with the traceback of the process as its words; here it is given in the place of the
    batch, and raised by who takes the batches.

    Args:
        dataset: Map-style, of samples, or of whole batches by `__getitems__`.
        collate: Makes a batch of a list of examples; None for torch's default.
        options: As for `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Any, collate: Callable | None = None, **options: Any) -> None:
        super().__init__(_Given(dataset), collate_fn=_Collated(collate), **options)

    def __iter__(self) -> Iterator[Any]:
        """Batches, in order.

        Raises:
            RestuningError: A sample or a batch could not be made.
        """
        for batch in super().__iter__():
            if isinstance(batch, RestuningError):
                raise batch
            yield batch


class _Given(Dataset):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        several = getattr(self.dataset, "__getitems__", None)
        try:
            return several(indices) if several else [self.dataset[index] for index in indices]
        except RestuningError as error:
            return error


class _Collated:
    def __init__(self, collate: Callable | None) -> None:
        self.collate = collate or default_collate

    def __call__(self, samples: Any) -> Any:
        if isinstance(samples, RestuningError):
            return samples
        try:
            return self.collate(samples)
        except RestuningError as error:
            return error

"""What a user gives a predictor, as batches for a backbone. One class a kind of input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning.backbones import Preprocessing
from restuning.data import (
    CORRUPT,
    TagBatch,
    TextBatch,
    find_images,
    merge_left_out,
    read_csv,
    read_image,
    say_left_out,
)
from restuning.data.folders import USUAL
from restuning.data.text_files import read_lines
from restuning.data.texts import TABLES


@dataclass(frozen=True)
class Batch:
    """Inputs that belong together.

    Attributes:
        inputs: As they were given, a folder as its files.
        args, kwargs: The backbone's.
        words: For every text the token that answers for each word; None where a text has one answer.
    """

    inputs: list[Any]
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = field(default_factory=dict)
    words: list[dict[int, int]] | None = None


class Inputs(ABC):
    """One kind of input.

    Attributes:
        kind: In a word.
    """

    kind: str

    @abstractmethod
    def single(self, given: Any) -> bool:
        """Whether this is one input (or one folder or file of them) rather than many."""

    @abstractmethod
    def expand(self, given: Iterable[Any]) -> Iterator[Any]:
        """Every single input behind what was given, in order.

        Raises:
            DataError: A folder or a file holds none, or cannot be read.
        """

    @abstractmethod
    def batch(self, inputs: Sequence[Any]) -> Batch:
        """Some single inputs, ready for the backbone.

        Raises:
            DataError: One cannot be read or is of another kind.
        """


class ImageInputs(Inputs):
    """Image files, folders of them, bytes of files, PIL images, arrays and tensors.

    Args:
        preprocessing: How an image becomes the backbone's input.
        skip_bad: Leave files out that cannot be read, and keep their names.

    Attributes:
        left_out: Files that were left out so far, by reason; see `restuning.data.say_left_out`.
    """

    kind = "image"

    def __init__(self, preprocessing: Preprocessing, skip_bad: bool = False) -> None:
        self.preprocessing, self.skip_bad = preprocessing, skip_bad
        self.left_out: dict[str, list[Path]] = {}

    def single(self, given: Any) -> bool:
        """A path, an image, or an array or tensor that is one image."""
        if isinstance(given, np.ndarray | Tensor):
            # `b h w c` and `b c h w` have four axes.
            return given.ndim < 4
        return isinstance(given, str | Path | bytes | Image.Image)

    def expand(self, given: Iterable[Any]) -> Iterator[Any]:
        """Folders as the images in them, at any depth and in the order of their names."""
        for each in given:
            if isinstance(each, str) and not each.strip():
                # As a path it would be the folder that one stands in.
                raise DataError("an image without a name", found=repr(each), fix="give a path")
            if isinstance(each, str | Path) and not Path(each).exists():
                # Before the first answer, and also where damaged files are left out: this is none.
                raise DataError("no such image or folder", where=str(each), fix="check the path")
            if not isinstance(each, str | Path) or not Path(each).is_dir():
                yield each
                continue
            # In order, so that answers can be compared between runs.
            files, others = find_images(Path(each))
            # To be told of: an image of a kind that we do not know is among them.
            merge_left_out(self.left_out, others)
            if not files:
                raise DataError(
                    "a folder without images",
                    where=str(each),
                    found=say_left_out(others),
                    fix=f"put images there ({USUAL})",
                )
            yield from map(str, files)

    def batch(self, inputs: Sequence[Any]) -> Batch:
        """Decoded and prepared; files that cannot be read raise, or are left out."""
        good, tensors = [], []
        for each in inputs:
            try:
                tensors.append(self._to_tensor(each))
                good.append(each)
            except DataError:
                # What a program hands over is its own mistake; a folder may hold a damaged file.
                if not self.skip_bad or not isinstance(each, str | Path):
                    raise
                self.left_out.setdefault(CORRUPT, []).append(Path(each))
        return Batch(good, (torch.stack(tensors),) if tensors else ())

    def _to_tensor(self, given: Any) -> Tensor:
        if isinstance(given, Tensor):
            return self._prepare_tensor(given)
        return self.preprocessing.image(read_image(given))

    def _prepare_tensor(self, tensor: Tensor) -> Tensor:
        """Bytes `c h w` are pixels; floats of the backbone's own size were prepared before."""
        if tensor.dtype == torch.uint8 and tensor.dim() == 3:
            # From `c h w` to the `h w c` of arrays and Pillow.
            return self.preprocessing.image(read_image(tensor.permute(1, 2, 0).cpu().numpy()))
        wanted = (3, *self.preprocessing.size)
        if tensor.is_floating_point() and tuple(tensor.shape) == wanted:
            # To be stacked with others: a batch goes to the device as a whole.
            return tensor.detach().float().cpu()
        raise DataError(
            "a tensor that is no image",
            found=f"{tuple(tensor.shape)} of {tensor.dtype}",
            fix=f"give pixels as `c h w` of torch.uint8, or prepared images {wanted} of floats",
        )


class TextInputs(Inputs):
    """Texts; a `Path` is a file of them.

    Args:
        collate: Texts to tokens, as the task was trained.
    """

    kind = "text"

    def __init__(self, collate: TextBatch) -> None:
        self.collate = collate
        # A fast tokenizer refuses to pad for two threads at once.
        self._one_at_a_time = Lock()

    def single(self, given: Any) -> bool:
        """A text, or a file of texts."""
        return isinstance(given, str | Path)

    def expand(self, given: Iterable[Any]) -> Iterator[Any]:
        """Files as their texts; see `file_texts`."""
        for each in given:
            if isinstance(each, Path):
                yield from file_texts(each)
            else:
                yield each

    def batch(self, inputs: Sequence[Any]) -> Batch:
        """Tokens of some texts."""
        for each in inputs:
            if not isinstance(each, str):
                raise DataError("not a text", found=type(each).__name__, fix="give strings")
        with self._one_at_a_time:
            return Batch(list(inputs), kwargs=dict(self.collate.tokens(inputs)))


class WordInputs(TextInputs):
    """Texts whose words are each answered: lists of words, or strings apart at white space.

    Args:
        collate: Words to tokens, as the task was trained.
    """

    kind = "words"

    def __init__(self, collate: TagBatch) -> None:
        super().__init__(collate)
        self.words = collate

    def expand(self, given: Iterable[Any]) -> Iterator[Any]:
        """All sentences that have a word, as lists of words."""
        for each in super().expand(given):
            words = each.split() if isinstance(each, str) else list(each)
            # An empty line has no word to answer for.
            if words:
                yield words

    def batch(self, inputs: Sequence[Any]) -> Batch:
        """Tokens of some sentences."""
        with self._one_at_a_time:
            tokens, places = self.words.place_words(inputs)
        return Batch(list(inputs), kwargs=tokens, words=places)


def file_texts(file: Path, column: str = "text") -> list[str]:
    """The texts of a file: of a csv those of a column, of any other file its lines.

    Args:
        file: The file.
        column: Of a csv.

    Raises:
        DataError: It cannot be read, has no such column, or holds no text.
    """
    if file.suffix.lower() in TABLES:
        texts = [text for text, _ in read_csv(file, column, None)]
    else:
        texts = read_lines(file)
    if not texts:
        raise DataError("a file without texts", where=str(file), fix="fill it, or leave it out")
    return texts

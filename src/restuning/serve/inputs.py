"""What a user gives a predictor, as batches for a backbone. One class a kind of input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning.backbones import AudioPreprocessing, Preprocessing, measure_audio
from restuning.backbones.audio import is_samples
from restuning.backbones.images import scaled_from
from restuning.data import (
    CORRUPT,
    TagBatch,
    TextBatch,
    merge_left_out,
    read_csv,
    read_image,
    say_left_out,
)
from restuning.data.media import IMAGES, SOUNDS, Media
from restuning.data.sounds import ROUNDED
from restuning.data.text_files import read_lines
from restuning.data.texts import TABLES
from restuning.problems.problem import Box

Place = tuple[tuple[int, int], Box]
"""Height and width of an image, and what is seen of it."""


@dataclass(frozen=True)
class Batch:
    """Inputs that belong together.

    Attributes:
        inputs: As they were given, a folder as its files.
        args, kwargs: The backbone's.
        words: For every text the token that answers for each word; None where a text has one answer.
        places: Of every image its height and width, and what the backbone is shown of it, in its own pixels.
    """

    inputs: list[Any]
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = field(default_factory=dict)
    words: list[dict[int, int]] | None = None
    places: list[Place] | None = None


class Inputs(ABC):
    """One kind of input.

    Attributes:
        kind: In a word.
    """

    kind: str

    def single(self, given: Any) -> bool:
        """See `is_single`."""
        return is_single(self.kind, given)

    def expand(self, given: Iterable[Any]) -> Iterator[Any]:
        """See `expand`."""
        return expand(self.kind, given)

    @abstractmethod
    def batch(self, inputs: Sequence[Any]) -> Batch:
        """Some single inputs, ready for the backbone.

        Raises:
            DataError: One cannot be read or is of another kind.
        """


class FileInputs(Inputs):
    """Inputs that lie in files, and folders of them.

    Args:
        skip_bad: Leave files out that cannot be read, and keep their names.

    Attributes:
        left_out: Files that were left out so far, by reason; see `restuning.data.say_left_out`.
    """

    def __init__(self, skip_bad: bool = False) -> None:
        self.skip_bad = skip_bad
        self.left_out: dict[str, list[Path]] = {}

    def expand(self, given: Iterable[Any]) -> Iterator[Any]:
        """Folders as the files of this kind in them, at any depth and in the order of their names."""
        return expand(self.kind, given, self.left_out)

    def make(self, inputs: Sequence[Any], make: Callable[[Any], Any]) -> tuple[list, list]:
        """Inputs, and what was made of each; files that cannot be read raise, or are left out."""
        good, made = [], []
        for each in inputs:
            try:
                made.append(make(each))
                good.append(each)
            except DataError:
                # What a program hands over is its own mistake; a folder may hold a damaged file.
                if not self.skip_bad or not isinstance(each, str | Path):
                    raise
                self.left_out.setdefault(CORRUPT, []).append(Path(each))
        return good, made


class ImageInputs(FileInputs):
    """Image files, folders of them, bytes of files, PIL images, arrays and tensors.

    Args:
        preprocessing: How an image becomes the backbone's input.
        skip_bad: As of `FileInputs`.
    """

    kind = "image"

    def __init__(self, preprocessing: Preprocessing, skip_bad: bool = False) -> None:
        super().__init__(skip_bad)
        self.preprocessing = preprocessing

    def batch(self, inputs: Sequence[Any]) -> Batch:
        """Decoded and prepared; files that cannot be read raise, or are left out."""
        good, made = self.make(inputs, self._to_tensor)
        if not made:
            return Batch(good)
        return Batch(
            good, (torch.stack([x for x, _ in made]),), places=[place for _, place in made]
        )

    def open(self, given: Any) -> Image.Image | None:
        """One image, decoded and not prepared; None of a file that cannot be read, where such are left out.

        Raises:
            DataError: It cannot be read, or is prepared already.
        """
        if isinstance(given, Tensor):
            if given.dtype != torch.uint8 or given.dim() != 3:
                raise DataError(
                    "a tensor that is no image in its own size",
                    found=f"{tuple(given.shape)} of {given.dtype}",
                    fix="give pixels as `c h w` of torch.uint8",
                )
            # From `c h w` to the `h w c` of arrays and Pillow.
            given = given.permute(1, 2, 0).cpu().numpy()
        try:
            return read_image(given)
        except DataError:
            # What a program hands over is its own mistake; a folder may hold a damaged file.
            if not self.skip_bad or not isinstance(given, str | Path):
                raise
            self.left_out.setdefault(CORRUPT, []).append(Path(given))
            return None

    def _to_tensor(self, given: Any) -> tuple[Tensor, Place]:
        if isinstance(given, Tensor):
            return self._prepare_tensor(given)
        return self._prepare(read_image(given, least=self.preprocessing.least))

    def _prepare(self, image: Image.Image) -> tuple[Tensor, Place]:
        width, height = scaled_from(image).size
        seen = self.preprocessing.seen(width, height)
        return self.preprocessing.image(image), ((height, width), seen)

    def _prepare_tensor(self, tensor: Tensor) -> tuple[Tensor, Place]:
        """Bytes `c h w` are pixels; floats of the backbone's own size were prepared before."""
        if tensor.dtype == torch.uint8 and tensor.dim() == 3:
            # From `c h w` to the `h w c` of arrays and Pillow.
            return self._prepare(read_image(tensor.permute(1, 2, 0).cpu().numpy()))
        wanted = (3, *self.preprocessing.size)
        if tensor.is_floating_point() and tuple(tensor.shape) == wanted:
            # To be stacked with others: a batch goes to the device as a whole.
            height, width = self.preprocessing.size
            return tensor.detach().float().cpu(), ((height, width), (0, 0, width, height))
        raise DataError(
            "a tensor that is no image",
            found=f"{tuple(tensor.shape)} of {tensor.dtype}",
            fix=f"give pixels as `c h w` of torch.uint8, or prepared images {wanted} of floats",
        )


class AudioInputs(FileInputs):
    """Sound files, folders of them, bytes of files, samples with their rate.

    Args:
        audio: How a sound becomes the backbone's input.
        skip_bad: As of `FileInputs`.

    Attributes:
        cut: Names of files of which not all was read so far, for they are longer than what is read of any.
    """

    kind = "audio"

    def __init__(self, audio: AudioPreprocessing, skip_bad: bool = False) -> None:
        super().__init__(skip_bad)
        self.audio = audio
        self.cut: list[str] = []

    def batch(self, inputs: Sequence[Any]) -> Batch:
        """Decoded, prepared and filled up; files that cannot be read raise, or are left out."""
        good, made = self.make(inputs, self.prepare)
        return Batch(good, kwargs=self.audio.collate(made)) if made else Batch(good)

    def prepare(self, given: Any) -> Tensor:
        """One sound as the backbone's feature extractor makes it; what `batch` is given of it is as it is.

        Raises:
            DataError: It cannot be read.
        """
        if isinstance(given, Tensor):
            return given
        prepared = self.audio.prepare(self.audio.read(given))
        file = isinstance(given, str | Path)
        if file and measure_audio(given).seconds > self.audio.seconds + ROUNDED:
            self.cut.append(str(given))
        return prepared


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

    def batch(self, inputs: Sequence[Any]) -> Batch:
        """Tokens of some sentences."""
        with self._one_at_a_time:
            tokens, places = self.words.place_words(inputs)
        return Batch(list(inputs), kwargs=tokens, words=places)


def is_single(kind: str, given: Any) -> bool:
    """Whether this is one input of a kind (or one folder or file of them) rather than many."""
    if kind == "audio":
        return isinstance(given, str | Path | bytes) or is_samples(given)
    if kind != "image":
        return isinstance(given, str | Path)
    if isinstance(given, np.ndarray | Tensor):
        # `b h w c` and `b c h w` have four axes.
        return given.ndim < 4
    return isinstance(given, str | Path | bytes | Image.Image)


def expand(
    kind: str, given: Iterable[Any], left_out: dict[str, list[Path]] | None = None
) -> Iterator[Any]:
    """Every single input behind what was given, in order.

    Args:
        kind: Of inputs: "image", "audio", "text" or "words".
        given: Images or sounds and folders of them; texts or words, and files of texts.
        left_out: Takes up the files of folders that are of another kind, by reason.

    Raises:
        DataError: A folder or a file holds none, or cannot be read.
    """
    for media in (IMAGES, SOUNDS):
        if kind == media.kind:
            yield from _expand_files(media, given, {} if left_out is None else left_out)
            return
    for each in given:
        for text in file_texts(each) if isinstance(each, Path) else [each]:
            if kind == "text":
                yield text
            # An empty line has no word to answer for.
            elif words := text.split() if isinstance(text, str) else list(text):
                yield words


def _expand_files(
    media: Media, given: Iterable[Any], left_out: dict[str, list[Path]]
) -> Iterator[Any]:
    for each in given:
        if isinstance(each, str) and not each.strip():
            # As a path it would be the folder that one stands in.
            raise DataError(f"{media.noun} without a name", found=repr(each), fix="give a path")
        if isinstance(each, str | Path) and not Path(each).exists():
            # Before the first answer, and also where damaged files are left out: this is none.
            noun = media.noun.partition(" ")[2]
            raise DataError(f"no such {noun} or folder", where=str(each), fix="check the path")
        if not isinstance(each, str | Path) or not Path(each).is_dir():
            yield each
            continue
        # In order, so that answers can be compared between runs.
        files, others = media.find(Path(each))
        # To be told of: a file of a kind that we do not know is among them.
        merge_left_out(left_out, others)
        if not files:
            raise DataError(
                f"a folder without {media.nouns}",
                where=str(each),
                found=say_left_out(others),
                fix=f"put {media.nouns} there ({media.usual})",
            )
        yield from map(str, files)


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

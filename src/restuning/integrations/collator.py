"""Examples as a user has them to a batch of named inputs and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restuning._errors import DataError
from restuning.backbones import AnyPreprocessing, AudioPreprocessing
from restuning.data import TagBatch, TextBatch
from restuning.integrations.inputs import LABELS
from restuning.serve.inputs import AudioInputs, ImageInputs, TextInputs

OF_LABELS = (LABELS, "label", "label_ids")
"""Columns that transformers takes for labels."""

Prepare = AnyPreprocessing | TextBatch
"""What makes inputs of images, sounds, texts or tagged words."""


@dataclass(frozen=True)
class Collator:
    """Makes a batch of images, sounds, texts or tagged words: `TaskModel.collator` makes one for its backbone.

    Inputs are prepared as a saved task's are when it is asked (`Predictor`). The same examples give the same
    batch, since Trainer uses one collator for training and evaluation: augmentation belongs into a data set
    (`load_data(..., augment=...)`).

    Examples are `(input, label)`, or mappings with the input under `column` and the label under `labels`,
    `label` or `label_ids`, or with none. An image is whatever `Predictor` takes: a path, bytes of a file, a PIL
    image, an array, or a tensor of floats that is prepared; a sound likewise, of which the first seconds are read
    that the backbone takes; a text a string; of tagged words a list of them, and as many labels.

    Args:
        prepare: How an image or a sound becomes an input, or texts become tokens.
        column: Name of the input in an example that is a mapping.
        name: Of the input that images become.
    """

    prepare: Prepare
    column: str
    name: str

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Inputs by name, and `labels` where all examples have one.

        Raises:
            DataError: An example has no input, cannot be read, or has a label that is no number; some have
                labels and some have none.
        """
        inputs, labels = zip(*map(self._split, examples), strict=True)
        missing = sum(label is None for label in labels)
        if 0 < missing < len(labels):
            raise DataError(
                "some examples of a batch have a label and some have none",
                found=f"{missing} of {len(labels)} without",
                fix=f"give all of them one under {LABELS!r}, or none",
            )
        if isinstance(self.prepare, TagBatch):
            return self._tags(inputs, None if missing else labels)
        if isinstance(self.prepare, TextBatch):
            batch = TextInputs(self.prepare).batch(inputs).kwargs
        elif isinstance(self.prepare, AudioPreprocessing):
            batch = AudioInputs(self.prepare).batch(inputs).kwargs
        else:
            batch = {self.name: ImageInputs(self.prepare).batch(inputs).args[0]}
        return batch if missing else {**batch, LABELS: torch.stack([_tensor(y) for y in labels])}

    def to_dict(self) -> dict[str, Any]:
        """How inputs are prepared, as JSON, for a task file."""
        return self.prepare.to_dict()

    def _tags(self, words: Sequence[Any], labels: Sequence[Any] | None) -> dict[str, Tensor]:
        assert isinstance(self.prepare, TagBatch)
        if labels is None:
            return self.prepare.place_words(words)[0]
        for sentence, tags in zip(words, labels, strict=True):
            if len(sentence) != len(tags):
                raise DataError(
                    "a sentence has another number of labels than of words",
                    where=" ".join(map(str, sentence))[:60],
                    found=f"{len(sentence)} words, {len(tags)} labels",
                    fix="give each word one",
                )
        batch, table = self.prepare(list(zip(words, labels, strict=True)))
        return {**batch, LABELS: table}

    def _split(self, example: Any) -> tuple[Any, Any]:
        if isinstance(example, tuple | list) and len(example) == 2:
            return example[0], example[1]
        if not isinstance(example, Mapping) or self.column not in example:
            names = list(example) if isinstance(example, Mapping) else type(example).__name__
            raise DataError(
                "an example has no input",
                where=self.column,
                found=str(names)[:200],
                fix="let the data set yield (input, label), or name the column: "
                "model.collator(column=NAME)",
            )
        label = next((example[n] for n in OF_LABELS if example.get(n) is not None), None)
        return example[self.column], label


def _tensor(label: Any) -> Tensor:
    try:
        return torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            "a label is no number",
            found=repr(label)[:100],
            fix="give the number of the class, as it stands in task.labels, or numbers",
        ) from None

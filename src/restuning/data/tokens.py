"""Texts to batches of tokens, padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from restuning._errors import DataError
from restuning.data.data import LONGEST_TEXT

NO_LIMIT = 10**9
"""From here on a tokenizer's limit is none: transformers writes 1e30."""

IGNORED = -100
"""Label of tokens that have none: padding, special tokens, the later pieces of a word."""


class TextBatch:
    """Texts and labels to `(dict of tensors, labels)`, padded to the longest of the batch.

    On the right: with absolute positions (BERT, GPT-2) a pad on the left would move every token.

    Args:
        tokenizer: The backbone's.
        longest: Tokens of a text that are read. 256 is what nobody asked for, and read as no more than
            the backbone takes.
        table: Whether they were read as columns of a table (`data/tables.py`), whose splits are drawn row by row.

    Attributes:
        kind: Of the data set it collates.

    Raises:
        DataError: Less than one token is asked for, or more than the backbone takes.
    """

    kind = "text"

    def __init__(self, tokenizer: Any, longest: int = LONGEST_TEXT, *, table: bool = False) -> None:
        if longest < 1:
            raise DataError(
                "texts need a token", found=f"max_tokens={longest}", fix="give 1 or more"
            )
        most = _most_tokens(tokenizer)
        if longest != LONGEST_TEXT and most is not None and longest > most:
            raise DataError(
                "a backbone does not take texts as long as that",
                found=f"max_tokens={longest}, and it takes {most}",
                fix=f"give {most} or less",
            )
        self.tokenizer, self.longest, self.table = tokenizer, longest, table

    @property
    def limit(self) -> int:
        """Tokens of a text that are read, and no more than the backbone takes."""
        return min(self.longest, _most_tokens(self.tokenizer) or self.longest)

    def tokens(self, texts: Sequence[Any], **how: Any) -> Any:
        """The backbone's input, `b n` each."""
        batch = self.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
            **how,
        )
        if batch["input_ids"].shape[1] == 0:
            # A tokenizer without special tokens makes nothing of an empty text.
            batch = self.tokenizer(
                list(texts), padding="max_length", max_length=1, return_tensors="pt", **how
            )
            batch["input_ids"] = batch["input_ids"].long()
        mask = batch["attention_mask"] = batch["attention_mask"].long()
        # ... and attention to nothing has no answer: its first pad stands for it.
        mask[:, 0] = 1
        return batch

    def __call__(self, samples: Sequence[tuple[str, int]]) -> tuple[dict[str, Tensor], Tensor]:
        """A batch of `(text, label)`."""
        texts, labels = zip(*samples, strict=True)
        stacked = isinstance(labels[0], Tensor)
        return dict(self.tokens(texts)), torch.stack(labels) if stacked else torch.tensor(labels)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a task file and the key of a store."""
        table = {"table": True} if self.table else {}
        return {"kind": self.kind, "max_tokens": self.limit, **table}


class TagBatch(TextBatch):
    """Words and a label each to `(dict of tensors, labels b n)`; a word's first token bears it."""

    kind = "tags"

    def __call__(self, samples: Sequence[tuple[Any, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """A batch of `(words, labels)`."""
        words, labels = zip(*samples, strict=True)
        batch, places = self.place_words(words)
        table = torch.full(batch["input_ids"].shape, IGNORED)
        for row, tokens in enumerate(places):
            for word, token in tokens.items():
                table[row, token] = labels[row][word]
        return batch, table

    def place_words(
        self, sentences: Sequence[Sequence[str]]
    ) -> tuple[dict[str, Tensor], list[dict[int, int]]]:
        """The backbone's input, and for every sentence the first token of each word.

        Raises:
            DataError: The tokenizer cannot tell which token belongs to which word.
        """
        try:
            batch = self.tokens([list(s) for s in sentences], is_split_into_words=True)
            ids = [batch.word_ids(row) for row in range(len(sentences))]
        except (AssertionError, ValueError, AttributeError) as error:
            raise DataError(
                "a tokenizer cannot place words",
                where=type(self.tokenizer).__name__,
                found=str(error).splitlines()[0][:200],
                fix="use a fast tokenizer; RoBERTa's and GPT-2's need add_prefix_space=True",
            ) from None
        places: list[dict[int, int]] = []
        for words in ids:
            first: dict[int, int] = {}
            for token, word in enumerate(words):
                # Special tokens and padding belong to no word.
                if word is not None:
                    first.setdefault(word, token)
            places.append(first)
        return dict(batch), places


def make_text_batch(tokenizer: Any, values: Mapping[str, Any]) -> TextBatch:
    """What `to_dict` wrote; an older task file says nothing of texts."""
    kind = TagBatch if values.get("kind") == "tags" else TextBatch
    longest = int(values.get("max_tokens", LONGEST_TEXT))
    # Files from before positions were counted may hold more than the backbone takes.
    longest = min(longest, _most_tokens(tokenizer) or longest)
    return kind(tokenizer, longest, table=values.get("table") is True)


def _most_tokens(tokenizer: Any) -> int | None:
    # A tokenizer without a limit has None, or 1e30, there.
    most = getattr(tokenizer, "model_max_length", None)
    return most if most and most < NO_LIMIT else None

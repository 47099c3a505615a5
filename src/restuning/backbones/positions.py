"""How many tokens a language model takes at once."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_TABLES = re.compile(r"(embed_)?pos(ition)?s?_?(embed(ding)?s?)?|wpe")
"""Names of tables with a row for each position: BERT's, GPT-2's, OPT's, CLIP's."""

_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""Of configs, which say as much in words of their own."""


def count_positions(config: Any, model: nn.Module | None = None) -> int | None:
    """Most tokens of a text that a model takes; None where nothing bounds them.

    The fewest of what its config says and of the rows of its tables of positions that a token can
    reach: RoBERTa keeps those up to its padding token's number free, OPT the first two. Of relative
    and rotary positions it is the length that the model was trained at: beyond, it would answer,
    but to what it has never seen.

    Args:
        config: Of transformers.
        model: The network; None leaves it to the config.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    bounds = [n for name in _FIELDS if isinstance(n := getattr(text, name, None), int)]
    for path, table in () if model is None else model.named_modules():
        if isinstance(table, nn.Embedding) and _TABLES.fullmatch(path.rpartition(".")[2]):
            kept = table.padding_idx + 1 if table.padding_idx is not None else 0
            offset: Any = getattr(table, "offset", 0)
            bounds.append(table.num_embeddings - kept - int(offset))
    # Some configs say -1 or 0 where there is no bound.
    return min((n for n in bounds if n > 0), default=None)

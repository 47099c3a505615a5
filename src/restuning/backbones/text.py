"""Language backbones: tokenizer, example, and how their authors pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from restuning._files import read_json
from restuning.backbones.positions import count_positions
from restuning.backbones.trust import hub_arguments
from restuning.runtime.hub import is_offline

_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


def load_text_parts(hf: Any, name: str, model: Any = None) -> dict[str, Any]:
    """`kwargs`, `tokenizer` and `pool` of a `Backbone`.

    Args:
        hf: transformers.
        name: Of the model.
        model: The network, whose positions bound the tokenizer's texts; None where it is elsewhere
            (an engine), and its config is asked.
    """
    config = (
        hf.AutoConfig.from_pretrained(name, **hub_arguments()) if model is None else model.config
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(name, **hub_arguments())
    # GPT-2 has no padding token. Which one stands in does not matter: the mask leaves it out.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    positions = count_positions(config, model)
    if positions is not None:
        # A tokenizer without a limit has None, or 1e30, there.
        limit = tokenizer.model_max_length or positions
        tokenizer.model_max_length = min(limit, positions)
    example = dict(tokenizer("an example of a text", return_tensors="pt"))
    return {"kwargs": example, "tokenizer": tokenizer, "pool": _read_pool(hf, name)}


def _read_pool(hf: Any, name: str) -> str | None:
    """What a sentence-transformers folder says of its pooling."""
    # Most models have none; a hub that cannot be reached was noticed before.
    file = hf.utils.cached_file(
        name,
        "1_Pooling/config.json",
        local_files_only=is_offline(),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    said = read_json(Path(file), what="what a model says of its pooling", fix="fetch it again")
    modes = [pool for key, pool in _MODES.items() if said.get(key)]
    return modes[0] if len(modes) == 1 else said.get("pooling_mode")

"""Weights from files: safetensors, and npz for timm's ViTs; strictly, or an error that names keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from restuning._errors import BackboneError

_HEADS = ("head.", "head_dist.", "fc.", "classifier.", "heads.", "last_linear.")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a weights file strictly; a classifier head that the headless model lacks is left out.

    Raises:
        BackboneError: Not a safetensors or npz file, or its keys or shapes do not fit.
    """
    load_npz: Any = getattr(model, "load_pretrained", None)
    if path.suffix == ".npz" and load_npz is not None:
        try:
            _refuse_other_depth(model, path)
            load_npz(str(path))
        except (OSError, KeyError, ValueError, RuntimeError, BadZipFile, EOFError) as error:
            raise BackboneError(
                "weights do not fit",
                where=str(path),
                found=f"{type(error).__name__}: {error}",
                fix="check that they belong to this architecture",
            ) from None
        return
    if path.suffix != ".safetensors":
        raise BackboneError(
            "not a weights file we read",
            where=str(path),
            found=path.suffix or "no suffix",
            fix="convert it to safetensors (pickled checkpoints are not opened, for safety)",
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(
            "weights cannot be read", where=str(path), found=str(error), fix="fetch the file again"
        ) from None
    if hasattr(model, "config") and hasattr(type(model), "from_pretrained"):
        _load_transformers(model, tensors, path)
        return
    own = model.state_dict()
    tensors = {k: v for k, v in tensors.items() if k in own or not k.startswith(_HEADS)}
    _fit_positions(model, tensors)
    # Before `load_state_dict`, whose own error is a page of keys.
    _refuse_mismatch(own, tensors, path)
    model.load_state_dict(tensors, strict=True)


def _refuse_other_depth(model: nn.Module, path: Path) -> None:
    """Timm reads as many blocks as the model has, whatever the archive holds."""
    with np.load(path) as archive:
        stored = {m[0] for key in archive for m in re.findall(r"(encoderblock_(\d+))", key)}
    blocks = len(getattr(model, "blocks", ()))
    if stored and blocks and len(stored) != blocks:
        raise ValueError(f"{len(stored)} blocks in the file, {blocks} in the model")


def _load_transformers(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Transformers renames keys between a file and a model, so it loads its own files."""
    tensors = _take_encoder(model, tensors)
    try:
        kind: Any = type(model)
        made, report = kind.from_pretrained(
            None, config=model.config, state_dict=tensors, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise BackboneError(
            "weights do not fit",
            where=str(path),
            found=str(error)[:300],
            fix="check that they belong to this architecture",
        ) from None
    refuse_missing(report, str(path))
    for each in (model, made):
        take_out_poolers(each, report)
    model.load_state_dict(made.state_dict())


def _take_encoder(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a file of speech recognition (Whisper) the half that hears, where that is all there is of the model."""
    own = model.state_dict().keys()
    for prefix in ("encoder.", "model.encoder."):
        inner = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if own and own <= inner.keys():
            return inner
    return tensors


def refuse_missing(report: Any, where: str) -> None:
    """Refuse a transformers model that had to draw weights at random.

    Raises:
        BackboneError: Weights other than a pooler's (which classifiers do not bring) are missing,
            or have other shapes.
    """
    # A masked language model and a classifier have no pooler: it is taken out.
    missing = [k for k in report["missing_keys"] if "pooler." not in k]
    shapes = [str(k) for k in report.get("mismatched_keys", ())]
    if missing or shapes:
        raise BackboneError(
            "weights do not fit",
            where=where,
            found=f"{len(missing)} missing: {', '.join(sorted(missing)[:4])}; "
            f"{len(shapes)} of another shape: {', '.join(shapes[:2])}",
            fix="check that they belong to this architecture",
        )


def take_out_poolers(model: nn.Module, report: Any) -> None:
    """Take the poolers out of a transformers model whose weights the checkpoint does not bring.

    They would be drawn anew whenever it is loaded: features that are read from them, and what all
    weights are known by, would be others each time.
    """
    for key in report["missing_keys"]:
        owner, found, _ = str(key).rpartition("pooler.")
        if found:
            holder: Any = model.get_submodule(owner.rstrip("."))
            holder.pooler = None


def find_trained_size(model: nn.Module, path: Path) -> tuple[int, int] | None:
    """Height and width in pixels that a timm ViT's weights were trained at, told by their positions.

    Args:
        model: That they belong to, at whatever size.
        path: Of the weights, which `load_weights` has taken.

    Returns:
        None where nothing says it: no safetensors, no table with a row for each place of a grid.
    """
    own, embed = getattr(model, "pos_embed", None), getattr(model, "patch_embed", None)
    grid, patch = (getattr(embed, name, None) for name in ("grid_size", "patch_size"))
    if path.suffix != ".safetensors" or grid is None or patch is None:
        return None
    # Some have a module there, or a table of another form.
    if not isinstance(own, Tensor) or own.dim() != 3:
        return None
    if own.shape[1] - _positions_off_the_grid(model) != grid[0] * grid[1]:
        return None
    with safe_open(path, "pt") as file:
        # Of the header alone; `file` is no mapping.
        named = "pos_embed" in set(file.keys())
        stored = file.get_slice("pos_embed").get_shape() if named else []
    if len(stored) != 3:
        return None
    if stored[1] == own.shape[1]:
        return grid[0] * patch[0], grid[1] * patch[1]
    side = _side_of_square(model, stored[1])
    return None if side is None else (side * patch[0], side * patch[1])


def _positions_off_the_grid(model: nn.Module) -> int:
    """Class and register tokens have positions of their own, which are not on the grid."""
    tokens: Any = getattr(model, "num_prefix_tokens", 0)
    return 0 if getattr(model, "no_embed_class", False) else int(tokens)


def _side_of_square(model: nn.Module, positions: int) -> int | None:
    """Places along a side of the grid that a table of positions is of; None where it is no square."""
    places = positions - _positions_off_the_grid(model)
    side = round(places**0.5) if places > 0 else 0
    return side if side and side**2 == places else None


def _fit_positions(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Resample a timm ViT's position embedding where it runs at another image size."""
    own, stored = getattr(model, "pos_embed", None), tensors.get("pos_embed")
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if own is None or stored is None or grid is None or own.shape[1] == stored.shape[1]:
        return
    if stored.dim() == 3 and _side_of_square(model, stored.shape[1]) is not None:
        from timm.layers import resample_abs_pos_embed

        tensors["pos_embed"] = resample_abs_pos_embed(
            stored.float(),
            new_size=list(grid),
            num_prefix_tokens=_positions_off_the_grid(model),
        )


def _refuse_mismatch(own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    problems = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "of another shape": [
            f"{k} {tuple(given[k].shape)}, wanted {tuple(own[k].shape)}"
            for k in sorted(own.keys() & given.keys())
            if own[k].shape != given[k].shape
        ],
    }
    if any(problems.values()):
        raise BackboneError(
            "weights do not fit",
            where=str(path),
            found="; ".join(
                f"{len(keys)} {kind}: {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}"
                for kind, keys in problems.items()
                if keys
            ),
            fix="check that they belong to this architecture and carry its library's own keys",
        )

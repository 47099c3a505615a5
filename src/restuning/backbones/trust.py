"""What the name of a backbone may open, by who gave it: the user, or a file.

A file (a task, a grid, a file of options, an engine) may come from a stranger. What it names is opened
from this machine and in forms that execute nothing; `docs/security.md` has the table.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from restuning._errors import BackboneError, RestuningError
from restuning._files import read_bytes
from restuning.backbones.preprocessing import LARGEST_SIDE
from restuning.runtime.hub import is_offline, naming_file
from restuning.runtime.meta import without_contents

EXECUTES = {
    "pt2": "torch unpickles parts of a program, which runs what its author put there",
    "diffusers": "the index of a pipeline names packages and classes to import",
}
"""Schemes that a file may never choose, and why."""

ELSEWHERE = ("//", "\\\\")
"""How paths on other machines begin: opening one logs in there."""

LARGEST_CONFIG = 16 * 2**20
"""Bytes of a `config.json`; real ones have some ten thousand."""

SLACK = 2**24
"""Numbers that a model may have beyond those of its weights file: poolers and positions that no
checkpoint brings."""

DRAWN = 2**27
"""Numbers of a model whose weights a user has drawn at random, half a GiB: no file tells its size."""

DEEPEST = 1000
"""Layers of a model whose weights a user has drawn at random."""

_SIDES = ("image_size", "height", "width", "shortest_edge", "longest_edge", "size", "crop_size")
"""Of configs: sides of images in pixels."""

_LAYERS = re.compile(r"layers?$|depths?$|(num|n)_blocks$")
"""Of a config: how often it is built; `num_hidden_layers`, `n_layer`, `depths`."""

_opening: ContextVar[str] = ContextVar("opening", default="")

_CODE_KEYS = ("attn_implementation", "experts_implementation")
"""Of a config: with a repository's name as their value, transformers fetches and runs its kernels."""

_POINTING_KEYS = ("quantization_config", "use_pretrained_backbone", "base_model_name_or_path")
"""Of a config: these bring packages, weights or kernels that lie elsewhere."""


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Inside, this backbone is opened: errors say how a user would name it.

    Raises:
        BackboneError: A file names it, and it is of a kind that cannot be opened without trust, or
            lies on another machine.
    """
    token = _opening.set(name)
    try:
        scheme, _, rest = name.partition(":")
        if naming_file() and scheme in EXECUTES:
            raise _not_for_a_file(
                "a file names a backbone that is not opened for it", EXECUTES[scheme]
            )
        if naming_file() and rest.removeprefix("local-dir:").startswith(ELSEWHERE):
            raise _not_for_a_file(
                "a file names a backbone on another machine, which is not opened for it",
                "a network path",
            )
        yield
    finally:
        _opening.reset(token)


def refuse_unsafe(found: str) -> None:
    """Refuse weights or code where a file names them, and say how the user may ask for them.

    Args:
        found: What is there instead of what is opened for a file.

    Raises:
        BackboneError: A file gave the name. Where the user did, nothing happens.
    """
    if naming_file():
        raise _not_for_a_file(
            "a file names a backbone that is not here in a form that is opened for it", found
        )


def _not_for_a_file(what: str, found: str) -> BackboneError:
    name = _opening.get()
    return BackboneError(
        what,
        where=naming_file(),
        found=f"{name}: {found}",
        fix=f"if you trust it, name it yourself: --backbone {shlex.quote(name)} (backbone={name!r})",
    )


def hub_arguments() -> dict[str, Any]:
    """Arguments of every `from_pretrained`: no code of a repository, and the cache alone if offline."""
    return {"trust_remote_code": False, "local_files_only": is_offline()}


def weights_arguments() -> dict[str, Any]:
    """Arguments of a `from_pretrained` that reads weights: of a file's choice, safetensors alone."""
    return {**hub_arguments(), **({"use_safetensors": True} if naming_file() else {})}


@contextmanager
def explain_hub_errors(name: str) -> Iterator[None]:
    """Turns whatever a model library or a hub client raises into one error that says what to do."""
    try:
        yield
    except RestuningError:
        raise
    except Exception as error:  # noqa: BLE001 (libraries raise anything over a malformed config)
        words = f"{type(error).__name__}: {_first_line(error)}"
        refuse_unsafe(words)
        alone = is_offline() and not Path(name.removeprefix("local-dir:")).is_dir()
        raise BackboneError(
            "a backbone could not be loaded",
            where=name,
            found=words + ("; the hub does not answer, so only its cache was read" * alone),
            fix="without a hub give --weights FILE (safetensors), a local folder, or --random",
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no more is known"])[0][:200]


def check_config(hf: Any, name: str, fetch: bool, weights: Path | None) -> list[Path]:
    """Read the `config.json` of a folder or repository before transformers does.

    Args:
        hf: transformers.
        name: Folder or repository.
        fetch: Whether its own weights are wanted.
        weights: A file of others.

    Returns:
        The safetensors that its weights are in, where a file gave the name.

    Raises:
        BackboneError: It is malformed, of an architecture that transformers does not have (code
            that lies with a model is never run), or names kernels to fetch and run. Of a file's
            choice also where it, or an adapter beside it, points to what lies elsewhere, or its
            weights are no safetensors or too few for its layers.
    """
    file = hf.utils.cached_file(
        name,
        "config.json",
        local_files_only=is_offline(),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    # Without one there may be an adapter of PEFT; transformers says what else is missing.
    config = {} if file is None else read_config(Path(file), name)
    _refuse_code(hf, name, config)
    if not naming_file():
        return []
    if file is None:
        refuse_unsafe("no config.json is there, or none was fetched before")
        return []
    for key, value in walk(config):
        if key in _POINTING_KEYS and value:
            refuse_unsafe(f"its config has {key}: {str(value)[:100]}")
    folder = Path(file).parent
    for said in (config, *_read_processors(folder, name)):
        for key, value in walk(said):
            if key in _SIDES and isinstance(value, int) and value > LARGEST_SIDE:
                refuse_unsafe(f"images of {key} {value}")
    if (folder / "adapter_config.json").exists():
        refuse_unsafe("an adapter_config.json, which names a model elsewhere")
    files = [weights] if weights else _safe_weights(folder, name) if fetch else []
    if fetch and not files:
        refuse_unsafe("no weights in safetensors beside its config (pickles are not opened)")
    _refuse_deeper(config, files)
    return files


def _read_processors(folder: Path, name: str) -> list[dict[str, Any]]:
    files = [folder / f"{kind}_config.json" for kind in ("preprocessor", "processor")]
    return [read_config(file, name) for file in files if file.exists()]


def _refuse_code(hf: Any, name: str, config: Mapping[str, Any]) -> None:
    for key, value in walk(config):
        named = [v for _, v in walk({"": value}) if isinstance(v, str)]
        if key.lstrip("_").removesuffix("_internal") in _CODE_KEYS and "/" in "".join(named):
            raise BackboneError(
                "a config names code to fetch and run, which is not done",
                where=f"hf:{name}",
                found=f"{key}: {str(value)[:100]}",
                fix="take it out of config.json",
            )
    brought = config.get("auto_map")
    if brought and config.get("model_type") not in hf.CONFIG_MAPPING:
        raise BackboneError(
            "a model brings code of its own, which is not run",
            where=f"hf:{name}",
            found=f"auto_map: {brought}"[:200],
            fix="load it in a program of yours, and give the model to restuning.Host "
            "(docs/own_backbone.md)",
        )


def read_config(file: Path, name: str) -> dict[str, Any]:
    """A config of a model, which may be anything.

    Raises:
        BackboneError: It is no object of JSON, or far too long.
    """
    try:
        # Not `parse_json`: configs of transformers may hold Infinity.
        config = json.loads(read_bytes(file, LARGEST_CONFIG))
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BackboneError(
            "a config.json is malformed",
            where=str(file),
            found=f"{type(error).__name__}: {_first_line(error)}",
            fix="restore it from where the model came from",
        ) from None
    return config


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of nested objects."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def _safe_weights(folder: Path, name: str) -> list[Path]:
    """The files of weights of a folder as transformers writes them, none where one is no safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [file for file in [folder / "model.safetensors"] if file.exists()]
    shards = read_config(index, name).get("weight_map")
    names = list(shards.values()) if isinstance(shards, Mapping) else []
    # A name alone: a shard with folders before it may lie anywhere.
    safe = all(
        isinstance(n, str) and Path(n).name == n and n.endswith(".safetensors") for n in names
    )
    return [folder / n for n in sorted(set(names))] if safe else []


def refuse_larger(build: Callable[[], nn.Module], files: Sequence[Path]) -> None:
    """Refuse a model that a file describes, where its weights are not there: nothing is allocated.

    Args:
        build: Makes the model, which is done without contents here.
        files: Its weights; none where they would be drawn at random.

    Raises:
        BackboneError: A file gave the name, and the model has other sizes than its weights.
    """
    if not naming_file():
        return
    there = sum(map(count_numbers, files)) if files else DRAWN
    try:
        with without_contents():
            model = build()
    except Exception as error:  # noqa: BLE001 (libraries raise anything over odd sizes)
        refuse_unsafe(f"a model that cannot be built: {type(error).__name__}: {_first_line(error)}")
        return
    wanted = sum(p.numel() for p in model.parameters())
    # Masks of old architectures, the square of their positions, are in no file.
    masks = sum(b.numel() for b in model.buffers())
    if max(wanted, masks // 16) > 2 * there + SLACK:
        refuse_unsafe(f"a model of {wanted + masks:,} numbers, whose weights are {there:,}")


def _refuse_deeper(config: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Building a model of a million layers would not end."""
    tensors = sum(len(_read_shapes(file)) for file in files) if files else DEEPEST
    for key, value in walk(config):
        if _LAYERS.search(key):
            counts = value if isinstance(value, list) else [value]
            layers = sum(n for n in counts if isinstance(n, int))
            if layers > tensors:
                refuse_unsafe(f"its config has {key}: {layers}, its weights {tensors} tensors")


def count_numbers(file: Path) -> int:
    """How many numbers a safetensors file says it has, whose header is all that is read."""
    return sum(map(math.prod, _read_shapes(file)))


def _read_shapes(file: Path) -> list[list[int]]:
    try:
        with safe_open(file, framework="pt") as opened:
            # `safe_open` has keys() but cannot be iterated.
            names = list(opened.keys())
            return [opened.get_slice(name).get_shape() for name in names]
    except (OSError, SafetensorError):
        return []

"""LoRA checkpoints of PEFT, read as tasks and written from tasks: two files, of which nothing is executed.

`adapter_config.json` says rank, alpha and scale, `adapter_model.safetensors` holds `lora_A` and `lora_B`
by the path of the map. PEFT itself is not asked.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from restuning._errors import FormatError, UnknownNameError, WrongTaskError
from restuning._files import expand_home, fits, read_json, refuse_special, replacing, write_text
from restuning.host import Extractor, Host, cannot_tune_inside
from restuning.sites import LinearSite
from restuning.task.lora import lora_beside
from restuning.task.task import Task
from restuning.tuners import ConvLora, Lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CARD = "README.md"
BASE = "base_model.model."
"""What PEFT puts before the path of a module."""

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"

STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the backbone's own weights as they were; PiSSA, OLoRA, LoftQ, CorDA and
LoRA-GA write to them, so that their adapters belong to weights that no backbone of ours has."""

NOT_COMPUTED_WITH = frozenset(
    (
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    )
)
"""Entries that say where an adapter began and where it stands, which its tensors tell as well."""

COMPUTED_WITH = frozenset(
    ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout")
)
"""Entries that are read. Any other must say nothing: what it asks for is not known here."""

HALVES = frozenset(
    ("encoder", "decoder", "text_model", "vision_model", "question_encoder", "ctx_encoder")
)
"""Names of parts of a model that another part of it may look like, path by path."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def import_peft(
    folder: str | Path,
    host: Extractor,
    *,
    prefix: str | None = None,
    leave_out: Sequence[str] = (),
    tell_prefix: Callable[[str], None] = lambda _: None,
) -> Task:
    """Read a LoRA checkpoint of PEFT as a task without a head, equal in what it computes.

    Weights in half precision are widened, as they are for training.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        host: On the backbone that the adapter was trained on, or on the model inside of it: PEFT's paths
            may begin with more names (`bert.`), which are found.
        prefix: Those names, where they are not to be found: "bert". They must be given where they name one
            part of a model that may have another like it (`encoder`, `text_model`).
        leave_out: Modules that were trained whole (`modules_to_save`, such as `classifier`) and are to be
            left behind; else they are refused.
        tell_prefix: Receives those names as they were found or given; "" for none.

    Raises:
        FormatError: It cannot be read, is no LoRA, or asks for more than LoRA (DoRA, biases, tokens,
            embeddings, whole modules).
        UnknownNameError: It stands at a place that is no linear site of this backbone, or it may be of
            another part of the model.
        EngineError: The backbone is an engine, which cannot be tuned inside.
    """
    if not isinstance(host, Host):
        raise cannot_tune_inside("lora")
    folder = expand_home(folder)
    config = _read_config(folder, leave_out)
    tensors = _read_tensors(folder)
    pairs, others = _pair(tensors, folder)
    _refuse_others(others, leave_out, folder)
    sites = {s.module: s for s in host.sites.linear.values() if not s.part}
    prefix = _find_prefix(list(pairs), sites, folder) if prefix is None else prefix
    tell_prefix(prefix)
    before = f"{prefix}." if prefix else ""
    tuners = {}
    for path, (a, b) in pairs.items():
        site = sites.get(path.removeprefix(before)) if path.startswith(before) else None
        if site is None:
            raise _no_site([path], prefix, sites, folder)
        tuners[site.name] = _make_tuner(site, path, a, b, config, folder)
    # In the order of the forward, whatever the order of the file.
    return Task(tuners={n: tuners[n] for n in host.sites.linear if n in tuners}, method="lora")


def export_peft(
    task: Task,
    host: Extractor,
    folder: str | Path,
    *,
    prefix: str = "",
    without_head: bool = False,
    base_model: str | None = None,
    dtype: str = "fp32",
) -> Path:
    """Write a task of LoRA as a checkpoint of PEFT; `import_peft` reads the same tensors again.

    Args:
        task: Of LoRA at whole linear maps and convolutions alone.
        host: The host it belongs to.
        folder: Gets `adapter_config.json` and `adapter_model.safetensors`, and a `README.md` with the marks
            by which hubs know an adapter where it has none; one that is there is left as it is.
        prefix: Names before the paths of this backbone in the model that PEFT will load it into: "bert"
            for a `BertModel` inside a `BertForSequenceClassification`.
        without_head: Leave the task's head behind; PEFT has no place for it.
        base_model: Name of that model, for `adapter_config.json`.
        dtype: Of the tensors: "fp32", "bf16" or "fp16".

    Raises:
        WrongTaskError: The task has more than LoRA, or LoRA that PEFT has no form for.
        FormatError: The files cannot be written.
        UnknownNameError: No such precision, or the prefix is no path of names.
        EngineError: The backbone is an engine.
    """
    if not isinstance(host, Host):
        raise cannot_tune_inside("lora")
    if dtype not in PRECISIONS:
        raise UnknownNameError(
            "no such precision", where=dtype, fix=f"one of {', '.join(PRECISIONS)}"
        )
    if prefix and not re.fullmatch(r"\w+(\.\w+)*", prefix):
        raise UnknownNameError(
            "no path of names of modules",
            where=f"prefix {prefix!r}"[:200],
            fix="give names with a dot between: bert, or base.encoder",
        )
    folder = expand_home(folder)
    loras = _refuse_more_than_lora(task, host, without_head)
    before = f"{prefix}." if prefix else ""
    paths = {name: f"{before}{host.sites.linear[name].module}" for name in loras}
    tensors = {}
    for name, lora in loras.items():
        for leaf, tensor in ((LORA_A, lora.a.weight), (LORA_B, lora.b.weight)):
            assert isinstance(tensor, Tensor)
            own = tensor.detach().cpu().to(PRECISIONS[dtype]).contiguous()
            tensors[f"{BASE}{paths[name]}{leaf}"] = own
    config = _write_config(loras, paths, host, base_model, before)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / TENSORS, apart=True) as aside:
            save_file(tensors, aside, metadata={"format": "pt"})
        write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        if not (folder / CARD).exists():
            write_text(folder / CARD, _write_card(loras, base_model))
    except (OSError, SafetensorError) as error:
        raise FormatError(
            "an adapter cannot be written",
            where=str(folder),
            found=f"{type(error).__name__}: {error}"[:200],
            fix="give a folder that can be written",
        ) from None
    return folder


# ------------------------------------------------------------------ reading


@dataclass(frozen=True)
class _Config:
    ranks: frozenset[int]
    alpha: float
    alphas: Mapping[str, float]
    rslora: bool
    dropout: float

    def alpha_of(self, path: str) -> float:
        """PEFT's own rule: the first pattern that the end of a path matches, a dot in it any character."""
        for pattern, alpha in self.alphas.items():
            plain = pattern.removeprefix("^")
            before, end = path[: -len(plain)], path[-len(plain) :]
            if before and (pattern != plain or not before.endswith(".")):
                continue
            if len(end) == len(plain) and all(
                p in (".", c) for p, c in zip(plain, end, strict=True)
            ):
                return alpha
        return self.alpha


def _read_config(folder: Path, leave_out: Sequence[str]) -> _Config:
    where = str(folder / CONFIG)
    found = read_json(folder / CONFIG, what="an adapter's configuration", fix=_RESTORE)
    if found.get("peft_type") != "LORA":
        raise FormatError(
            "not a LoRA adapter",
            where=where,
            found=f"peft_type {found.get('peft_type')!r}"[:200],
            fix="only LoRA maps one to one; PEFT's prefixes and prompts also move the positions of all tokens, "
            "and its other adapters have forms that no tuner here has",
        )
    unknown = {
        name: value
        for name, value in found.items()
        if name not in NOT_COMPUTED_WITH | COMPUTED_WITH and not _says_nothing(value)
    }
    whole = unknown.get("modules_to_save")
    if fits(whole, list[str]) and set(whole or ()) <= set(leave_out):
        del unknown["modules_to_save"]
    if unknown:
        told = ", ".join(f"{name}={value!r}"[:60] for name, value in list(unknown.items())[:4])
        raise FormatError(
            "an adapter asks for more than LoRA",
            where=where,
            found=told,
            fix="leave modules that were trained whole behind by name (leave_out, --leave-out); the rest has no "
            "form here: merge it with PEFT into the backbone's weights",
        )
    begun = found.get("init_lora_weights", True)
    if not isinstance(begun, bool | str) or begun not in STARTS:
        raise FormatError(
            "an adapter belongs to weights that were changed when it began",
            where=where,
            found=f"init_lora_weights={begun!r}"[:200],
            fix="save it with PEFT's path_initial_model_for_weight_conversion, which makes a LoRA of it",
        )
    for name, hint in _HINTS.items():
        if name in found and not fits(found[name], hint):
            raise _malformed(where, f"{name}={found[name]!r}")
    ranks = [found.get("r", 8), *(found.get("rank_pattern") or {}).values()]
    if wrong := [value for value in ranks if not fits(value, int)]:
        raise _malformed(where, f"a rank is {wrong[0]!r}")
    alphas = dict(found.get("alpha_pattern") or {})
    if wrong := [value for value in alphas.values() if not fits(value, float)]:
        raise _malformed(where, f"an alpha is {wrong[0]!r}")
    odd = [p for p in alphas if not re.fullmatch(r"\^?[\w.]+", p)]
    if odd:
        raise FormatError(
            "alphas of an adapter are told by expressions, which are not evaluated",
            where=where,
            found=repr(odd[0])[:200],
            fix="write whole paths of modules in alpha_pattern",
        )
    dropout = float(found.get("lora_dropout", 0.0))
    numbers = [float(found.get("lora_alpha", 8)), *map(float, alphas.values())]
    if not all(0 < n < float("inf") for n in numbers) or not 0 <= dropout < 1:
        raise _malformed(where, f"alphas {numbers[:4]}, lora_dropout {dropout}")
    return _Config(
        frozenset(ranks),
        numbers[0],
        dict(zip(alphas, numbers[1:], strict=True)),
        bool(found.get("use_rslora")),
        dropout,
    )


_HINTS: dict[str, Any] = {
    "r": int,
    "rank_pattern": Mapping[str, int] | None,
    "lora_alpha": float,
    "alpha_pattern": Mapping[str, float] | None,
    "use_rslora": bool,
    "lora_dropout": float,
}
_RESTORE = "restore it from where it was saved"


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("none", "", [], {})


def _malformed(where: str, found: str) -> FormatError:
    return FormatError("an adapter is malformed", where=where, found=found[:200], fix=_RESTORE)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / TENSORS
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise FormatError(
            "an adapter is stored in a form that can execute",
            where=str(folder / "adapter_model.bin"),
            found="a pickle",
            fix="load it with PEFT where you trust it, and save_pretrained(..., safe_serialization=True)",
        )
    try:
        refuse_special(file)
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _malformed(str(file), f"{type(error).__name__}: {error}") from None


def _pair(
    tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """A and B by the path of their map, and names of all other tensors."""
    halves: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in tensors.items():
        leaf = next((each for each in (LORA_A, LORA_B) if name.endswith(each)), None)
        if leaf is None or not name.startswith(BASE):
            others.append(name)
            continue
        halves.setdefault(name.removeprefix(BASE).removesuffix(leaf), {})[leaf] = tensor
    single = [path for path, both in halves.items() if len(both) < 2]
    if single or not halves:
        found = f"half of {single[0]}" if single else f"{len(others)} other tensors"
        raise _malformed(str(folder / TENSORS), found)
    return {path: (both[LORA_A], both[LORA_B]) for path, both in halves.items()}, others


def _refuse_others(others: Sequence[str], leave_out: Sequence[str], folder: Path) -> None:
    for name in others:
        parts = name.removeprefix(BASE).split(".")
        # Of a module that was saved whole; a part of LoRA cannot be left behind.
        if "lora_" not in name and any(left in parts for left in leave_out):
            continue
        raise FormatError(
            "an adapter holds more than LoRA",
            where=str(folder / TENSORS),
            found=f"{len(others)} more tensors, among them {name}"[:200],
            fix=f"leave a module that was trained whole behind with leave_out (--leave-out {parts[-2] if len(parts) > 1 else name}); "
            "embeddings and DoRA's magnitudes have no place here",
        )


def _find_prefix(paths: Sequence[str], sites: Mapping[str, LinearSite], folder: Path) -> str:
    """The names before the paths of this backbone, the same for all."""
    first = paths[0]
    tried = [first.removesuffix(m).rstrip(".") for m in sites if f".{first}".endswith(f".{m}")]
    fit = [p for p in tried if all(path.removeprefix(f"{p}.") in sites for path in paths)]
    if not fit:
        inside = [p for p in paths if not any(f".{p}".endswith(f".{m}") for m in sites)]
        raise _no_site(inside or list(paths), "", sites, folder)
    # The fewest names: a shorter path of a site is more likely another's.
    found = min(fit, key=len)
    if halves := HALVES & {*found.split(".")}:
        raise UnknownNameError(
            "an adapter may be of another part of a model than this backbone",
            where=str(folder),
            found=f"its paths go on as this backbone's after {found!r}; where a model has two parts of one "
            f"form, {min(halves)} is one of them"[:300],
            fix=f"if this backbone is that part, say so: prefix={found!r} (--prefix {found})",
        )
    return found


def _no_site(
    paths: Sequence[str], prefix: str, sites: Mapping[str, LinearSite], folder: Path
) -> UnknownNameError:
    names = ", ".join(list(sites)[:2]) or "none"
    return UnknownNameError(
        "an adapter stands where this backbone has no linear site",
        where=str(folder),
        found=f"{len(paths)} places, such as {paths[0]}"[:200]
        + (f" (prefix {prefix!r})" if prefix else "")
        + f"; linear sites here are {names}, ...",
        fix="open the backbone it was trained on; maps outside of blocks and inside nn.MultiheadAttention "
        "are no linear sites (`restuning sites NAME --linear` lists them)",
    )


def _make_tuner(
    site: LinearSite, path: str, a: Tensor, b: Tensor, config: _Config, folder: Path
) -> Lora | ConvLora:
    rank = a.shape[0] if a.dim() else 0
    ones = (1,) * len(site.kernel)
    wanted = (rank, site.dim_in, *site.kernel), (site.dim, rank // site.groups, *ones)
    if (tuple(a.shape), tuple(b.shape)) != wanted or not rank or rank % site.groups:
        raise _malformed(
            str(folder / TENSORS),
            f"{path}: {tuple(a.shape)} and {tuple(b.shape)} beside a map from {site.dim_in} to {site.dim}",
        )
    # The scale hangs on it: PEFT takes such files for another adapter's and does not load them.
    if rank not in config.ranks:
        said = ", ".join(map(str, sorted(config.ranks)))
        raise _malformed(str(folder / CONFIG), f"rank {said}, where {path} has {rank}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise _malformed(str(folder / TENSORS), f"{path}: {a.dtype}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise _malformed(str(folder / TENSORS), f"{path}: numbers that are NaN or infinite")
    tuner = lora_beside(
        site,
        rank=rank,
        alpha=config.alpha_of(path),
        rslora=config.rslora,
        dropout=config.dropout,
    )
    tuner.load_state_dict({"a.weight": a.float(), "b.weight": b.float()})
    return tuner


# ------------------------------------------------------------------ writing


def _refuse_more_than_lora(
    task: Task, host: Host, without_head: bool
) -> dict[str, Lora | ConvLora]:
    """The task's tuners, if PEFT has a form for all that it is."""
    loras: dict[str, Lora | ConvLora] = {}
    more = []
    for name, tuner in task.inline_tuners.items():
        site = host.sites.linear.get(name)
        if not isinstance(tuner, Lora | ConvLora):
            more.append(f"{tuner.kind} at {name}")
        elif site is None:
            more.append(f"lora beside an operation ({name})")
        elif site.part:
            more.append(f"lora at a part of a fused map ({name})")
        else:
            loras[name] = tuner
    _refuse_wrapped([host.sites.linear[name].module for name in loras])
    more += ["a side network"] if task.side is not None else []
    more += [f"trained copies of {len(task.weights)} weights"] if len(task.weights) else []
    if task.head is not None and not without_head:
        more.append("a head")
    settings = {(lora.rslora, lora.dropout) for lora in loras.values()}
    if len(settings) > 1:
        more.append("several scales (rslora) or dropouts, of which PEFT has one")
    if more or not loras:
        raise WrongTaskError(
            "a task is no LoRA of PEFT",
            where=task.method,
            found=", ".join(more[:4]) or "no LoRA at all",
            fix="leave a head behind with without_head (--without-head); the rest PEFT has no form for",
        )
    return loras


def _refuse_wrapped(paths: Sequence[str]) -> None:
    """PEFT gives the maps of a model that it wraps other paths than those of the model alone."""
    inside = [path for path in paths if "base_layer" in path.split(".")]
    if inside:
        raise WrongTaskError(
            "a task stands on a backbone that PEFT wraps already, and no other model has its paths",
            where=inside[0],
            found=f"{len(inside)} maps inside of an adapter",
            fix="take that adapter into the weights first (merge_and_unload), and train the task on the result",
        )


def _write_config(
    loras: Mapping[str, Lora | ConvLora],
    paths: Mapping[str, str],
    host: Host,
    base_model: str | None,
    before: str,
) -> dict[str, Any]:
    ranks = {paths[name]: lora.rank for name, lora in loras.items()}
    alphas = {paths[name]: _number(lora.alpha) for name, lora in loras.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    first = next(iter(loras.values()))
    targets = sorted(paths.values())
    modules = [f"{before}{path}" for path, _ in host.model.named_modules()]
    # PEFT takes all modules whose path ends so; where that would be too many, an expression of all.
    ends = tuple(f".{t}" for t in targets)
    exact = not any(m.endswith(ends) for m in modules if m not in paths.values())
    turned = {type(host.model.get_submodule(host.sites.linear[n].module)).__name__ for n in loras}
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{p}": r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{p}": a for p, a in alphas.items() if a != alpha},
        "use_rslora": first.rslora,
        "lora_dropout": first.dropout,
        "target_modules": targets if exact else "|".join(map(re.escape, targets)),
        "bias": "none",
        "fan_in_fan_out": turned == {"Conv1D"},
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_dora": False,
    }


def _write_card(loras: Mapping[str, Lora | ConvLora], base_model: str | None) -> str:
    # Hubs refuse other names, such as a path on this machine.
    known = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base_model or "")
    count = sum(p.numel() for lora in loras.values() for p in lora.parameters())
    return f"""---
library_name: peft
tags: [lora]
{f"base_model: {json.dumps(base_model)}{chr(10)}" if known else ""}---
# LoRA

{count:,} parameters beside {len(loras)} linear maps, trained with restuning. PEFT loads it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""


def _number(value: float) -> float | int:
    """As whole a number as it is: PEFT writes 8 and not 8.0."""
    return int(value) if value == int(value) else value

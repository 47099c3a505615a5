"""A task as a folder: `task.json`, `weights.safetensors`, `README.md`. No pickle, ever."""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from restuning._errors import (
    MALFORMED,
    BackboneError,
    DivergedError,
    FormatError,
    warn,
)
from restuning._files import (
    Claim,
    digest_file,
    expand_home,
    read_json,
    seal,
    try_writing,
)
from restuning._version import __version__
from restuning.host import Extractor
from restuning.task.card import write_card
from restuning.task.folder import (
    CARD,
    DESCRIPTION,
    SHA256,
    WEIGHTS,
    find_weights,
    refuse_leaving,
    write_folder,
)
from restuning.task.hub import HubTask, fetch, find_origin, is_cached
from restuning.task.same_backbone import Identified, refuse_other_backbone
from restuning.task.task import Task, check_temperature, refuse_other_sizes

FORMAT = 2
"""Raised when an older library could not read what a newer one writes. Format 1 is read as well."""

FILES = (DESCRIPTION, WEIGHTS, CARD)
"""What a task folder holds, and all that is fetched from a hub."""


def save(
    task: Task,
    host: Extractor,
    path: str | Path,
    *,
    backbone: str = "",
    weights: str | Path | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    data: str = "",
) -> Path:
    """Write a task folder, whole or not at all; other files that lie in it stay.

    At every moment, also if the process is killed, either the task that was there is whole or this
    one. Tensors that several modules share are written once and are shared again after `load`. Of
    several processes (`torch.distributed`) the first one writes, and the others return at once.

    Args:
        task: What to save.
        host: The host it belongs to; its fingerprint, the digest of all its weights and buffers and
            its answers to a fixed input are stored. Where its weights are sharded, all processes must
            call this.
        path: The folder, by habit `NAME.task`.
        backbone: Name that `load_backbone` understands, for whoever loads it.
        weights: The file the backbone's weights were loaded from (`Backbone.weights_file`), where
            that is not the library's own; its path and sha256 are stored, so that `Predictor` asks
            for neither.
        preprocessing: How images become inputs.
        results: Figures for the model card, by name; a share whose name ends in "accuracy" is
            written as percent, and None is left out.
        data: What it was trained on, for the model card: `hf:NAME`, or a word such as the name of a folder.

    Raises:
        FormatError: The folder cannot be written (what was there is whole), the labels are not as
            many as the head's answers, or weights are of a type that a task does not keep.
        DivergedError: Weights are NaN or infinite.
        BackboneChangedError: The backbone is not what it was when the host was built.
        BackboneError: The file of weights is not there.

    Cost: reads the backbone's weights and their file once a host, about 1 s a gigabyte each.
    """
    path = Path(path)
    # Of a backbone in several processes all work out what it is; one writes.
    description = _describe(task, host, backbone, weights, preprocessing or {})
    if not _is_first():
        return path
    tensors = _tensors_of(task, description.get("shared", {}))
    card = write_card(path.name, task, backbone, preprocessing or {}, results or {}, data)

    def describe_with(sha256: str) -> str:
        return json.dumps(seal({**description, SHA256: {WEIGHTS: sha256}}), indent=1) + "\n"

    try:
        _refuse_file_in_place(path)
        write_folder(path, tensors, describe_with, card)
    except (OSError, SafetensorError) as error:
        raise _cannot_save(path, error) from None
    return path


def check_savable(
    task: Task,
    host: Extractor,
    path: str | Path,
    *,
    backbone: str = "",
    weights: str | Path | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Fail now where `save` would: before a training whose result it could not write.

    Args:
        task: What will be saved; its weights are not looked at.
        host: As for `save`, like all that follows.
        path: The folder. Another of its name is made beside it for a moment, and removed.
        backbone: Name of the backbone.
        weights: The file of its weights.
        preprocessing: How images become inputs.

    Raises:
        RestuningError: As `save`.
    """
    path = Path(path)
    _describe(task, host, backbone, weights, preprocessing or {}, identify=False)
    if not _is_first():
        return
    try:
        _refuse_file_in_place(path)
        for file in [path / name for name in FILES] if path.is_dir() else [path]:
            try_writing(file)
    except OSError as error:
        raise _cannot_save(path, error) from None


def _refuse_file_in_place(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file of this name is there")


def _is_first() -> bool:
    """Whether this process writes: of several that work together (`torch.distributed`), the first.

    What a launcher put into the environment is not asked: processes that never joined save each its own.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


def _cannot_save(path: Path, error: Exception) -> FormatError:
    return FormatError(
        "a task could not be saved",
        where=str(path),
        found=getattr(error, "strerror", None) or str(error),
        fix="free space or choose another folder; what was there before is still whole",
    )


def _describe(
    task: Task,
    host: Extractor,
    backbone: str,
    weights: str | Path | None,
    preprocessing: Mapping[str, Any],
    *,
    identify: bool = True,
) -> dict[str, Any]:
    """All of `task.json` but the digests of the files beside it."""
    described: dict[str, Any] = {"name": backbone, "fingerprint": host.fingerprint()}
    if identify:
        described |= host.identity()
    if weights is not None:
        # Only where there is a file: without one, task.json is what it always was.
        described["weights"] = WeightsFile.of(weights).to_dict()
    check_labels(task)
    description = {
        "format": FORMAT,
        "library": f"restuning {__version__}",
        "task": task.spec(),
        "backbone": described,
        "preprocessing": dict(preprocessing),
    }
    if shared := find_shared(task):
        description["shared"] = shared
    try:
        # Without `default`: a number that became a text would be another preprocessing.
        json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(
            "a task cannot be described in JSON",
            found=str(error)[:200],
            fix="give preprocessing, labels and names as plain texts, numbers, lists and dictionaries",
        ) from None
    return description


def _tensors_of(task: Task, shared: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights, each once: safetensors refuses tensors that share memory."""
    tensors = {n: t.detach() for n, t in task.state_dict().items() if n not in shared}
    if wrong := _wrong_numbers(tensors):
        raise DivergedError(
            "a task with such weights is not saved",
            found=wrong,
            fix="training diverged: lower lr, set clip=1.0, or look for NaN in the data; nothing was "
            "written",
        )
    if wrong := _wrong_dtypes(tensors):
        raise FormatError(
            "a task with such weights is not saved",
            found=wrong,
            fix="task.float() makes them float32; nothing was written",
        )
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _wrong_numbers(tensors: Mapping[str, Tensor]) -> str:
    """Which weights are no finite numbers, in words; "" for none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            return f"{count:,} of {tensor.numel():,} numbers of {name} are NaN or infinite"
    return ""


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Types that a task keeps exactly: half precision becomes float32 without loss, float64 would not."""


def _wrong_dtypes(tensors: Mapping[str, Tensor], built: Mapping[str, Tensor] | None = None) -> str:
    """Which weights are of a type that a task does not keep, in words; "" for none.

    Args:
        tensors: The weights.
        built: Those of the task that they are for; None where they are its own.
    """
    for name, tensor in tensors.items():
        wanted = tensor if built is None else built.get(name, tensor)
        number = wanted.is_floating_point() or wanted.is_complex()
        if tensor.dtype not in (_FLOATS if number else (wanted.dtype,)):
            return f"{name} is {tensor.dtype}"
    return ""


@dataclass(frozen=True)
class WeightsFile:
    """A file of backbone weights as a task remembers it.

    Attributes:
        path: Where it was; after a push to a hub its bare name.
        sha256: Of its bytes, in hexadecimal digits.
    """

    path: str
    sha256: str

    @classmethod
    def of(cls, file: str | Path) -> WeightsFile:
        """A file that is here.

        Raises:
            BackboneError: It is not.
        """
        file = Path(file)
        return cls(str(file.resolve()), _digest_file(file))

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> WeightsFile | None:
        """What `task.json` says of it; None where the backbone has its weights by its name.

        Raises:
            FormatError: It is malformed.
        """
        stored = description["backbone"].get("weights")
        if stored is None:
            return None
        try:
            path, digest = stored["path"], stored["sha256"]
            if not isinstance(path, str) or not _is_sha256(digest):
                raise ValueError(str(stored)[:200])
            return cls(path, digest)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                "what a task says of its backbone's weights is malformed",
                found=f"{type(error).__name__}: {error}",
                fix="restore task.json from where it was saved",
            ) from None

    @property
    def name(self) -> str:
        """The file's name without folders, whichever operating system wrote the path."""
        return PurePosixPath(PureWindowsPath(self.path).as_posix()).name

    def find(self, folder: Path) -> Path | None:
        """Where it lies now: where it was, or beside or in the task folder; None for nowhere."""
        here = folder.resolve()
        # A network path in a stranger's task must not make this machine log in anywhere.
        remote = self.path.startswith(("\\\\", "//"))
        places = [] if remote or not Path(self.path).is_absolute() else [Path(self.path)]
        places += [here / self.name, here.parent / self.name]
        return next((p for p in places if p.is_file()), None)

    def matches(self, file: Path) -> bool:
        """Whether a file holds the same bytes.

        Raises:
            BackboneError: It cannot be read.
        """
        return _digest_file(file) == self.sha256

    def to_dict(self) -> dict[str, str]:
        """The entry of `task.json`."""
        return {"path": self.path, "sha256": self.sha256}


def _digest_file(file: Path) -> str:
    """sha256 of a file's bytes, 64 hexadecimal digits; a file that did not change is read once.

    Raises:
        BackboneError: It cannot be read.

    Cost: about 1 s a gigabyte.
    """
    try:
        return digest_file(file)
    except OSError as error:
        raise BackboneError(
            "a weights file cannot be read",
            where=str(file),
            found=error.strerror or str(error),
            fix="give its path",
        ) from None


def describe(path: str | Path) -> dict[str, Any]:
    """The contents of `task.json`, checked, without loading weights; an older format as today's.

    Raises:
        FormatError: No task folder, damaged, or of a newer format.
    """
    file = Path(path) / DESCRIPTION
    if not os.path.lexists(file):
        raise FormatError(
            "no task here",
            where=str(path),
            found="no task.json",
            fix="give the folder that `restuning train` left (NAME.task)",
        )
    refuse_leaving(file)
    description = read_json(file, what=DESCRIPTION, fix=_RESTORE)
    try:
        version = description["format"]
        complete = {"task", "backbone", "preprocessing"} <= description.keys()
        complete = complete and isinstance(description["backbone"]["fingerprint"], dict)
        complete = complete and isinstance(description["backbone"]["name"], str)
        complete = complete and isinstance(description["task"], dict)
        if SHA256 in description and not _is_sha256(description[SHA256][WEIGHTS]):
            raise ValueError(f"{SHA256} of {WEIGHTS} is none")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            "task.json cannot be read",
            where=str(file),
            found=f"{type(error).__name__}: {error}",
            fix=_RESTORE,
        ) from None
    if version not in (1, FORMAT):
        raise FormatError(
            "a task of another format",
            where=str(file),
            found=f"format {version}, we read 1 to {FORMAT}",
            fix=f"use the library that wrote it ({description.get('library', 'unknown')})",
        )
    if not complete:
        raise FormatError(
            "task.json is incomplete",
            where=str(file),
            found=", ".join(sorted(description)),
            fix="restore it from where the task was saved",
        )
    return _from_format1(description) if version == 1 else description


def summarise(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What a task folder says of itself, as plain values and without its weights: what `restuning info` shows.

    Args:
        path: A task folder, a run folder for the one task in it, or a name on the hub.
        revision: Of a name on the hub.

    Raises:
        FormatError: As `describe`, or a part of `task.json` is malformed.
    """
    folder = find_task(path, revision)
    description = describe(folder)
    fetched = find_origin(folder)
    weights = folder / "weights.safetensors"
    try:
        task, side = description["task"], description["task"]["side"]
        temperature = check_temperature(task.get("temperature", 1.0))
        return {
            "method": task["method"],
            "backbone": description["backbone"]["name"],
            "fingerprint": description["backbone"]["fingerprint"],
            "tuners": dict(Counter(_name_kind(spec) for spec in task["tuners"].values())),
            "side network": side and side["kind"],
            "head": task["head"],
            "labels": task["labels"],
            **({"problem": task["problem"]["kind"]} if "problem" in task else {}),
            **({"temperature": temperature} if temperature != 1 else {}),
            "preprocessing": description["preprocessing"],
            "bytes": weights.stat().st_size if weights.exists() else None,
            "written by": description.get("library"),
            **({"fetched": fetched} if fetched else {}),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            "task.json is malformed",
            where=str(folder / "task.json"),
            found=f"{type(error).__name__}: {error}",
            fix="restore it from where the task was saved",
        ) from None


def _name_kind(spec: Mapping[str, Any]) -> str:
    # A tuner may wrap another: its name in brackets, as deep as it goes.
    return f"{spec['kind']}({_name_kind(spec['tuner'])})" if "tuner" in spec else spec["kind"]


_RESTORE = "restore it from where the task was saved"


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def check_labels(task: Task) -> None:
    """Compare the names of a task's classes with its head, which answers with one number a class.

    Raises:
        FormatError: Their numbers differ, or they are no texts.
    """
    labels = task.labels
    if labels is None:
        return
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise FormatError(
            "the labels of a task are no list of texts",
            found=repr(labels)[:200],
            fix="give task.labels as names, in the order of the logits",
        )
    if task.head is not None and task.problem.outputs(labels) != task.head.out_features:
        raise FormatError(
            "a task has another number of labels than its head has answers",
            found=f"{len(labels)} labels, {task.head.out_features} answers",
            fix="give task.labels as many names as the head has outputs; of a file, restore it",
        )


def _from_format1(description: dict[str, Any]) -> dict[str, Any]:
    """Translate format 1, which called the side network `bypass` and its kind `network`; the paper's had none."""
    task = dict(description["task"])
    side = task.pop("bypass", None)
    if side is not None:
        side = {"kind": side.get("network", "bypass"), **side}
        side.pop("network", None)
    return {**description, "format": FORMAT, "task": {**task, "side": side}}


def _read_tensors(folder: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the weights of a task under today's names, whatever format they were written in.

    Raises:
        ValueError: They are not those that the description belongs to.
    """
    try:
        file = find_weights(folder, description)
        tensors = None if file is None else load_file(file)
    except (OSError, SafetensorError):
        if describe(folder) != description:
            raise _ReplacedMeanwhileError from None
        raise
    if describe(folder) != description:
        raise _ReplacedMeanwhileError
    if tensors is None:
        raise ValueError("their sha256 is not the one in task.json: they are of another save")
    return {
        f"side.{name.removeprefix('bypass.')}" if name.startswith("bypass.") else name: tensor
        for name, tensor in tensors.items()
    }


def find_shared(task: Task) -> dict[str, str]:
    """Names of tensors that stood before under another name, and that name.

    A module at two places of a task (one tuner beside two operations) gives such names.
    """
    first: dict[int, str] = {}
    # keep_vars gives the parameters themselves; without it every name has a new tensor object.
    named = task.state_dict(keep_vars=True).items()
    firsts = {name: first.setdefault(id(tensor), name) for name, tensor in named}
    return {name: other for name, other in firsts.items() if name != other}


def _share(task: Task, shared: Mapping[str, str]) -> None:
    """Let the tensors of `find_shared` be one again, so that they also train as one."""
    for name, other in shared.items():
        (place, _, attribute), (first, _, source) = name.rpartition("."), other.rpartition(".")
        setattr(task.get_submodule(place), attribute, getattr(task.get_submodule(first), source))


def load(
    path: str | Path,
    host: Extractor | Identified,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    any_backbone: bool = False,
) -> Task:
    """Read a task folder, or a task of the Hugging Face hub (`user/name`).

    Args:
        path: What `find_task` takes: a task folder, a run folder or a hub name.
        host: The host it will run on; `Identified(host)` for many tasks, one after the other.
        revision, token, local_files_only: Of a hub name, as for `find_task`.
        any_backbone: Accept other weights of the same shape, or another engine of the same
            backbone, whose values differ by its rounding.

    Raises:
        WrongBackboneError: It was trained on another backbone, other weights of this one, or the same
            weights computed with in another way.
        FormatError: Damaged, of another format, or its weights are not those of its description.
        HubError: The hub refuses.

    Warns:
        RestuningWarning: It was saved before digests were, and three tensors could be compared only.

    Cost: reads the backbone's weights once a host, about 1 s a gigabyte.
    """
    folder = find_task(path, revision, token=token, local_files_only=local_files_only)
    for _ in range(_TRIES):
        with suppress(_ReplacedMeanwhileError):
            return _load(folder, host, str(path), any_backbone)
    # Others save it faster than it is read: they wait for this one now, as for each other.
    with suppress(_ReplacedMeanwhileError, OSError), Claim.of_folder(folder):
        return _load(folder, host, str(path), any_backbone)
    # A file system without locks.
    raise FormatError(
        "a task is replaced again and again while it is read",
        where=str(path),
        fix="load it when nobody saves it",
    )


_TRIES = 3
"""Of reading a task that another process saves meanwhile, before it is made to wait."""


class _ReplacedMeanwhileError(Exception):
    pass


def _load(folder: Path, host: Extractor | Identified, where: str, any_backbone: bool) -> Task:
    description = describe(folder)
    refuse_other_backbone(description["backbone"], host, where, any_backbone=any_backbone)
    try:
        shared = dict(description.get("shared", {}))
        tensors = _read_tensors(folder, description)
        if twice := shared.keys() & tensors.keys():
            raise ValueError(f"{min(twice)} is both written and said to be another tensor")
        written = {name: tensors[other] for name, other in shared.items()}
        refuse_other_sizes(description["task"], tensors | written)
        task = Task.from_spec(description["task"])
        check_labels(task)
        if wrong := _wrong_numbers(tensors) or _wrong_dtypes(tensors, task.state_dict()):
            raise ValueError(wrong)
        task.load_state_dict(tensors | written, strict=True)
        _share(task, shared)
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise FormatError(
            "the weights of a task cannot be read",
            where=str(Path(folder) / WEIGHTS),
            found=str(error)[:300],
            fix="restore the whole folder from where it was saved",
        ) from None
    device = host.device
    return task.to(device).eval()


def find_task(
    where: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The task folder that is meant.

    Args:
        where: A task folder; a run folder, for the one task in it; or a name on the Hugging Face hub, which is
            fetched: `user/repository`, `user/repository/task` of one that holds several, either with `@revision`.
            A folder of this name that is here is taken first.
        revision: Of a name on the hub: branch, tag or commit; None for the newest.
        token: For repositories that are private; None for that of the login (`hf auth login`, HF_TOKEN).
        local_files_only: Take what was fetched before, and ask no hub.

    Raises:
        FormatError: A run folder with several tasks, or no such folder and no such task on the hub.
        HubError: The hub refuses, or fails.
        MissingExtraError: huggingface_hub is not installed.

    Warns:
        RestuningWarning: A folder is taken though a name on the hub may be meant.
    """
    folder = expand_home(where)
    if folder.exists():
        _say_folder_wins(where, folder, revision)
        return find_in_folder(folder)
    named = HubTask.read(where, revision)
    # A revision is of a hub alone.
    if named is None or named.revision is None:
        _refuse_missing(folder, named)
    if named is None:
        return find_in_folder(folder)
    return fetch(named, token=token, local_files_only=local_files_only)


def _say_folder_wins(where: str | Path, folder: Path, revision: str | None) -> None:
    named = HubTask.read(where)
    if revision is not None or (named and is_cached(named)):
        warn(
            "a folder is taken, and no task of the hub",
            where=str(folder.absolute()),
            found=f"{where} is a folder here"
            + (f", which has no revision {revision}" if revision else ", and on the hub as well"),
            fix=f"for that of the hub write {named.place}@{revision or 'main'}, for the folder ./{where}"
            if named
            else "leave the revision out",
        )


def _refuse_missing(folder: Path, named: HubTask | None) -> None:
    """Refuse what looks like a path more than like a repository: it is not asked for under a stranger's name.

    Raises:
        FormatError: A folder that it begins with is here.
    """
    if folder.is_absolute() or folder.parts[:1] == ("..",):
        return
    parent = next((p for p in folder.parents if p.is_dir()), Path())
    if parent == Path():
        return
    there = sorted(each.name for each in parent.iterdir() if each.is_dir())
    also = f"; a task of the hub that is called so is {named.place}@main" if named else ""
    raise FormatError(
        "no such folder",
        where=str(folder.absolute()),
        found=f"{parent} holds {', '.join(there[:6]) or 'no folder'}",
        fix=f"give one of these{also}",
    )


def find_in_folder(folder: Path) -> Path:
    """Find the task folder: the folder itself, or the only task that a run left in it."""
    if (folder / "task.json").exists() or not folder.is_dir():
        return folder
    # A comparison has a folder a method, and a task in each.
    tasks = sorted(
        p.parent for p in (*folder.glob("*.task/task.json"), *folder.glob("*/*.task/task.json"))
    )
    if len(tasks) > 1:
        raise FormatError(
            "several tasks in one folder",
            where=str(folder),
            found=", ".join(str(t.relative_to(folder)) for t in tasks),
            fix="give one of them, or a list",
        )
    return tasks[0] if tasks else folder

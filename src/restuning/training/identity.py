"""What a run is known by beside its settings: its data, the names of its classes and its backbone.

The names are those that an error gives them, where two runs that meet in one folder differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from restuning._errors import warn
from restuning.data.digests import Tell, digest_value, quiet
from restuning.data.identity import Contents, combine, describe_reading, identify
from restuning.host import Extractor
from restuning.training.prepare import is_solved
from restuning.training.settings import FitSettings

NAMES = 20
"""Classes up to which their names are written out; of more, a digest is."""


DIGITS = 16
"""Of a digest, so that errors name two of them and stay readable."""


def describe_data(
    train: Any, val: Any, collate: Any = None, tell: Tell = quiet
) -> dict[str, str | None]:
    """Digests of the contents of both splits, and of how they are read.

    Args:
        train: Map-style data set.
        val: Likewise, or None.
        collate: Makes a batch of examples; only the options of the library's own are compared.
        tell: Receives a line where much has to be read.

    Cost: as `identify`.
    """
    to_dict = getattr(collate, "to_dict", None)
    batches = to_dict() if callable(to_dict) else None
    both = [None if split is None else identify(split, tell) for split in (train, val)]
    described = describe_contents(*both)
    for name, contents in zip(("training", "validation"), both, strict=True):
        described[f"the reading of the {name} data"] = (
            contents and describe_reading(contents.reading, batches)[:DIGITS]
        )
        if contents is not None and contents.assumed:
            described[f"assumed of the {name} data"] = contents.assumed
            warn(
                f"not all of the {name} data is compared with what was trained on before",
                found=contents.assumed,
                fix="give the data set an attribute `identity`, a text that is another one whenever its "
                "contents are",
            )
    return described


def describe_contents(train: Contents | None, val: Contents | None) -> dict[str, str | None]:
    """Digests of the contents of both splits, as `describe_data` names them."""
    described: dict[str, str | None] = {}
    for name, contents in (("training", train), ("validation", val)):
        described |= {
            f"the {name} data": contents and contents.inputs[:DIGITS],
            f"the labels of the {name} data": contents and contents.labels[:DIGITS],
        }
    return described


def describe_settings(settings: FitSettings, task: nn.Module) -> dict[str, Any]:
    """The settings that matter for a task."""
    # No other run than one of other epochs; but none that trained a head on its answers, as versions before did.
    steps = {"epochs": 0} if is_solved(task) else {}
    return {**settings.identity(), **steps}


def describe_form(task: nn.Module) -> str:
    """Digest of the shapes and types of a task's weights, and of how it is built."""
    # Not of values: those change while the run goes on.
    form = {n: [list(t.shape), str(t.dtype)] for n, t in task.state_dict().items()}
    spec = getattr(task, "spec", None)
    text = json.dumps([form, spec() if callable(spec) else None], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_classes(labels: Sequence[str] | None) -> list[str] | str | None:
    """The names of the classes in their order; of many, their number and a digest."""
    if labels is None or len(labels) <= NAMES:
        return None if labels is None else [str(name) for name in labels]
    return f"{len(labels)} names, {combine(digest_value(str(name)) for name in labels)}"


def describe_backbone(tuned: nn.Module) -> str:
    """Class and digest of all that a module computes with beside its task.

    Args:
        tuned: With `.task`, and `.host` where there is one.

    Cost: reads every weight once, about 1 s a gigabyte.
    """
    host: Any = getattr(tuned, "host", None)
    own = {id(tensor) for tensor in tuned.get_submodule("task").parameters()}
    model: Any = getattr(host, "model", host)
    inner = list(model.named_parameters()) if isinstance(model, nn.Module) else []
    if isinstance(host, Extractor) and not any(id(tensor) in own for _, tensor in inner):
        return describe_host(host)
    # What is trained lies inside, or the module is somebody's own: all that is not the task's.
    frozen = [(n, t) for n, t in [*inner, *tuned.named_parameters()] if id(t) not in own]
    return f"{type(model).__name__} {combine(digest_value(part) for part in frozen)[:DIGITS]}"


def describe_host(host: Extractor) -> str:
    """Class and digest of a backbone or an engine."""
    return f"{host.fingerprint().get('class', type(host).__name__)} {host.digest()}"

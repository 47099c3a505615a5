"""What a checkpoint of another's training loop holds of a task, and that it is put back into the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from restuning._errors import FormatError, WrongBackboneError
from restuning.host import Extractor
from restuning.task import Task, find_shared

BACKBONE = "backbone"
"""Key of the digest that says which backbone the weights belong to."""


def digest_tensor(host: Extractor) -> Tensor:
    """A digest of all weights of the backbone as 8 numbers, which any format of checkpoints can hold.

    Cost: about 1 s a gigabyte, once while they stay what they are.
    """
    digest = hashlib.sha256(host.digest().encode()).digest()[:8]
    return torch.tensor(list(digest), dtype=torch.uint8)


def complete(model: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Hook after `state_dict`: the digest is put in, and tensors that modules share are left in once.

    safetensors, in which Trainer saves, refuses tensors that share their memory.
    """
    for name in find_shared(model.task):
        del state[f"{prefix}task.{name}"]
    state[prefix + BACKBONE] = digest_tensor(model.host)


def check(model: Any, state: dict[str, Any], prefix: str, *_more: Any) -> None:
    """Hook before `load_state_dict`, strict or not: weights of another task or backbone are refused.

    Raises:
        FormatError: Weights are missing, too many or of another shape.
        WrongBackboneError: They were trained on another backbone.
    """
    shared = find_shared(model.task)
    wanted = {f"{prefix}task.{name}": t for name, t in model.task.state_dict().items()}
    given = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    backbone = given.pop(prefix + BACKBONE, None)
    for name, other in shared.items():
        first = f"{prefix}task.{other}"
        if first in given:
            given[f"{prefix}task.{name}"] = given[first]
    _refuse_other_task(model.task, wanted, given)
    if backbone is None or not torch.equal(backbone.cpu(), digest_tensor(model.host)):
        raise WrongBackboneError(
            "a checkpoint was trained on another backbone",
            found="another digest of its weights" if backbone is not None else "no digest in it",
            fix="load the backbone that it was trained on, with the same weights",
        )
    del state[prefix + BACKBONE]
    state.update(given)


def _refuse_other_task(
    task: Task, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> None:
    shapes, there = ({n: tuple(t.shape) for n, t in each.items()} for each in (wanted, given))
    differ = [name for name in {**shapes, **there} if shapes.get(name) != there.get(name)]
    if differ:
        name = differ[0]
        raise FormatError(
            "a checkpoint of another task",
            where=task.method,
            found=f"{len(differ)} weights differ; {name}: {there.get(name, 'missing')} in the checkpoint, "
            f"{shapes.get(name, 'nothing')} in the task",
            fix="build the task as it was built for that run, or begin a new one",
        )

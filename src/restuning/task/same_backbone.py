"""Whether a backbone is the one that a task was trained on, and in words what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from restuning._errors import FormatError, WrongBackboneError, warn
from restuning.host import ADAPTERS, Extractor, compare_answers


class Identified:
    """What a host's backbone is, worked out once: `load(path, Identified(host))` for one task after the other.

    For who opens many tasks, or opens them while others are answered. Every `load` on a host sums all
    of its weights again, since a write to `p.data` is counted by nobody; whoever makes this promises
    that nobody writes so. What torch counts is still compared in every forward.

    Args:
        host: The backbone.

    Raises:
        BackboneChangedError: It is not what it was when its host was built.

    Cost: reads the backbone's weights once, about 1 s a gigabyte.
    """

    def __init__(self, host: Extractor) -> None:
        self.host = host
        self._fingerprint, self._identity = host.fingerprint(), host.identity()
        self._apart = host.apart()

    def apart(self) -> dict[str, Any] | None:
        """As the host answers."""
        return self._apart

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return self.host.device

    def fingerprint(self) -> dict[str, Any]:
        """As `Extractor.fingerprint`."""
        return self._fingerprint

    def earlier_fingerprint(self) -> dict[str, Any]:
        """As `Extractor.earlier_fingerprint`."""
        return self.host.earlier_fingerprint()

    def identity(self) -> dict[str, Any]:
        """As `Extractor.identity`."""
        return self._identity


def refuse_other_backbone(
    said: Mapping[str, Any], host: Extractor | Identified, where: str, *, any_backbone: bool
) -> None:
    """Compare a backbone with what a task file says of its own, the cheapest first.

    Its fingerprint (structure and three tensors), the digest of all weights and buffers, and what it
    answers to a fixed input. Files of before have the fingerprint only.

    Args:
        said: `backbone` of `task.json`.
        host: The backbone that is here.
        where: The task, for errors.
        any_backbone: Accept other weights, another computation or another engine; another structure
            is refused always, for the tuners would not fit.

    Raises:
        WrongBackboneError: It is another.
        BackboneChangedError: It is not what it was when its host was built.
        FormatError: What the file says is malformed.

    Warns:
        RestuningWarning: Only the fingerprint could be compared.
    """
    theirs, ours = said["fingerprint"], host.fingerprint()
    different = _difference(theirs, ours)
    # Before LoRA of PEFT counted as merged, its tensors stood beside the weights.
    if (
        "digest" in said
        and (apart := host.apart()) is not None
        and apart["digest"] == said["digest"]
    ):
        different, said = "", {**said, "digest": host.identity()["digest"]}
    found = f"trained on {_in_words(theirs)}; this is {_in_words(ours)}"
    if different and "digest" not in said:
        # A wrapper of PEFT or FSDP had other names and another class then.
        different = _difference(theirs, host.earlier_fingerprint()) and different
    if not different:
        different, found = _look_closer(said, host, where)
    elif different == ENGINE and any_backbone:
        # Engines round differently; what they were made of is still compared where it is told.
        _look_closer(said, host, where)
    if not different or (any_backbone and different != STRUCTURE):
        return
    name = said["name"]
    accept = "" if different == STRUCTURE else "; any_backbone=True (--any-backbone) accepts it"
    raise WrongBackboneError(
        f"this task was trained on another {different}",
        where=where,
        found=found,
        fix=f"load the backbone named in task.json{f' ({name})' if name else ''}{accept}",
    )


STRUCTURE, WEIGHTS = "backbone", "set of weights of this architecture"
ENGINE, COMPUTATION = "engine of this backbone", "computation with the same weights"


def _look_closer(
    said: Mapping[str, Any], host: Extractor | Identified, where: str
) -> tuple[str, str]:
    """What differs beyond the fingerprint, and what was found; two empty texts for nothing."""
    ours = host.identity()
    if "digest" not in said or "digest" not in ours:
        who = "the task's file" if "digest" not in said else "the engine's file"
        if not _is_own_engine(said, host):
            warn(
                "only three tensors of the backbone could be compared with the task's",
                where=where,
                found=f"{who} was written before digests of all weights were kept",
                fix="make sure that the backbone is the same in all its weights and buffers; saved "
                "again, a task has the digest",
            )
        return "", ""
    if said["digest"] != ours["digest"]:
        found = (
            f"trained on weights {_short(said['digest'])}, these are {_short(ours['digest'])}; the "
            "structure and three tensors are the same, so a part of them differs: layers that were "
            "tuned, adapters that were merged or are in use, or statistics of BatchNorm"
            f"{_in_use(said['fingerprint'], 'there')}{_in_use(host.fingerprint(), 'here')}"
        )
        return WEIGHTS, found
    if "answers" in said and "answers" in ours:
        try:
            apart, allowed = compare_answers(said["answers"], ours["answers"]) or (0.0, 0.0)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                "what a task says of its backbone is malformed",
                where=where,
                found=f"answers: {type(error).__name__}: {error}"[:200],
                fix="restore task.json from where it was saved",
            ) from None
        if apart > allowed:
            found = (
                f"all weights are equal, but the answers to one fixed input differ by {apart:.1%} of "
                f"their size ({allowed:.2%} would be rounding): another number of heads, another "
                "activation, other positions or another eps"
            )
            return COMPUTATION, found
    return "", ""


def _in_use(fingerprint: Mapping[str, Any], where: str) -> str:
    """Which adapters of others are in use, in words; "" for none."""
    return f"; {where} with adapters {fingerprint[ADAPTERS]}" if ADAPTERS in fingerprint else ""


def _is_own_engine(said: Mapping[str, Any], host: Extractor | Identified) -> bool:
    """Whether both are one engine file, which its own digest tells."""
    engine = host.fingerprint().get("engine")
    return engine is not None and said["fingerprint"].get("engine") == engine


def _short(digest: Any) -> str:
    return f"{str(digest)[:12]}..."


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What two fingerprints differ in, in words; "" for nothing."""
    names = {n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)} - {ADAPTERS}
    if names - {"weights", "engine"}:
        return STRUCTURE
    if "weights" in names:
        return WEIGHTS
    return ENGINE if names else ""


def _in_words(fingerprint: Mapping[str, Any]) -> str:
    f = fingerprint
    widths = ",".join(map(str, f.get("widths", [])))
    engine = f.get("engine") or {}
    ran = f", in {' '.join(map(str, engine.values()))}" if engine else ""
    return (
        f"{f.get('class')} ({f.get('layers')} layers, d={widths}, sites {f.get('sites')}, "
        f"weights {f.get('weights')}{ran}{_in_use(f, 'all')})"
    )

"""An engine: a backbone that gives taps and cannot differentiate, such as an ONNX Runtime session.

A bypass needs values only, so this is all it needs. Nothing can be tuned inside an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import EngineError
from restuning.host.extractor import Extractor
from restuning.host.parts import compute_part
from restuning.sites import (
    FEATURE,
    IN_WORDS,
    ONE_TOKEN,
    Features,
    Needs,
    Readout,
    Sites,
    Tokens,
    covers_tokens,
    is_stream,
    resolve_tokens,
    split_tap,
    take_one_token,
)

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


class Engine(Extractor):
    """Taps of a network that runs elsewhere; its final norm is lent as a small frozen module.

    Args:
        run: Inputs by name on the CPU to the values of all taps. May be called from many threads.
        inputs: Names of the inputs, in the order of positional arguments.
        sites: Its blocks.
        tokens: What its taps hold: "all", or only what was exported.
        readout: How its last stream becomes a feature; `readout.norm` is a path in `model`.
        model: Holds the final norm.
        fingerprint: The fingerprint of the network it was made of; its own file's under "engine".
        digest: sha256 of its file, 16 hexadecimal digits.
        weights: sha256 of all weights of the network it was made of; "" where its file does not say.

    Cost: one run a batch, and a copy of its inputs and taps where they live on another device.
    """

    here: Tensor

    def __init__(
        self,
        run: Run,
        *,
        inputs: Sequence[str],
        sites: Sites,
        tokens: Tokens,
        readout: Readout,
        model: nn.Module,
        fingerprint: Mapping[str, Any],
        digest: str,
        weights: str = "",
    ) -> None:
        super().__init__()
        self.run, self.inputs, self.sites = run, tuple(inputs), sites
        self.tokens: Tokens = tokens
        self.readout_rule, self.model = readout, model.eval().requires_grad_(False)
        self.images = "attention_mask" not in self.inputs
        self._fingerprint, self._digest, self._weights = dict(fingerprint), digest, weights
        # Where inputs are wanted, even where there is no norm that would tell.
        self.register_buffer("here", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it takes its inputs and gives its taps; it computes where its runtime does."""
        return self.here.device

    def forward(self, *args: Any, **kwargs: Any) -> Features:
        """All taps."""
        return self.features(*args, **kwargs)

    def features(
        self, *args: Any, keep: Needs | Sequence[str] | None = None, **kwargs: Any
    ) -> Features:
        """Taps of one run; see `Extractor`.

        Raises:
            EngineError: It holds other tokens than are wanted, or refuses the input.
            NoSitesError: A tap has no such name.
        """
        needs = self.resolve_needs(keep, self.tokens)
        inputs = self._name_inputs(args, kwargs)
        device = next(iter(inputs.values())).device
        with torch.no_grad():
            # Runtimes take arrays in main memory, wherever the task lives.
            values = self.run({name: value.detach().cpu() for name, value in inputs.items()})
        streams = dict(zip(self.sites.taps, (v.to(device) for v in values), strict=True))
        attention_mask = inputs.get("attention_mask")
        mask = (
            attention_mask.bool()
            if attention_mask is not None and attention_mask.dim() == 2
            else None
        )
        last = self.sites.taps[-1]
        taps: dict[str, Tensor] = {}
        for name in needs.taps:
            tap, part = split_tap(name)
            if tap == FEATURE:
                taps[name] = self.readout(streams[last], part, mask).unsqueeze(1)
                continue
            stream = streams[last if tap == "last" else tap]
            if part:
                stream = compute_part(part, stream, mask)
            elif self.tokens == "all" and needs.tokens in ("cls", "last"):
                stream = take_one_token(stream, needs.tokens, mask)
            taps[name] = stream
        return Features(taps, self.readout, mask if needs.tokens == "all" else None)

    def resolve_needs(self, keep: Needs | Sequence[str] | None, tokens: Tokens = "all") -> Needs:
        """What to keep, checked; see `Extractor`.

        Raises:
            EngineError: It holds other tokens than are wanted.
            NoSitesError: A tap has no such name.
        """
        needs = super().resolve_needs(keep, tokens)
        whole = [name for name in needs.taps if is_stream(name)]
        for name in needs.taps:
            wanted = _tokens_of_part(name)
            if wanted is not None and not covers_tokens(self.tokens, wanted):
                raise EngineError(
                    "the engine gives other tokens than the task reads",
                    found=f"{IN_WORDS[self.tokens]} were exported, {name} is made of "
                    f"{IN_WORDS[wanted]}",
                    fix=f"export it again with --tokens {wanted}",
                )
        if whole and not covers_tokens(self.tokens, needs.tokens):
            raise EngineError(
                "the engine gives other tokens than the task reads",
                found=f"{IN_WORDS[self.tokens]} were exported, {IN_WORDS[needs.tokens]} are wanted",
                fix=f"export it again with --tokens {needs.tokens}",
            )
        return needs

    def fingerprint(self) -> dict[str, Any]:
        """Those of the network it was made of and of its own file: engines round differently."""
        return dict(self._fingerprint)

    def identity(self) -> dict[str, Any]:
        """The digest of the weights of the network it was made of; nothing of engines of before."""
        return {"digest": self._weights} if self._weights else {}

    def digest(self) -> str:
        """sha256 of its file, 16 hexadecimal digits."""
        return self._digest

    def _name_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        # Too few or too many are refused below, with their names.
        inputs = dict(zip(self.inputs, args, strict=False)) | dict(kwargs)
        if len(args) > len(self.inputs) or set(inputs) != set(self.inputs):
            raise EngineError(
                "these are not the engine's inputs",
                found=", ".join([*map(str, inputs), *["?"] * max(0, len(args) - len(self.inputs))]),
                fix=f"give {', '.join(self.inputs)}",
            )
        return inputs


def _tokens_of_part(name: str) -> Tokens | None:
    """What a part of a tap, or the feature, is made of; None of a whole tap."""
    tap, part = split_tap(name)
    if tap == FEATURE:
        return resolve_tokens(part)
    return (part if part in ONE_TOKEN else "all") if part else None


def cannot_tune_inside(what: str) -> EngineError:
    """The error of whatever would run inside an engine."""
    return EngineError(
        "nothing can be tuned inside an engine",
        where=what,
        found="it gives values and no gradients, and its layers cannot be changed",
        fix="use res-tuning-bypass, bypass-horizontal, bypass-vertical or linear, or the PyTorch "
        "backbone that the engine was exported from",
    )

"""What an engine file says of itself: JSON that travels inside the file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from restuning._errors import MALFORMED, EngineError, FormatError
from restuning._files import fits, hints_of, parse_json, seal
from restuning.backbones.preprocessing import LARGEST_SIDE, Preprocessing
from restuning.sites import POOLS, Readout, Site, Sites, Tokens

FORMAT = 1
"""Raised when an older library could not read what a newer one writes."""
KEY = "restuning"
"""Under which the JSON stands in an engine file."""
WHAT = "the description of an engine"

PRECISIONS = ("fp32", "int8")
LARGEST_INPUT = 2**25
"""Numbers of one input, 128 MiB: an image of 3300 pixels a side."""
WIDEST = 2**20
"""Channels of a block."""

_PLAIN = {f.name for f in fields(Site)} - {"projections"}
_OPS = ("block", "cross")
"""Blocks are tapped; cross-attentions tell where a decoder begins."""
_DTYPES = {"float32": torch.float32, "int64": torch.int64}
_NORM_TOLERANCE = 1e-5
"""Two forms of one norm in fp32 differ by rounding, relative to values of a few units."""


@dataclass(frozen=True)
class Description:
    """Everything about an engine but its graph.

    Attributes:
        backbone: Name of the network it was exported from.
        weights: Of that: "pretrained", "random" or a file's name.
        fingerprint: Of that.
        precision: "fp32" or "int8".
        inputs: Names in order, each with the shape and type of one input.
        sites: Its blocks and cross-attentions.
        tokens: What every tap holds.
        readout: How the last stream becomes a feature; its norm is `norm.norm`.
        norm: Holds the final norm under "norm", or nothing.
        preprocessing: Of images, as JSON; None for texts.
        pool: How its authors make one vector of a text.
        digest: sha256 of all weights of that network; "" in files of before it was kept.
        own_size: Height and width in pixels that those weights are for; None where nothing says it, and in
            files of before it was kept.
    """

    backbone: str
    weights: str
    fingerprint: Mapping[str, Any]
    precision: str
    inputs: Mapping[str, tuple[tuple[int, ...], str]]
    sites: Sites
    tokens: Tokens
    readout: Readout
    norm: nn.Module
    preprocessing: Mapping[str, Any] | None
    pool: str | None
    digest: str = ""
    own_size: tuple[int, int] | None = None

    def to_json(self) -> str:
        """As text, the norm's weights in base64 safetensors."""
        norm = getattr(self.norm, "norm", None)
        values = {
            "format": FORMAT,
            "backbone": self.backbone,
            "weights": self.weights,
            "fingerprint": dict(self.fingerprint),
            "precision": self.precision,
            "inputs": [[n, list(shape), dtype] for n, (shape, dtype) in self.inputs.items()],
            "sites": [
                {n: getattr(site, n) for n in sorted(_PLAIN)}
                for site in self.sites.values()
                if site.op in _OPS
            ],
            "tokens": self.tokens,
            "readout": asdict(self.readout),
            "norm": None
            if norm is None
            else {
                "kind": _KINDS[type(norm)],
                "eps": norm.eps,
                "tensors": base64.b64encode(save(dict(norm.state_dict()))).decode(),
            },
            "preprocessing": self.preprocessing,
            "pool": self.pool,
            "digest": self.digest,
            "own_size": self.own_size,
        }
        # Sealed: a number that changes in it would be other answers without a word.
        return json.dumps(seal(values))

    @classmethod
    def from_json(cls, text: str, where: str) -> Description:
        """From a file.

        Args:
            text: What stands under `KEY`, "" if nothing does.
            where: The file, for errors.

        Raises:
            FormatError: Not ours, malformed, or of another format.
        """
        if not text:
            raise FormatError(
                "not an engine of ours",
                where=where,
                found="a network that does not say where its taps are",
                fix="make one with `restuning engine export`",
            )
        values = parse_json(text, where, what=WHAT, fix="export it again")
        try:
            version = values["format"]
            made = None if version != FORMAT else cls._from(values)
        except (*MALFORMED, FormatError, SafetensorError) as error:
            raise FormatError(
                f"{WHAT} is malformed",
                where=where,
                found=f"{type(error).__name__}: {str(error)[:200]}",
                fix="export it again",
            ) from None
        if made is None:
            raise FormatError(
                "an engine of another format",
                where=where,
                found=f"format {version}, we read {FORMAT}",
                fix="export it again with this version, or use the library that wrote it",
            )
        return made

    @classmethod
    def _from(cls, values: Mapping[str, Any]) -> Description:
        sites = [_read_site(each) for each in values["sites"]]
        readout = Readout(**_typed(Readout, values["readout"]))
        norm = _read_norm(values["norm"])
        if len(Sites(sites)) != len(sites) or not sites or values["tokens"] not in get_args(Tokens):
            raise ValueError(f"{len(sites)} sites, tokens {values['tokens']}"[:200])
        if readout.norm != ("" if norm is None else "norm") or readout.dim < 1:
            raise ValueError(f"the readout is {readout}"[:200])
        if norm is not None and norm.weight.numel() not in {site.dim for site in sites}:
            raise ValueError(f"a norm of {norm.weight.numel()}, as wide as no block")
        inputs = dict(_read_input(*each) for each in values["inputs"])
        # Files of before it was kept have no digest.
        words = [values[n] for n in ("backbone", "weights", "precision")]
        words.append(values.get("digest", ""))
        if (
            not all(isinstance(each, str) for each in words)
            or values["precision"] not in PRECISIONS
        ):
            raise TypeError(f"backbone, weights, precision and digest are {words}"[:200])
        if not isinstance(values["fingerprint"], dict) or len(inputs) != len(values["inputs"]):
            raise TypeError("no fingerprint, or an input twice")
        if not inputs or values["pool"] not in (None, *POOLS):
            raise ValueError(f"{len(inputs)} inputs, pooled by {values['pool']}"[:200])
        if values["preprocessing"] is not None:
            Preprocessing.from_dict(values["preprocessing"])
        return cls(
            words[0],
            words[1],
            values["fingerprint"],
            words[2],
            inputs,
            Sites(sites),
            values["tokens"],
            readout,
            _wrap_norm(norm),
            values["preprocessing"],
            values["pool"],
            words[3],
            _read_size(values.get("own_size")),
        )

    def check_graph(self, inputs: Mapping[str, Sequence[Any]], outputs: Sequence[str]) -> None:
        """Compare what the description says with the network in the file.

        Args:
            inputs: Their shapes by name; what is free is no whole number.
            outputs: Names of the outputs, in order.

        Raises:
            FormatError: They differ: the description belongs to another network.
        """
        said = {name: shape for name, (shape, _) in self.inputs.items()}
        fits = said.keys() == inputs.keys() and list(outputs) == list(self.sites.taps)
        for name, shape in said.items() if fits else ():
            fixed = zip(shape[1:], inputs[name][1:], strict=False)
            same = all(a == b for a, b in fixed if isinstance(b, int))
            fits = fits and same and len(shape) == len(inputs[name])
        if not fits:
            raise FormatError(
                "the description of an engine belongs to another network",
                where=self.backbone,
                found=f"inputs {said} and {len(self.sites.taps)} taps are said, "
                f"{dict(inputs)} and {len(outputs)} outputs are there"[:300],
                fix="export it again",
            )

    def example(self) -> dict[str, Tensor]:
        """One input, batch 1: zeros for pixels, ones for token numbers and masks."""
        return {
            name: (torch.ones if dtype == "int64" else torch.zeros)(shape, dtype=_DTYPES[dtype])
            for name, (shape, dtype) in self.inputs.items()
        }


def copy_readout(model: nn.Module, rule: Readout) -> tuple[Readout, nn.Module]:
    """A readout whose norm is a LayerNorm or an RMSNorm of torch, and a module that holds it.

    The two are proved on random states; channels stand last, as in taps.

    Raises:
        EngineError: The backbone's final norm is neither.
    """
    norm = copy_norm(model.get_submodule(rule.norm), rule.maps) if rule.norm else None
    # Without a norm "own" still works: the vector that the backbone returns is behind it.
    if rule.norm and norm is None and rule.pool != "own":
        raise EngineError(
            "the final norm of this backbone cannot be taken along",
            where=rule.norm,
            found=type(model.get_submodule(rule.norm)).__name__,
            fix="train on the PyTorch backbone; LayerNorm and RMSNorm are taken along",
        )
    return replace(rule, norm="norm" if norm is not None else "", maps=False), _wrap_norm(norm)


def copy_norm(norm: nn.Module, maps: bool) -> nn.Module | None:
    """A norm over the last axis as torch's own, or None where that is not the same function."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    said = next((getattr(norm, n) for n in ("eps", "variance_epsilon") if hasattr(norm, n)), None)
    # What torch takes where nothing is said.
    eps = torch.finfo(torch.float32).eps if said is None else said
    weight = weight.detach().float().cpu()
    layer = nn.LayerNorm(len(weight), eps)
    rms, shifted = nn.RMSNorm(len(weight), eps), nn.RMSNorm(len(weight), eps)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros_like(weight) if bias is None else bias.float().cpu())
        rms.weight.copy_(weight)
        # Gemma keeps its scale as a difference from one.
        shifted.weight.copy_(1 + weight)
        state = torch.randn(2, 3, 4, len(weight), generator=torch.Generator().manual_seed(0))
        # Neither centred nor of unit variance, where the candidates would agree.
        state = 3 * state + 1
        own = next(norm.parameters())
        moved = state.to(own.device, own.dtype)
        # Norms of feature maps read channels at axis 1; taps have them last.
        seen = norm(moved.movedim(-1, 1)).movedim(1, -1) if maps else norm(moved)
        for candidate in (layer, rms, shifted):
            error = (candidate(state) - seen.float().cpu()).abs().max()
            if error <= _NORM_TOLERANCE * seen.abs().max():
                return candidate
    return None


_KINDS: dict[type, str] = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}


def _read_norm(values: Mapping[str, Any] | None) -> Any:
    if values is None:
        return None
    tensors = load(base64.b64decode(values["tensors"], validate=True))
    if not all(t.dim() == 1 and torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError("the norm has numbers that are none, or no vectors")
    if not isinstance(values["eps"], float) or not 0 <= values["eps"] < 1:
        raise ValueError(f"the norm's eps is {values['eps']}"[:200])
    kinds = {name: kind for kind, name in _KINDS.items()}
    norm = kinds[values["kind"]](len(tensors["weight"]), eps=values["eps"])
    norm.load_state_dict(tensors)
    return norm


def _read_input(name: Any, shape: Any, dtype: Any) -> tuple[str, tuple[tuple[int, ...], str]]:
    sides = tuple(shape)
    if not isinstance(name, str) or not all(type(n) is int and n > 0 for n in sides):
        raise TypeError(f"not an input: {name}, {sides}"[:200])
    if math.prod(sides) > LARGEST_INPUT:
        raise ValueError(f"an input of {math.prod(sides):,} numbers")
    return name, (sides, str(_DTYPES[dtype])[6:])


def _read_size(sides: Any) -> tuple[int, int] | None:
    if sides is None:
        return None
    height, width = sides
    if not all(type(n) is int and 0 < n <= LARGEST_SIDE for n in (height, width)):
        raise ValueError(f"not a size of images: {sides}"[:200])
    return height, width


def _wrap_norm(norm: nn.Module | None) -> nn.Module:
    return nn.ModuleDict({} if norm is None else {"norm": norm})


def _read_site(values: Mapping[str, Any]) -> Site:
    site = Site(**_typed(Site, {n: values[n] for n in _PLAIN}))
    if site.op not in _OPS or not site.name.endswith(f".{site.layer}"):
        raise ValueError(f"not a site: {dict(values)}"[:200])
    if not 0 < site.dim <= WIDEST or not 0 <= site.dim_in <= WIDEST:
        raise ValueError(f"{site.name} is {site.dim} wide")
    return site


def _typed(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the fields of a dataclass, each of its field's type; lists become tuples.

    Raises:
        TypeError: One is of another type.
    """
    hints = hints_of(kind)
    for name, value in values.items():
        if not fits(value, hints[name]):
            raise TypeError(f"{name} is {value!r}"[:200])
    return {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}

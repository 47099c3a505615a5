"""`restuning engine export`: a backbone with its taps as an ONNX file or a `torch.export` program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import EngineError
from restuning.backbones.audio_preprocessing import AudioPreprocessing
from restuning.backbones.backbone import Backbone
from restuning.backbones.engines.description import (
    KEY,
    PRECISIONS,
    Description,
    copy_readout,
)
from restuning.backbones.engines.open import open_engine
from restuning.backbones.engines.program import (
    RUNTIMES,
    explain_failures,
    input_names,
    make_three,
    make_two_inputs,
    replace_when_done,
    trace,
    write_onnx,
    write_pt2,
)
from restuning.host import Host
from restuning.sites import IN_WORDS, Needs, resolve_tokens

TOLERANCE = 1e-3
"""Largest error of an fp32 engine's taps, relative to each tap's largest value: other kernels add in
another order, and vision backbones have channels a hundred times larger than the rest."""


@dataclass(frozen=True)
class Exported:
    """An engine that was written.

    Attributes:
        file: Where.
        bytes: Of it.
        runtime, precision, tokens: As asked for.
        taps: How many.
        largest: Largest absolute error of a tap against PyTorch in fp32, on random inputs.
        relative: Largest error over taps: root mean square of the difference over that of the values.
    """

    file: Path
    bytes: int
    runtime: str
    precision: str
    tokens: str
    taps: int
    largest: float
    relative: float


class Taps(nn.Module):
    """The taps of a host as a module that can be exported: positional inputs to `b n d` each.

    Args:
        host: The backbone.
        needs: Taps, in the order of the outputs, and their tokens.
        names: Of inputs that the backbone takes by keyword; torch.export loses its way in `**kwargs`.
    """

    def __init__(self, host: Host, needs: Needs, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.host, self.needs, self.names = host, needs, names

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """In the order of `needs.taps`."""
        if self.names:
            named = dict(zip(self.names, args, strict=True))
            return tuple(self.host.features(keep=self.needs, **named).values())
        return tuple(self.host.features(*args, keep=self.needs).values())


def export_engine(
    backbone: Backbone,
    out: str | Path,
    *,
    runtime: str = "onnx",
    precision: str = "fp32",
    tokens: str = "auto",
) -> Exported:
    """Write a backbone with all its taps, and compare the file's taps with PyTorch's.

    Args:
        backbone: On the CPU, in fp32.
        out: The file, by habit `NAME.onnx` or `NAME.pt2`.
        runtime: "onnx" (for ONNX Runtime and OpenVINO) or "pt2" (`torch.export`).
        precision: "fp32", or "int8": weights per channel, activations as they come (dynamic); ONNX.
        tokens: "cls", "last", "pool", "all", or "auto" for what the readout reads. All taps hold
            these only; tuners that mix tokens and pools of all tokens need "all".

    Raises:
        EngineError: It cannot be exported, is larger than 2 GiB (ONNX), its final norm is neither a
            LayerNorm nor an RMSNorm, or the file gives other taps than PyTorch.
        MissingExtraError: `onnx`, `onnxscript` or `onnxruntime` is not installed.

    Cost: half a minute for a ViT-B, and about three times its memory.
    """
    out = Path(out)
    kinds = {"auto", *IN_WORDS}
    if runtime not in RUNTIMES or precision not in PRECISIONS or tokens not in kinds:
        raise EngineError(
            "no such engine",
            found=f"{runtime}, {precision}, tokens {tokens}",
            fix=f"give one of {', '.join(RUNTIMES)}; {', '.join(PRECISIONS)}; "
            f"{', '.join(sorted(kinds))}",
        )
    if precision == "int8" and runtime != "onnx":
        raise EngineError(
            "int8 is quantised by ONNX Runtime",
            where=runtime,
            fix="use --engine onnx, or the backbone NAME+int8",
        )
    refuse_sounds(backbone)
    host = backbone.host()
    if not isinstance(host, Host):
        raise EngineError(
            "this is an engine already", where=backbone.name, fix="export the PyTorch backbone"
        )
    # A bypass reads what the readout reads; less in the file is less to compute and to copy.
    chosen: Any = resolve_tokens(host.readout_rule.pool) if tokens == "auto" else tokens
    names, example = input_names(backbone), make_two_inputs(backbone)
    module = Taps(host, Needs(host.sites.taps, chosen), tuple(backbone.kwargs)).eval()
    rule, norm = copy_readout(host.model, host.readout_rule)
    one = [value[:1] for value in example]
    description = Description(
        backbone.name,
        backbone.weights,
        host.fingerprint(),
        precision,
        {n: (tuple(v.shape), str(v.dtype)[6:]) for n, v in zip(names, one, strict=True)},
        host.sites,
        chosen,
        rule,
        norm,
        backbone.preprocessing.to_dict() if backbone.preprocessing else None,
        backbone.pool,
        host.identity()["digest"],
        # Weights that were drawn are for no size.
        None if backbone.weights == "random" else backbone.own_size,
    )
    metadata = {KEY: description.to_json()}
    with explain_failures(backbone.name, "another --engine, or the PyTorch backbone"):
        # Texts have any length, images one size.
        program = trace(module, example, any_length=bool(module.names))
        with replace_when_done(out) as partial:
            if runtime == "pt2":
                write_pt2(program, partial, metadata)
            else:
                taps, int8 = host.sites.taps, precision == "int8"
                write_onnx(program, partial, names, taps, metadata, int8=int8)
            largest, relative = _measure_errors(partial, runtime, module, names, example)
            # Quantised taps differ by more than rounding; `Exported.relative` tells by how much.
            if precision == "fp32" and not relative <= TOLERANCE:
                raise EngineError(
                    "the exported engine gives other taps than PyTorch",
                    where=backbone.name,
                    found=f"relative error {relative:.2g}, at most {TOLERANCE:g} is rounding",
                    fix="another --engine, or the PyTorch backbone; nothing was written",
                )
    return Exported(
        out, out.stat().st_size, runtime, precision, chosen, len(host.sites.taps), largest, relative
    )


def refuse_sounds(backbone: Backbone) -> None:
    """Refuse to export a backbone of sounds, whose lengths no graph of ours describes yet.

    Raises:
        EngineError: It is one.
    """
    if isinstance(backbone.preprocessing, AudioPreprocessing):
        raise EngineError(
            "a backbone of sounds is not exported",
            where=backbone.name,
            found=backbone.preprocessing.extractor,
            fix="serve its tasks from PyTorch: restuning serve TASK",
        )


def _measure_errors(
    file: Path, runtime: str, module: Taps, names: tuple[str, ...], example: tuple[Tensor, ...]
) -> tuple[float, float]:
    """Largest absolute and relative error over taps, on three inputs (the example has two)."""
    three = make_three(example)
    with torch.no_grad():
        ours = module(*three)
    theirs = open_engine(runtime, file)(**dict(zip(names, three, strict=True)))
    largest, relative = 0.0, 0.0
    for mine, other in zip(ours, theirs.values(), strict=True):
        difference = other.float() - mine.float()
        size = float(mine.float().square().mean().sqrt()) or 1.0
        largest = max(largest, float(difference.abs().max()))
        relative = max(relative, float(difference.square().mean().sqrt()) / size)
    return largest, relative

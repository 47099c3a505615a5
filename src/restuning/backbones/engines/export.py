"""`restuning engine export`: a backbone with its taps as an ONNX file or a `torch.export` program."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import EngineError, RestuningError, require
from restuning._files import replacing
from restuning.backbones.backbone import Backbone
from restuning.backbones.engines.description import (
    KEY,
    PRECISIONS,
    Description,
    copy_readout,
)
from restuning.backbones.engines.open import open_engine
from restuning.host import Host
from restuning.sites import IN_WORDS, Needs, resolve_tokens

RUNTIMES = ("onnx", "pt2")
TOLERANCE = 1e-3
"""Largest error of an fp32 engine's taps, relative to each tap's largest value: other kernels add in
another order, and vision backbones have channels a hundred times larger than the rest."""
LARGEST = 2 * 2**30 - 2**20
"""Bytes of one ONNX file (protobuf's limit), with room for the graph itself."""


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
    host = backbone.host()
    if not isinstance(host, Host):
        raise EngineError(
            "this is an engine already", where=backbone.name, fix="export the PyTorch backbone"
        )
    # A bypass reads what the readout reads; less in the file is less to compute and to copy.
    chosen: Any = resolve_tokens(host.readout_rule.pool) if tokens == "auto" else tokens
    names = tuple(backbone.kwargs) or ("input",)
    example = _two_inputs(backbone)
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
    with _explain_failures(backbone.name):
        program = _trace(module, example)
        writer: Callable[..., None] = _write_onnx if runtime == "onnx" else _write_pt2
        with _replace_when_done(out) as partial:
            writer(program, partial, description)
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


def _two_inputs(backbone: Backbone) -> tuple[Tensor, ...]:
    """Two inputs: one alone would fix the batch size. The second text ends in padding."""
    noise = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(2, *x.shape[1:], generator=noise) for x in backbone.example)
    kwargs = {name: torch.cat([x, x]) for name, x in backbone.kwargs.items()}
    if "attention_mask" in kwargs:
        kwargs["attention_mask"][1, -1] = 0
    return (*args, *kwargs.values())


def _trace(module: Taps, example: tuple[Tensor, ...]) -> Any:
    free = torch.export.Dim.DYNAMIC
    # Texts have any length, images one size.
    shapes = tuple(dict.fromkeys(range(x.dim() if module.names else 1), free) for x in example)
    return torch.export.export(module, example, dynamic_shapes={"args": shapes})


def _write_onnx(program: Any, file: Path, description: Description) -> None:
    onnx = require("onnx", "onnx", "exporting to ONNX")
    require("onnxscript", "onnx", "exporting to ONNX")
    # Protocol buffers end at 2 GiB; weights beside the file would be a second file to lose.
    size = sum(p.numel() * p.element_size() for p in program.state_dict.values())
    if size > LARGEST:
        raise EngineError(
            "the backbone is too large for one ONNX file",
            where=description.backbone,
            found=f"{size / 2**30:.1f} GiB of weights, at most 2",
            fix="export it with --engine pt2",
        )
    made: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=list(description.inputs),
        output_names=list(description.sites.taps),
    )
    made.save(str(file), external_data=False)
    if description.precision == "int8":
        quantisation = require("onnxruntime.quantization", "onnx", "an int8 engine")
        # Convolutions stay: dynamic int8 convolutions are slower than fp32 ones.
        quantisation.quantize_dynamic(
            str(file),
            str(file),
            per_channel=True,
            weight_type=quantisation.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},
        )
    graph = onnx.load(str(file))
    onnx.helper.set_model_props(graph, {KEY: description.to_json()})
    onnx.save(graph, str(file))


def _write_pt2(program: Any, file: Path, description: Description) -> None:
    torch.export.save(program, file, extra_files={f"{KEY}.json": description.to_json()})


def _measure_errors(
    file: Path, runtime: str, module: Taps, names: tuple[str, ...], example: tuple[Tensor, ...]
) -> tuple[float, float]:
    """Largest absolute and relative error over taps, on three inputs (the example has two)."""
    # Another batch size than the example's: a graph that has it fixed is caught here.
    three = [torch.cat([x, x[:1]]) for x in example]
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


@contextmanager
def _replace_when_done(out: Path) -> Iterator[Path]:
    """A file beside `out` that takes its place when all went well."""
    try:
        # `replacing` would make a missing folder; a mistyped --out is refused.
        out.parent.stat()
        # torch.export.save wants this suffix.
        with replacing(out, suffix=out.suffix or ".pt2") as partial:
            yield partial
    except OSError as error:
        raise EngineError(
            "the engine cannot be written",
            where=str(out),
            found=error.strerror or str(error),
            fix="free space or choose another --out",
        ) from None


@contextmanager
def _explain_failures(name: str) -> Iterator[None]:
    """Exporters print pages and raise anything; of that, one error with the cause's first line is left."""
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RestuningError:
        raise
    except Exception as error:  # noqa: BLE001 (runtimes and exporters raise anything)
        # Exporters wrap the error that says something in several that do not.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        words = (str(cause).strip().splitlines() or [""])[0]
        raise EngineError(
            "the backbone cannot be exported",
            where=name,
            found=f"{type(cause).__name__}: {words[:300]}",
            fix="another --engine, or the PyTorch backbone",
        ) from None
    finally:
        logging.disable(quiet)

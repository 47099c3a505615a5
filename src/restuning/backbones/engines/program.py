"""Modules as files that other runtimes run: an ONNX file or a `torch.export` program, with a text beside the graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import EngineError, RestuningError, require
from restuning._files import replacing
from restuning.backbones.backbone import Backbone

RUNTIMES = ("onnx", "pt2")
_OUTPUT, _APART = "output number ", " in the graph"
"""Names that no exporter gives, of outputs until they have theirs, and of what has their names."""
LARGEST = 2 * 2**30 - 2**20
"""Bytes of one ONNX file (protobuf's limit), with room for the graph itself."""


def input_names(backbone: Backbone) -> tuple[str, ...]:
    """What the inputs of its file are called: as the backbone's own, or "input"."""
    return tuple(backbone.kwargs) or ("input",)


def make_two_inputs(backbone: Backbone) -> tuple[Tensor, ...]:
    """Two inputs: one alone would fix the batch size. The second text ends in padding."""
    noise = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(2, *x.shape[1:], generator=noise) for x in backbone.example)
    kwargs = {name: torch.cat([x, x]) for name, x in backbone.kwargs.items()}
    if "attention_mask" in kwargs:
        kwargs["attention_mask"][1, -1] = 0
    return (*args, *kwargs.values())


def make_three(example: Sequence[Tensor]) -> list[Tensor]:
    """Another batch size than the example's: a graph that has it fixed is caught by it."""
    return [torch.cat([x, x[:1]]) for x in example]


def trace(module: nn.Module, example: tuple[Tensor, ...], *, any_length: bool) -> Any:
    """The program of a module that takes its inputs by position.

    Args:
        module: In eval mode.
        example: Inputs, a batch of two.
        any_length: Whether the second axis is free as well, as that of texts.
    """
    free = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(range(x.dim() if any_length else 1), free) for x in example)
    return torch.export.export(module, example, dynamic_shapes={"args": shapes})


def write_onnx(
    program: Any,
    file: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
    *,
    int8: bool = False,
) -> None:
    """Write one ONNX file, weights inside.

    Raises:
        EngineError: It would be larger than 2 GiB.
        MissingExtraError: `onnx` or `onnxscript` is not installed.
    """
    onnx = require("onnx", "onnx", "exporting to ONNX")
    require("onnxscript", "onnx", "exporting to ONNX")
    # Protocol buffers end at 2 GiB; weights beside the file would be a second file to lose.
    size = sum(p.numel() * p.element_size() for p in program.state_dict.values())
    if size > LARGEST:
        raise EngineError(
            "the weights are too large for one ONNX file",
            where=str(file),
            found=f"{size / 2**30:.1f} GiB of weights, at most 2",
            fix="export it as pt2",
        )
    made: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=list(inputs),
        # Names that nothing else in a graph has: a task may be called as one of its nodes is.
        output_names=[f"{_OUTPUT}{number}" for number in range(len(outputs))],
    )
    made.save(str(file), external_data=False)
    if int8:
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
    _name_outputs(graph.graph, outputs)
    onnx.helper.set_model_props(graph, dict(metadata))
    onnx.save(graph, str(file))


def _name_outputs(graph: Any, outputs: Sequence[str]) -> None:
    """Give outputs their names; whatever else is called so gets another."""
    names = {name: f"{name}{_APART}" for name in outputs}
    names |= {f"{_OUTPUT}{number}": name for number, name in enumerate(outputs)}
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    for value in (*graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)


def write_pt2(program: Any, file: Path, metadata: Mapping[str, str]) -> None:
    """Write a `torch.export` program; texts of `metadata` lie in it as `KEY.json`."""
    texts = {f"{key}.json": text for key, text in metadata.items()}
    torch.export.save(program, file, extra_files=texts)


@contextmanager
def replace_when_done(out: Path) -> Iterator[Path]:
    """A file beside `out` that takes its place when all went well.

    Raises:
        EngineError: It cannot be written.
    """
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
def explain_failures(name: str, fix: str) -> Iterator[None]:
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
            fix=fix,
        ) from None
    finally:
        logging.disable(quiet)


def run_once(
    runtime: str, file: Path, names: Sequence[str], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """What a file answers to one batch, in the order of its outputs.

    Raises:
        MissingExtraError: `onnxruntime` is not installed.
    """
    if runtime == "pt2":
        return list(torch.export.load(file).module()(*inputs))
    ort = require("onnxruntime", "onnx", "exporting to ONNX")
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    arrays = {n: x.contiguous().numpy() for n, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, arrays)]

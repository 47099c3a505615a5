"""Engine files opened: `onnx:FILE`, `openvino:FILE`, `pt2:FILE`. One row a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning._errors import EngineError, RestuningError, require
from restuning._files import sha256_of_file
from restuning.backbones.engines.description import KEY, Description
from restuning.host import Engine
from restuning.host.engine import Run

Opened = tuple[str, Callable[[Description], Run]]
"""The description in a file, and what makes it run."""


def open_engine(runtime: str, file: str | Path) -> Engine:
    """An engine from its file.

    Args:
        runtime: "onnx", "openvino" (both read ONNX files) or "pt2".
        file: What `restuning engine export` wrote.

    Raises:
        EngineError: No such file, or its runtime cannot read it.
        FormatError: It is not of ours, or malformed.
        MissingExtraError: The runtime is not installed.

    Threads: as many as torch has when it is opened.
    """
    engine, _ = open_described(runtime, file)
    return engine


def open_described(runtime: str, file: str | Path) -> tuple[Engine, Description]:
    """An engine and what its file says of it; see `open_engine`."""
    file = Path(file)
    if not file.is_file():
        raise EngineError(
            "no such engine file",
            where=str(file),
            fix="give its path, or make it with `restuning engine export`",
        )
    try:
        text, start = OPENERS[runtime](file)
        description = Description.from_json(text, str(file))
        run = start(description)
    except RestuningError:
        raise
    except Exception as error:  # noqa: BLE001 (runtimes and exporters raise anything)
        words = (str(error).strip().splitlines() or [""])[0]
        raise EngineError(
            "an engine cannot be opened",
            where=str(file),
            found=f"{type(error).__name__}: {words[:300]}",
            fix=f"export it again, or fetch the file again ({runtime} reads it)",
        ) from None
    if description.precision == "int8":
        # Not for speed: so that an input's taps do not depend on what it is run with.
        run = _run_rows_alone(run)
    digest = sha256_of_file(file)[:16]
    # Rounding differs between engines, and a task adapts to it.
    own = {"runtime": runtime, "precision": description.precision, "file": digest}
    engine = Engine(
        _explain_refusals(run, file),
        inputs=tuple(description.inputs),
        sites=description.sites,
        tokens=description.tokens,
        readout=description.readout,
        model=description.norm,
        fingerprint={**description.fingerprint, "engine": own},
        digest=digest,
        weights=description.digest,
    )
    return engine, description


def _open_onnx(file: Path) -> Opened:
    ort = require("onnxruntime", "onnx", f"the backbone onnx:{file}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        return [torch.from_numpy(value) for value in session.run(None, arrays)]

    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return text, lambda description: run


def _open_openvino(file: Path) -> Opened:
    openvino = require("openvino", "openvino", f"the backbone openvino:{file}")
    core = openvino.Core()
    model = core.read_model(str(file))
    framework = dict(model.get_rt_info().items()).get("framework", {})
    stored: Any = dict(framework).get(KEY, "")

    def start(description: Description) -> Run:
        compiled = core.compile_model(
            model,
            "CPU",
            # fp32 as in PyTorch: its own choice on new processors is bf16.
            {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"},
        )

        def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
            arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
            # A request of its own for every call: one request is not safe from several threads.
            request = compiled.create_infer_request()
            outputs = request.infer(arrays, share_inputs=True)
            return [torch.from_numpy(outputs[output].copy()) for output in compiled.outputs]

        return run

    return str(getattr(stored, "value", stored)), start


def _open_pt2(file: Path) -> Opened:
    extra = {f"{KEY}.json": ""}
    program = torch.export.load(file, extra_files=extra)
    text: Any = extra[f"{KEY}.json"]

    def start(description: Description) -> Run:
        module = program.module()

        def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
            return module(*(inputs[name] for name in description.inputs))

        return run

    return text.decode() if isinstance(text, bytes) else text or "", start


OPENERS: dict[str, Callable[[Path], Opened]] = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "pt2": _open_pt2,
}


def _run_rows_alone(run: Run) -> Run:
    """Each input alone: activations of one run share a scale, which other inputs must not change."""

    def alone(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        rows = len(next(iter(inputs.values())))
        parts = [run({n: v[row : row + 1] for n, v in inputs.items()}) for row in range(rows)]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    return alone


def _explain_refusals(run: Run, file: Path) -> Run:
    """Runtimes raise errors of their own for inputs of another size."""

    def checked(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        try:
            return run(inputs)
        except Exception as error:  # noqa: BLE001 (runtimes and exporters raise anything)
            words = (str(error).strip().splitlines() or [""])[0]
            shapes = ", ".join(f"{n} {tuple(v.shape)} {v.dtype}" for n, v in inputs.items())
            raise EngineError(
                "an engine refused its input",
                where=str(file),
                found=f"{shapes}; {type(error).__name__}: {words[:200]}",
                fix="`restuning info` says what it takes, or export one for this size",
            ) from None

    return checked

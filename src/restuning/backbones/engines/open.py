"""Engine files opened: `onnx:FILE`, `openvino:FILE`, `pt2:FILE`. One row a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning._errors import EngineError, RestuningError, WrongBackboneError, require
from restuning._files import sha256_of_file
from restuning.backbones.engines.description import Description
from restuning.backbones.engines.metadata import read_archive_text, read_onnx_text
from restuning.backbones.trust import opening
from restuning.host import Engine
from restuning.host.engine import Run

Start = Callable[[Path, Description], Run]
"""What opens the file with its runtime, once its description is known to be in order."""


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
    file = _require_file(file)
    read, start = OPENERS[runtime]
    try:
        # Before a runtime sees the file: what is not ours, or malformed, is not opened at all.
        description = Description.from_json(read(file), str(file))
        run = start(file, description)
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


def refuse_other_engine(name: str, fingerprints: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an engine that tasks were not trained on, by its bytes and before it is opened.

    Args:
        name: Of a backbone; others than engines pass.
        fingerprints: Of the backbones of tasks, by task.

    Raises:
        WrongBackboneError: The file is another.
        EngineError: There is no such file.
        BackboneError: A file names an engine that is opened only if the user does.
    """
    scheme, _, rest = name.partition(":")
    if scheme not in OPENERS or not rest:
        return
    with opening(name):
        digest = sha256_of_file(_require_file(rest))[:16]
    for task, fingerprint in fingerprints.items():
        own = fingerprint.get("engine")
        known = own.get("file") if isinstance(own, Mapping) else None
        if known != digest:
            raise WrongBackboneError(
                "this task was trained on another engine, which is not opened",
                where=task,
                found=f"{name} has the digest {digest}, the task's "
                + (f"engine {str(known)[:16]}" if known else "backbone is no engine"),
                fix="give the file it was trained on; any_backbone=True (--any-backbone) accepts "
                "another engine of the backbone",
            )


def _require_file(file: str | Path) -> Path:
    file = Path(file)
    # Not for devices and pipes either, which have no end.
    if not file.is_file():
        raise EngineError(
            "no such engine file",
            where=str(file),
            fix="give its path, or make it with `restuning engine export`",
        )
    return file


def _start_onnx(file: Path, description: Description) -> Run:
    ort = require("onnxruntime", "onnx", f"the backbone onnx:{file}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    description.check_graph(
        {value.name: value.shape for value in session.get_inputs()},
        [value.name for value in session.get_outputs()],
    )

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        return [torch.from_numpy(value) for value in session.run(None, arrays)]

    return run


@cache
def _openvino_core() -> Any:
    """One for all engines, for as long as the process lives.

    Where the last one is let go of in another thread than that which compiled its first model, OpenVINO unmaps
    the alternate signal stack of the latter, and the next signal there (SIGTERM, the end of a child) ends the
    process without a word.
    """
    import openvino

    return openvino.Core()


def _start_openvino(file: Path, description: Description) -> Run:
    require("openvino", "openvino", f"the backbone openvino:{file}")
    core = _openvino_core()
    model = core.read_model(str(file))
    description.check_graph(
        {
            value.get_any_name(): [
                side.get_length() if side.is_static else None for side in value.get_partial_shape()
            ]
            for value in model.inputs
        },
        [value.get_any_name() for value in model.outputs],
    )
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


def _start_pt2(file: Path, description: Description) -> Run:
    module = torch.export.load(file).module()

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return module(*(inputs[name] for name in description.inputs))

    return run


OPENERS: dict[str, tuple[Callable[[Path], str], Start]] = {
    "onnx": (read_onnx_text, _start_onnx),
    "openvino": (read_onnx_text, _start_openvino),
    "pt2": (read_archive_text, _start_pt2),
}
"""By runtime: what reads the description alone, and what opens the file then."""


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

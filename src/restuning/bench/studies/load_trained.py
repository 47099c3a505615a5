"""Trained tasks of a grid that was run with `--keep`, loaded again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from restuning._errors import FormatError
from restuning._files import refuse_special
from restuning.bench.bench import Bench
from restuning.bench.folder import read_run, task_folder
from restuning.bench.grid import GridRun


def load_trained(bench: Bench, run: GridRun) -> tuple[nn.Module, dict[str, Any]]:
    """The module of a final run with its trained weights, and the run's result.

    Args:
        bench: On the grid's protocol and folder.
        run: A final run that is done.

    Raises:
        FormatError: The run is not done, its task was not kept, or its weights do not fit.
    """
    result = read_run(bench.folder, run, bench.protocol)
    file = task_folder(bench.folder, run) / "weights.safetensors"
    if result["status"] != "done" or not file.exists():
        raise FormatError(
            "the task of this run was not kept",
            where=str(run),
            found=f"no {file}",
            fix="run the grid with --keep, in a folder of its own",
        )
    # Of `auto` it is the method that was chosen.
    entry = replace(run.entry, method=result["setting"].get("method", run.entry.method))
    try:
        refuse_special(file)
        weights = load_file(file)
        # `lora` was PEFT's before it was a method.
        if entry.method == "lora" and any("lora_A" in name for name in weights):
            entry = replace(entry, method="peft-lora")
        tuned = bench.build(entry, result["data"]["classes"], result["options"])
        task: Any = tuned.task
        # Of a rival only trained tensors were kept: the backbone's own are absent by right.
        absent = task.load_state_dict(weights, strict=False).missing_keys
    except (OSError, SafetensorError, RuntimeError) as error:
        raise FormatError(
            "kept weights cannot be read",
            where=str(file),
            found=str(error)[:200],
            fix="run the grid again with --keep",
        ) from None
    # What must have been there; a file that lost one would be answered at random, silently.
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    if trained & set(absent):
        raise FormatError(
            "kept weights are incomplete",
            where=str(file),
            found=f"without {min(trained & set(absent))}",
            fix="run the grid again with --keep",
        )
    return tuned.eval(), result

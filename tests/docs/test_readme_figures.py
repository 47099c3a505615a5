"""The figures of the README's table beside LoRA are those of the committed results."""

import json
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LORA, INLINE, BYPASS, MIXING = range(1, 5)
"""Columns of the table."""


def cells(name):
    """The figures of the row that begins so."""
    (line,) = (each for each in README.splitlines() if each.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def row(name, key, value):
    return next(each for each in result(name)["rows"] if each[key] == value)


def test_accuracy_and_time_are_those_of_the_shared_tasks():
    rows = runpy.run_path(str(ROOT / "recipes" / "shared_tasks" / "page.py"))["rows"]()
    of = {(line[0], line[1]): line for line in rows}
    wanted = [
        of["lora", "10"],
        of["res-tuning:rank=6", "10"],
        of["res-tuning-bypass", "40"],
        of["mixing-bypass", "40"],
    ]
    assert cells("[accuracy]")[1:] == [f"{line[-3]} %" for line in wanted]
    assert cells("processor time")[1:] == [line[-2] for line in wanted]


def test_memory_and_time_of_a_step_are_those_of_its_benchmark():
    memory, time = cells("[memory]"), cells("time of that step")
    for column, mode in ((LORA, "lora"), (INLINE, "res-tuning"), (BYPASS, "res-tuning-bypass")):
        measured = row("step-cpu", "mode", mode)
        assert memory[column] == f"{measured['peak_bytes_above_weights'] / 2**20:.0f} MiB"
        assert time[column] == f"{measured['step_seconds']['median']:.1f} s"


def test_whole_runs_and_many_tasks_are_those_of_their_benchmarks():
    whole = cells("[whole training]")
    lora = row("whole-run-cpu", "method", "PEFT LoRA r8")
    assert lora["extrapolated"] and whole[LORA] == f"{lora['seconds'] / 3600:.1f} h"
    stored = row("whole-run-cpu", "method", "cached bypass")
    assert whole[BYPASS] == f"{stored['seconds'] / 60:.1f} min"
    many, tasks = row("many-tasks-cpu", "model", "vit_base_patch16_224"), cells("[19 tasks]")
    inline = many["extrapolated_over_backbone"]["19 Res-Tuning models"]
    assert tasks[INLINE] == f"{inline:.1f}"
    assert tasks[BYPASS] == f"{1 + many['bank_alone_over_backbone']['bank of 19']:.3f}"


def test_the_commands_beside_the_figures_are_those_that_measured_them():
    for name in ("step-cpu", "whole-run-cpu", "many-tasks-cpu"):
        assert re.sub(r"\s+", " ", README).count(f"`{result(name)['command']}`") == 1


def test_means_at_the_backbone_s_own_size_are_those_of_the_shared_tasks():
    page = runpy.run_path(str(ROOT / "recipes" / "shared_tasks" / "page.py"))
    every = page["TASKS"] + page["OTHERS"]
    rows = page["own_size"](page["OWN_SIZE"][:1], every, (every,), cost=False)
    mean = {line[0]: line[-1] for line in rows}
    said = re.sub(r"\s+", " ", README)
    assert f"linear probing {mean['linear']} %" in said
    for name in ("ridge", "res-tuning-bypass", "ensemble"):
        assert f"`{name}` {mean[name]} %" in said

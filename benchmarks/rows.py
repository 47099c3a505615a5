"""Rows that are measured one by one, each in a process of its own, and written as soon as they are.

For a machine that is there for some minutes: a row has a bound of seconds, one that fails or dies
costs itself, and a second call goes on with those that are missing. Processes are forked from one
that has imported what they need and has not touched the device, so that a row begins in a moment.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

IMPORTED = ("torch", "timm", "restuning.methods", "restuning.features", "restuning.training")
"""Before rows are forked."""

ON_A_CPU = ("peft", "diffusers.models.unets.unet_2d_condition")
"""Likewise; these import bitsandbytes, which begins to use a GPU, and what has begun to use one cannot be
forked."""

START = "spawn" if os.name == "nt" else "forkserver"
"""How processes of rows begin."""

TOUCHED = 120
"""Seconds for the first process, which waits for the imports."""


@dataclass(frozen=True)
class Row:
    """One thing that is measured.

    Attributes:
        name: In the JSON.
        limit: Seconds after which its process is ended.
        measure: A function of a module, for another process must find it.
        given: Its arguments.
    """

    name: str
    limit: float
    measure: Callable[..., Mapping[str, Any]]
    given: tuple[Any, ...] = ()


Claims = Callable[[Mapping[str, Mapping[str, Any]]], Sequence[Mapping[str, Any]]]
"""Rows by name to targets."""


def begin(device: str) -> str:
    """Import what rows need before the first of them; how their processes begin on this device.

    Where one that was forked cannot use the device, all are started anew and import for themselves.
    """
    multiprocessing.set_forkserver_preload([*IMPORTED, *(ON_A_CPU if device == "cpu" else ())])
    # Asking whether there is a GPU would begin to use it, were it not asked of its driver's library.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    touched = measure_apart(Row("begin", TOUCHED, touch, (device,)), 1, TOUCHED)
    if isinstance(touched, dict):
        return START
    print(f"rows are started anew, which takes longer: {touched}", flush=True)
    return "spawn"


def touch(device: str) -> dict[str, Any]:
    """Use the device once."""
    import torch

    return {"sum": torch.ones(2, device=device).sum().item()}


def measure_missing(
    args: argparse.Namespace, rows: Sequence[Row], what: str, claims: Claims, start: str = START
) -> dict[str, Any]:
    """Measure the rows that the file at `args.out` lacks, and write it after each.

    Args:
        args: With `again`, names of rows that are measured in any case, and `minutes`, after which no
            row begins and the one that runs is ended, to be measured by the next call.
        rows: In order.
        what: That they say.
        claims: Of the rows that are there.
        start: How their processes begin (`begin`).

    Returns:
        What was written.
    """
    names = [row.name for row in rows]
    if unknown := [name for name in args.again if name not in names]:
        raise SystemExit(f"no row {', '.join(unknown)}; there are: {', '.join(names)}")
    found, skipped = _read(args)
    end = time.monotonic() + 60 * args.minutes

    def save(told: bool) -> dict[str, Any]:
        there = {name: found[name] for name in names if name in found}
        return common.write(
            args,
            what,
            told=told,
            tiny=args.tiny,
            rows=list(there.values()),
            not_measured={name: skipped[name] for name in names if name in skipped},
            missing=[name for name in names if name not in found and name not in skipped],
            targets=[] if args.tiny else list(claims(there)),
        )

    for row in rows:
        if row.name not in args.again and (row.name in found or row.name in skipped):
            continue
        left = end - time.monotonic()
        if left <= 0:
            break
        before = time.monotonic()
        measured = measure_apart(row, args.threads, min(row.limit, left), start)
        took = time.monotonic() - before
        if measured is None and left < row.limit:
            # It was not its own time that was up.
            print(f"{row.name:40s} ended with the time of this call", flush=True)
            break
        if measured is None:
            measured = f"took longer than {row.limit:g} s"
        for known in (found, skipped):
            known.pop(row.name, None)
        if isinstance(measured, str):
            skipped[row.name] = measured
        else:
            day = time.strftime("%Y-%m-%d")
            found[row.name] = {"row": row.name, **measured, "row_seconds": took, "measured_on": day}
        print(f"{row.name:40s} {took:6.1f} s  {skipped.get(row.name, '')}", flush=True)
        save(told=False)
    written = save(told=True)
    if written["missing"]:
        print(f"missing: {', '.join(written['missing'])}; the same command goes on with them")
    return written


def _read(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Rows of an earlier call, and why others were not measured; of the same machine and versions only."""
    if not args.out.exists():
        return {}, {}
    before = json.loads(args.out.read_text(encoding="utf-8"))
    now = {**common.context(args), "tiny": args.tiny}
    for name, value in now.items():
        # Numbers of two machines, or of two versions, are no ratios.
        if before.get(name) != value:
            raise SystemExit(
                f"{args.out} holds rows that were measured otherwise: {name} {before.get(name)}, here "
                f"{value}; --out another file, or remove it to measure all rows again"
            )
    return {row["row"]: row for row in before["rows"]}, dict(before["not_measured"])


def measure_apart(
    row: Row, threads: int, limit: float, start: str = START
) -> dict[str, Any] | str | None:
    """A row, measured in a process of its own.

    Args:
        row: Which.
        threads: Of torch in that process.
        limit: Seconds that it may take.
        start: How the process begins.

    Returns:
        Its values, or why there are none; None if it took longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        context: Any = multiprocessing.get_context(start)
        process = context.Process(target=_measure, args=(row, threads, str(file)))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            return None
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        return f"its process ended with {process.exitcode}"


def _measure(row: Row, threads: int, file: str) -> None:
    """In the process of a row."""
    # A row whose benchmark was killed would hold the device, and slow the next call's.
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    # What libraries say is not the benchmark's.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        found: dict[str, Any] | str = dict(row.measure(*row.given))
    except BaseException as error:  # noqa: BLE001 (whatever a library raises is a row without values)
        if not isinstance(error, ImportError):
            traceback.print_exc(limit=-3)
        words = (str(error).strip().splitlines() or [""])[0]
        found = f"{type(error).__name__}: {words}"[:300]
    aside = Path(f"{file}.partial")
    aside.write_text(json.dumps(found), encoding="utf-8")
    aside.replace(file)

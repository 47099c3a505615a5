"""What the benchmarks share: peaks, times and ratios, rows in their own process, JSON with context.

Every file beside this one is one command, `python benchmarks/NAME.py [--device cuda]`, and leaves
`benchmarks/results/NAME-cpu.json`. Times are medians with their spread, ratios are taken within one
run, and what is compared in time is run in turns (a, b, a, b, ...), so that a busy machine slows
both. Where memory counts each row is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"

GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""glibc returns freed memory at once: without it peaks on CPU wander threefold."""

KEEP = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""glibc keeps freed memory: for rows where time counts, page faults are not what is measured."""

PACKAGES = (
    "restuning",
    "torch",
    "timm",
    "numpy",
    "peft",
    "ms-swift",
    "scikit-learn",
    "onnxruntime",
    "openvino",
    "torchao",
    "bitsandbytes",
)


def arguments(doc: str, file: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `file` is the benchmark's `__file__`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/NAME-DEVICE.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.set_defaults(file=Path(file))
    return parser


def asked(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *options: str
) -> argparse.Namespace:
    """What a benchmark is given by another: the other's device and threads, and options of its own."""
    shared = ["--device", args.device, "--threads", str(args.threads)]
    return parser.parse_args([*shared, *options])


def started(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, fix the number of threads, and work out where the result goes."""
    import torch

    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out = args.out or RESULTS / f"{args.file.stem.replace('_', '-')}-{args.device}.json"
    return args


def apart(
    args: argparse.Namespace, one: str, allocator: Mapping[str, str] = GIVE_BACK
) -> dict[str, Any]:
    """Run one row of a benchmark in a process of its own.

    The process is the same file with `--one`, and prints its row as the last line, as JSON.

    Args:
        args: As the parent got them.
        one: Which row.
        allocator: Environment of glibc's malloc.

    ms-swift brings so many packages that one may want it in an environment of its own: rows with
    "swift" in their name run under `$SWIFT_PYTHON` where that is set.

    Returns:
        The row with the versions it ran under, or `{"not_measured": reason}`.
    """
    hidden = ("file", "one", "out")
    options = []
    for name, value in vars(args).items():
        if name in hidden or value is None or value is False:
            continue
        options.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list):
            options += map(str, value)
        elif value is not True:
            options.append(str(value))
    environment = {**os.environ, **allocator, "OMP_NUM_THREADS": str(args.threads)}
    python = os.environ.get("SWIFT_PYTHON", sys.executable) if "swift" in one else sys.executable
    done = subprocess.run(
        [python, str(args.file), *options, "--one", one],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {"not_measured": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def now_bytes(device: str) -> int:
    """Memory of this process now: resident on CPU, allocated on a GPU."""
    import torch

    if device == "cuda":
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def peak_bytes(device: str) -> int:
    """Highest memory of this process since `reset_peak`."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: str) -> None:
    """Peaks count from here (Linux or a GPU; elsewhere from the start of the process)."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_of(run: Callable[[], Any], device: str) -> int:
    """Bytes by which memory rose above what was held before, at its highest."""
    reset_peak(device)
    before = now_bytes(device)
    run()
    finish(device)
    return peak_bytes(device) - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def saved_bytes(run: Callable[[], Any], parameters: Sequence[Any]) -> int:
    """Bytes that autograd saves for backward, parameters left out, shared storage counted once."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    del loss
    return sum(seen.values())


def finish(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of one call."""
    finish(device)
    start = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: str, warm: int = 1
) -> dict[str, list[float]]:
    """Times of several things, run in turns; the order turns around every round."""
    for _ in range(warm):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in order:
            times[name].append(seconds(runs[name], device))
    return times


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and number."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def paired(times: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Ratio of two things run in turns: the median of the ratios of each round."""
    return spread([t / b for t, b in zip(times, base, strict=True)])


def machine(device: str) -> dict[str, Any]:
    """What it was measured on."""
    import torch

    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    name = next((ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), "")
    flags = next((ln.split(":")[1].split() for ln in lines if ln.startswith("flags")), [])
    found = {
        "cpu": name or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "bf16": [f for f in ("avx512_bf16", "amx_bf16", "bf16") if f in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def command(args: argparse.Namespace) -> str:
    """The line that was run."""
    return shlex.join(["python", f"benchmarks/{args.file.name}", *sys.argv[1:]])


def target(what: str, value: float | None, limit: float, *, at_least: bool = False) -> dict:
    """A claim beside its measurement: `held` is None where nothing was measured."""
    held = None if value is None else bool(value >= limit if at_least else value <= limit)
    return {
        "what": what,
        "measured": value,
        "limit": limit,
        "sense": ">=" if at_least else "<=",
        "held": held,
    }


def context(args: argparse.Namespace) -> dict[str, Any]:
    """What numbers hang on: the device, the threads, the machine and the versions."""
    # Not at the top: what is measured starts without it.
    from restuning.bench.measure import read_versions

    return {
        "device": args.device,
        "threads": args.threads,
        "machine": machine(args.device),
        "versions": read_versions(PACKAGES),
    }


def write(
    args: argparse.Namespace, what: str, *, told: bool = True, **content: Any
) -> dict[str, Any]:
    """Write a result with its context to `args.out`, and print its targets unless it is not the last."""
    result = {
        "what": what,
        "command": command(args),
        **context(args),
        "measured_on": time.strftime("%Y-%m-%d"),
        **content,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Aside and renamed: who is killed in between leaves what was there.
    aside = args.out.with_name(f"{args.out.name}.partial")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(args.out)
    if told:
        tell(args, content)
    return result


def tell(args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Print the targets of a result, and where it lies."""
    for row in content.get("targets", ()):
        found = "not measured" if row["measured"] is None else f"{row['measured']:.4g}"
        mark = {True: "held", False: "MISSED", None: ""}[row["held"]]
        print(f"{row['what']}: {found} ({row['sense']} {row['limit']}) {mark}")
    print(f"left in {args.out}")

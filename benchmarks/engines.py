"""Engines: images a second of one backbone through PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/engines.py

ViT-S/16 at 224 px with random weights; the class token of all 13 taps is what every engine gives.
Engines run in turns (a, b, a, b, ...), with one thread and with two, each number of threads in a
process of its own; what is compiled (half a minute) only with one. Errors are on random images,
relative to PyTorch in fp32. ONNX Runtime's int8 and torchao's with activations compute products in
int8; torchao's int8 weights (`NAME+int8`) and bitsandbytes' nf4 compute in fp32: they save memory.

With `--device cuda` PyTorch runs there, in bf16 as well, and so do the program of `torch.export` and ONNX
Runtime, where it is built for that; engines that `restuning` opens compute on the CPU and are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import KEEP, apart, arguments, in_turns, paired, spread, started, target, write

FASTER = 1.5
"""What the int8 engine must reach over PyTorch in fp32, eager."""
KEY, EAGER = "ONNX Runtime int8", "PyTorch fp32, eager"
PRECISIONS, THREADS = ("fp32", "int8"), (1, 2)


def one(args: Any) -> dict[str, Any]:
    """All engines in turns, with this number of threads."""
    import copy

    import torch

    from restuning import Host, Needs
    from restuning.backbones import load_backbone, open_engine
    from restuning.backbones.variants import quantize

    torch.manual_seed(0)
    loaded = load_backbone(f"timm:{args.model}", random=True)
    loaded.model.to(args.device)
    example = [value.to(args.device) for value in loaded.example]
    plain = copy.deepcopy(loaded.model)
    host = Host(loaded.model, *example)
    needs = Needs(host.sites.taps, "cls")
    images = torch.randn(args.batch, *example[0].shape[1:], device=args.device)
    runs: dict[str, Any] = {EAGER: lambda: host.features(images, keep=needs)}
    missing: dict[str, str] = {}

    def dynamic(model: Any) -> None:
        import torchao.quantization as ao

        ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())

    changes = {
        "torchao int8 weights": lambda model: quantize(model, ("int8",), ""),
        "torchao int8 weights and activations": dynamic,
        "bitsandbytes nf4": lambda model: quantize(model, ("nf4",), ""),
    }
    if args.threads == 1 or args.device == "cuda":
        changes["PyTorch fp32, compiled"] = lambda model: None
    if args.device == "cuda":
        changes["PyTorch bf16, eager"] = lambda model: model.to(torch.bfloat16)
    for name, change in changes.items():
        try:
            model = copy.deepcopy(plain)
            change(model)
            other = Host(model, *example)
            if "compiled" in name:
                model.compile()
            other.features(images, keep=needs)
            runs[name] = lambda other=other: other.features(images, keep=needs)
        except Exception as error:  # noqa: BLE001 (a library that is absent is a row without values)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for precision in PRECISIONS if args.device == "cpu" else ():
        for runtime, name in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")):
            engine = open_engine(runtime, Path(args.engines) / f"{precision}.onnx")
            runs[f"{name} {precision}"] = lambda engine=engine: engine.features(images)
    for name, start in on_a_gpu(args, images, needs).items() if args.device == "cuda" else ():
        try:
            runs[name] = start()
            runs[name]()
        except Exception as error:  # noqa: BLE001 (likewise)
            runs.pop(name, None)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    first = host.features(images, keep=needs)[needs.taps[-1]]
    errors = {}
    for name, run in runs.items():
        errors[name] = float((run()[needs.taps[-1]].float() - first).norm() / first.norm())
    times = in_turns(runs, args.rounds, args.device)
    return {
        "threads": args.threads,
        "rows": {
            name: {
                "images_per_second": args.batch / spread(t)["median"],
                "faster_than_eager": paired(times[EAGER], t),
                "seconds": spread(t),
                "relative_error": errors[name],
            }
            for name, t in times.items()
        },
        "not_measured": missing,
    }


def on_a_gpu(args: Any, images: Any, needs: Any) -> dict[str, Any]:
    """What opens the exported files on the GPU, by name: each gives a function without arguments."""
    import torch

    folder = Path(args.engines)

    def onnx() -> Any:
        import onnxruntime as ort

        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise RuntimeError("this onnxruntime is not built for CUDA")
        session = ort.InferenceSession(
            str(folder / "fp32.onnx"), providers=["CUDAExecutionProvider"]
        )
        name = session.get_inputs()[0].name

        # From main memory and back, as an engine is run.
        def run() -> Any:
            values = session.run(None, {name: images.cpu().numpy()})
            taps = zip(needs.taps, values, strict=True)
            return {tap: torch.from_numpy(value).to(images.device) for tap, value in taps}

        return run

    def program() -> Any:
        from torch.export.passes import move_to_device_pass

        moved = move_to_device_pass(torch.export.load(folder / "fp32.pt2"), args.device).module()
        return lambda: dict(zip(needs.taps, moved(images), strict=True))

    return {"ONNX Runtime fp32, CUDA": onnx, "torch.export program, CUDA": program}


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--engines", help=argparse.SUPPRESS)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All engines in turns in this process, of files that are exported first."""
    with tempfile.TemporaryDirectory() as folder:
        args.engines = folder
        export(args)
        return one(args)


def export(args: argparse.Namespace) -> None:
    """Write the files that engines are opened from into `args.engines`."""
    import torch

    from restuning.backbones import export_engine, load_backbone

    torch.manual_seed(0)
    loaded = load_backbone(f"timm:{args.model}", random=True)
    folder = Path(args.engines)
    for precision in PRECISIONS if args.device == "cpu" else ("fp32",):
        export_engine(loaded, folder / f"{precision}.onnx", precision=precision)
    if args.device == "cuda":
        export_engine(loaded, folder / "fp32.pt2", runtime="pt2")


def main() -> None:
    """Both numbers of threads, and the JSON."""
    args = started(options())
    if args.one:
        print(json.dumps(one(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.engines = folder
        export(args)
        runs = []
        for args.threads in THREADS:
            runs.append(apart(args, "row", KEEP))
    rows = [run.get("rows", {}).get(KEY) for run in runs]
    found = [row and row["faster_than_eager"]["median"] for row in rows]
    write(
        args,
        f"{args.model}, batches of {args.batch}, class token of all taps, random weights",
        runs=runs,
        targets=[
            target(f"{KEY} over {EAGER}, {n} thread(s)", value, FASTER, at_least=True)
            for n, value in zip(THREADS, found, strict=True)
        ],
    )
    if args.device == "cpu":
        page(runs)


def page(runs: list[dict[str, Any]]) -> None:
    """The table in `docs/engines.md`."""
    file = Path(__file__).parents[1] / "docs" / "engines.md"
    begin, end = "<!-- speed: begin -->", "<!-- speed: end -->"
    before, _, rest = file.read_text(encoding="utf-8").partition(begin)
    lines = [
        "| | "
        + " | ".join(f"images/s, {n} thread{'s' * (n > 1)} | times eager" for n in THREADS)
        + " | relative error of the last tap |",
        "|---|" + "---:|" * (2 * len(THREADS) + 1),
    ]
    for name in runs[0]["rows"]:
        cells, error = [], 0.0
        for run in runs:
            row = run["rows"].get(name)
            times = "" if row is None else number(row["faster_than_eager"])
            cells += ["", ""] if row is None else [f"{row['images_per_second']:.1f}", times]
            error = error if row is None else row["relative_error"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {error:.1g} |")
    table, after = "\n".join(lines), rest.partition(end)[2]
    file.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def number(value: dict[str, Any]) -> str:
    """A ratio with its spread."""
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


if __name__ == "__main__":
    main()

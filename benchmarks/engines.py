"""Engines: images a second of one backbone through PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/engines.py

ViT-S/16 at 224 px with random weights; the class token of all 13 taps is what every engine gives.
Engines run in turns (a, b, a, b, ...), with one thread and with two, each number of threads in a
process of its own; what is compiled (half a minute) only with one. Errors are on random images,
relative to PyTorch in fp32. ONNX Runtime's int8 and torchao's with activations compute products in
int8; torchao's int8 weights (`NAME+int8`) and bitsandbytes' nf4 compute in fp32: they save memory.
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
    plain = copy.deepcopy(loaded.model)
    host = loaded.host()
    needs = Needs(host.sites.taps, "cls")
    images = torch.randn(args.batch, *loaded.example[0].shape[1:])
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
    if args.threads == 1:
        changes["PyTorch fp32, compiled"] = lambda model: None
    for name, change in changes.items():
        try:
            model = copy.deepcopy(plain)
            change(model)
            other = Host(model, *loaded.example)
            if "compiled" in name:
                model.compile()
            other.features(images, keep=needs)
            runs[name] = lambda other=other: other.features(images, keep=needs)
        except Exception as error:  # noqa: BLE001 (a library that is absent is a row without values)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for precision in PRECISIONS:
        for runtime, name in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")):
            engine = open_engine(runtime, Path(args.engines) / f"{precision}.onnx")
            runs[f"{name} {precision}"] = lambda engine=engine: engine.features(images)
    first = host.features(images, keep=needs)[needs.taps[-1]]
    errors = {}
    for name, run in runs.items():
        errors[name] = float((run()[needs.taps[-1]] - first).norm() / first.norm())
    times = in_turns(runs, args.rounds, "cpu")
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


def main() -> None:
    """Both numbers of threads, and the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--engines", help=argparse.SUPPRESS)
    args = started(parser)
    if args.one:
        print(json.dumps(one(args)))
        return
    import torch

    from restuning.backbones import export_engine, load_backbone

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        loaded = load_backbone(f"timm:{args.model}", random=True)
        args.engines = folder
        for precision in PRECISIONS:
            export_engine(loaded, Path(folder) / f"{precision}.onnx", precision=precision)
        runs = []
        for args.threads in THREADS:
            runs.append(apart(args, "row", KEEP))
    found = [r["rows"][KEY]["faster_than_eager"]["median"] if "rows" in r else None for r in runs]
    write(
        args,
        f"{args.model}, batches of {args.batch}, class token of all taps, random weights",
        runs=runs,
        targets=[
            target(f"{KEY} over {EAGER}, {n} thread(s)", value, FASTER, at_least=True)
            for n, value in zip(THREADS, found, strict=True)
        ],
    )
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

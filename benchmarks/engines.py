"""Engines: images a second of one backbone through PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/engines.py

ViT-S/16 at 224 px with random weights; the class token of all 13 taps is what every engine gives.
Engines run in turns (a, b, a, b, ...), with one thread and with two, each number of threads in a
process of its own. Errors are those of the last tap on random images, relative to PyTorch in fp32.
`int8`: ONNX Runtime and torchao's dynamic form compute products in int8; torchao's weight-only form
(`NAME+int8`) and bitsandbytes' nf4 unpack weights and compute in fp32: they save memory, not time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import apart, arguments, in_turns, paired, spread, started, target, write

FASTER = 1.5
"""What the int8 engine must reach over PyTorch in fp32, eager."""
KEY = "ONNX Runtime int8"


def one(args: Any) -> dict[str, Any]:
    """All engines in turns, with this number of threads."""
    import copy

    import torch

    from restuning import Needs
    from restuning.backbones import export_engine, load_backbone, open_engine
    from restuning.backbones.forms import apply

    torch.manual_seed(0)
    loaded = load_backbone(f"timm:{args.model}", random=True)
    plain = copy.deepcopy(loaded.model)
    host = loaded.host()
    needs = Needs(host.sites.taps, "cls")
    images = torch.randn(args.batch, *loaded.example[0].shape[1:])
    runs: dict[str, Any] = {"PyTorch fp32, eager": lambda: host.features(images, keep=needs)}
    missing: dict[str, str] = {}

    def pytorch(name: str, change: Any, compiled: bool = False) -> None:
        from restuning import Host

        try:
            model = copy.deepcopy(plain)
            change(model)
            other = Host(model, *loaded.example)
            if compiled:
                model.compile()
            runs[name] = lambda: other.features(images, keep=needs)
            with torch.no_grad():
                runs[name]()
        except Exception as error:  # noqa: BLE001 (a library that is absent is a row without values)
            runs.pop(name, None)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    def dynamic(model: Any) -> None:
        import torchao.quantization as ao

        ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())

    pytorch("PyTorch fp32, compiled", lambda model: None, compiled=True)
    pytorch("torchao int8, weights", lambda model: apply(model, ("int8",), ""))
    pytorch("torchao int8, dynamic", dynamic)
    pytorch("torchao int8, dynamic, compiled", dynamic, compiled=True)
    pytorch("bitsandbytes nf4", lambda model: apply(model, ("nf4",), ""))
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            file = Path(folder) / f"{precision}.onnx"
            export_engine(loaded, file, precision=precision)
            for runtime, name in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")):
                engine = open_engine(runtime, file)
                runs[f"{name} {precision}"] = lambda engine=engine: engine.features(images)
        first = host.features(images, keep=needs)[needs.taps[-1]].float()
        errors = {}
        for name, run in runs.items():
            last = run()[needs.taps[-1]].float()
            errors[name] = float((last - first).norm() / first.norm())
        times = in_turns(runs, args.rounds, "cpu")
    base = times["PyTorch fp32, eager"]
    return {
        "threads": args.threads,
        "rows": {
            name: {"images_per_second": args.batch / spread(t)["median"], "seconds": spread(t),
                   "faster": paired(base, t), "relative_error": errors[name]}
            for name, t in times.items()
        },
        "not_measured": missing,
    }  # fmt: skip


def main() -> None:
    """Both numbers of threads, and the JSON."""
    import json

    parser = arguments(__doc__, __file__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    args = started(parser)
    if args.one:
        print(json.dumps(one(args)))
        return
    runs = []
    for threads in (1, 2):
        args.threads = threads
        runs.append(apart(args, "row"))
    faster = [r["rows"][KEY]["faster"]["median"] for r in runs if KEY in r.get("rows", {})]
    write(
        args, f"{args.model}, batches of {args.batch}, class token of all taps, random weights",
        runs=runs,
        targets=[target(f"{KEY} over PyTorch fp32 eager, {n} thread(s)", value, FASTER, at_least=True)
                 for n, value in zip((1, 2), faster, strict=False)],
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""One file of a backbone and many tasks: its time beside that of a file of the backbone alone.

    python benchmarks/export.py

ViT-S/16 at 224 px with random weights and 19 tasks of Res-Tuning-Bypass in one ONNX file (`restuning export`), against
an ONNX file of the same backbone that gives its feature. ONNX Runtime runs both in turns (a, b, a, b, ...), the same image.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import arguments, in_turns, paired, spread, started, target, write

TASKS, CLASSES = 19, 10
MORE = 1.05
"""What the file with the tasks may take of the other's time."""
SAME = 1e-4
"""What its answers may differ from PyTorch's."""
BATCHES = (1, 8)


def main() -> None:
    """Both files, both batches, and the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=15)
    args = started(parser)
    import onnxruntime
    import torch

    from restuning import Predictor, export_tasks, load_backbone, methods
    from restuning.backbones.engines.program import make_two_inputs, trace, write_onnx

    torch.manual_seed(0)
    backbone = load_backbone(f"timm:{args.model}", random=True)
    host = backbone.host()
    tasks = {
        f"task {n}": methods.build("res-tuning-bypass", host, num_classes=CLASSES)
        for n in range(TASKS)
    }
    for task in tasks.values():
        with torch.no_grad():
            for p in task.parameters():
                p.add_(0.05 * torch.randn_like(p))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        alone, whole = Path(folder) / "alone.onnx", Path(folder) / "whole.onnx"

        class Backbone(torch.nn.Module):
            def forward(self, *args: Any) -> Any:
                return backbone.model(*args)

        example = make_two_inputs(backbone)
        with torch.no_grad():
            program = trace(Backbone().eval(), example, any_length=False)
        write_onnx(program, alone, ["input"], ["feature"], {})
        done = export_tasks(Predictor(backbone, tasks, host=host, device="cpu"), whole)
        sessions = {
            name: onnxruntime.InferenceSession(str(file), options)
            for name, file in (("backbone alone", alone), ("with tasks", whole))
        }
        for batch in BATCHES:
            fed = {"input": torch.randn(batch, *example[0].shape[1:]).numpy()}
            runs = {n: lambda s=s, fed=fed: s.run(None, fed) for n, s in sessions.items()}
            times = in_turns(runs, args.rounds, "cpu")
            rows.append(
                {
                    "batch": batch,
                    "seconds": {name: spread(t) for name, t in times.items()},
                    "times the backbone": paired(times["with tasks"], times["backbone alone"]),
                }
            )
        sizes = {"backbone alone": alone.stat().st_size, "with tasks": whole.stat().st_size}
    write(
        args,
        f"{args.model}, {TASKS} tasks of res-tuning-bypass in one ONNX file, random weights",
        runs=rows,
        bytes=sizes,
        largest_difference=done.largest,
        targets=[
            target("largest difference from PyTorch", done.largest, SAME, at_least=False),
            *(
                target(
                    f"batch of {row['batch']}: time over the backbone's alone",
                    row["times the backbone"]["median"],
                    MORE,
                    at_least=False,
                )
                for row in rows
            ),
        ],
    )


if __name__ == "__main__":
    main()

"""Makes the golden task folders of format 2: `python tests/system/golden/make.py`.

They stand for files that users already have, as do those of format 1, which the library of its day
wrote. Run it only for a new format, into new names.

Backbone, tasks and input are filled by whole numbers (no generator of random numbers, no sine):
every value is a fraction of 4096, so that all machines and all versions of torch agree to the bit.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from restuning import Host, Task, Tuned, methods, save
from restuning.bypass import Ridge

HERE = Path(__file__).parent
FORMAT1 = ("format1_inline", "format1_bypass")
METHODS = {
    "format2_inline": ("res-tuning", {"rank": 2}),
    "format2_bypass": ("res-tuning-bypass", {"rank": 2}),
    "format2_mixing": ("mixing-bypass", {"width": 4, "heads": 2, "rank": 2}),
    "format2_ridge": ("ridge", {}),
}
SEALED = {"format2_sealed": METHODS["format2_bypass"]}
"""As written since task files have digests of their weights, of themselves and of their backbone."""
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
LABELS = ["ant", "bee", "cat"]
PREPROCESSING = {"size": [16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
EXAMPLES = 4


def whole_numbers(shape: tuple[int, ...], start: int) -> Tensor:
    """Fractions of 1024 from -0.49 to 0.49, without a pattern that matters."""
    count = torch.Size(shape).numel()
    values = [((i + 1) * 7919 + start * 104_729) % 1009 - 504 for i in range(count)]
    return (torch.tensor(values, dtype=torch.float32) / 1024).reshape(shape)


def fill(module: nn.Module, start: int) -> None:
    """Every parameter by its place in the order of names, then buffers; norms stay near one."""
    with torch.no_grad():
        named = [*sorted(module.named_parameters()), *sorted(module.named_buffers())]
        for place, (name, p) in enumerate(named):
            # A quarter: larger values close every gelu, and then weights behind it mean nothing.
            p.copy_(whole_numbers(tuple(p.shape), start + place) / 4)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)


def example() -> Tensor:
    return whole_numbers((EXAMPLES, 3, 16, 16), start=1000) * 4


def host() -> Host:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**SIZES, num_classes=0)
    fill(model, start=0)
    return Host(model, example()[:1])


def task_of(method: str, options: dict, on: Host) -> Task:
    task = methods.build(method, on, num_classes=len(LABELS), **options)
    if method == "ridge":
        # As it was built when the file was written: three kinds that count alike, of these taps.
        task.side = Ridge(["block.1", "block.2"], [SIZES["embed_dim"]] * 2, len(LABELS))
    task.labels = LABELS
    fill(task, start=500)
    return task.eval()


def logits(on: Host, task: Task) -> Tensor:
    with torch.no_grad():
        return Tuned(on, task).eval()(example())


def make(to: Path, tasks: dict = METHODS) -> None:
    on, answers = host(), {}
    for name, (method, options) in tasks.items():
        task = task_of(method, options, on)
        save(task, on, to / f"{name}.task", backbone="golden", preprocessing=PREPROCESSING)
        answers[name] = logits(on, task).tolist()
    if tasks is METHODS:
        text = json.dumps(answers, indent=1) + "\n"
        (to / "logits_format2.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(HERE)

"""Memory of one training step on networks of 7, 70 and 400 billion parameters, of which none is there.

    python benchmarks/billions.py

Llama-type architectures (as Llama 2 7B and 70B and Llama 3.1 405B, without a language head) in
bf16, one text of 2048 tokens, a head of 100 classes on the last token. Forecast from shapes on any
machine, in minutes and less than a gigabyte. With 8-bit and 4-bit weights the linear maps of the
layers are counted at their packed size, by arithmetic, and one map unpacked to bf16 at a time; the
rest stays in bf16. Trained weights, gradients and AdamW's moments have the type the method's own
library gives them.

What a device holds of a backbone that is elsewhere is arithmetic as well: shared out with FSDP2 its share,
two layers whole (one runs, the next is fetched) and what stands in no layer; offloaded by Accelerate the
largest module that has weights of its own. The tables are written into `docs/planning.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import arguments, peak_of, started, write

TOKENS = 2048
RANK = 8
CLASSES = 100
GROUP = 64
"""Weights that share a scale in 4 bits (bitsandbytes' NF4; its scales are 8 bits, and one fp32 a
256 of them)."""


DEVICES = 8
"""That share a backbone out among them."""

SIZES: dict[str, dict[str, int]] = {
    "7": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "70": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "400": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""By billions of parameters."""


def llama(size: str, layers: int | None = None) -> Any:
    """The network on `meta`, bf16, without the cache of generation."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    shape = {**SIZES[size], **({} if layers is None else {"num_hidden_layers": layers})}
    config = LlamaConfig(**shape, max_position_embeddings=4096, use_cache=False)
    with torch.device("meta"):
        return LlamaModel(config).to(torch.bfloat16).eval()


def packed_bytes(model: Any, bits: int) -> int:
    """Weights with the linear maps of the layers packed into 8 or 4 bits, and their scales."""
    from torch import nn

    total = 0
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for weight in model.parameters():
        if id(weight) not in linear:
            total += weight.numel() * 2
        elif bits == 8:
            # One fp32 scale a row.
            total += weight.numel() + 4 * weight.shape[0]
        else:
            groups = weight.numel() // GROUP
            total += weight.numel() // 2 + groups + 4 * (groups // 256)
    return total


def largest_map(model: Any) -> int:
    """Bytes of the largest linear map in bf16."""
    from torch import nn

    return max(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def with_head(model: Any) -> Any:
    """A classifier on the last token, as one module on `meta`."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.head = nn.Linear(
                model.config.hidden_size, CLASSES, dtype=torch.bfloat16, device="meta"
            )

        def forward(self, input_ids: Any) -> Any:
            return self.head(self.model(input_ids=input_ids).last_hidden_state[:, -1])

    return Classifier()


def lora(model: Any, checkpointing: bool) -> Any:
    """PEFT's LoRA on W_q and W_v."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
    with torch.device("meta"):
        tuned = get_peft_model(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return with_head(tuned)


def step_of(mode: str, size: str, layers: int | None) -> tuple[Any, Any]:
    """The forecast of one mode, and the backbone."""
    import torch

    import restuning
    from restuning import forecast

    model = llama(size, layers)
    ids = torch.arange(TOKENS).unsqueeze(0)
    if mode == "forward-only":
        return forecast.forecast_forward(model, {"input_ids": ids}, 1), model
    if mode.startswith(("full", "lora")):
        module = lora(model, "checkpointing" in mode) if "lora" in mode else with_head(model)
        return forecast.forecast_step(module, {"input_ids": ids}, 1), model
    method = "res-tuning" if mode.startswith("res-tuning") else "res-tuning-bypass"
    with forecast.AbsentWeights():
        host = restuning.Host(model, input_ids=ids[:, :8])
    task = restuning.methods.build(method, host, num_classes=CLASSES).to(torch.bfloat16)
    return forecast.forecast_task(
        host,
        task,
        {"input_ids": ids},
        1,
        form=next((f for f in ("cached", "checkpointing") if f in mode), "live"),
    ), model


MODES = (
    "forward-only",
    "full",
    "lora",
    "lora+checkpointing",
    "res-tuning",
    "res-tuning+checkpointing",
    "bypass",
    "cached-bypass",
)


def bytes_of(module: Any) -> int:
    """Of its weights."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def held(size: str, layers: int | None, above: int) -> dict[str, int]:
    """What one device holds for a bypass on a backbone that is elsewhere, by arithmetic.

    Args:
        size: Of the backbone.
        layers: As many, or all.
        above: What the step takes beside the backbone's weights.
    """
    model = llama(size, layers)
    whole, layer = bytes_of(model), bytes_of(model.layers[0])
    loose = whole - bytes_of(model.layers)
    own = (sum(p.numel() * 2 for p in m.parameters(recurse=False)) for m in model.modules())
    return {
        f"shared out among {DEVICES}": whole // DEVICES + 2 * layer + loose + above,
        "offloaded": max(own) + above,
    }


def main() -> None:
    """Forecast all rows, and write the JSON and the tables."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--layers", type=int, help="default all; the page is not written with fewer"
    )
    args = started(parser)
    rows: list[dict[str, Any]] = []

    def forecast_all() -> None:
        for size, mode in ((size, mode) for size in args.sizes for mode in MODES):
            step, model = step_of(mode, size, args.layers)
            moving = step.optimiser_bytes + step.input_bytes + step.above_bytes
            totals = {"bf16": step.total_bytes}
            for bits in (8, 4) if mode != "full" else ():
                extra = step.weights_bytes - 2 * sum(p.numel() for p in backbone_of(model))
                unpacked = 0 if mode == "cached-bypass" else largest_map(model)
                totals[f"{bits}-bit"] = packed_bytes(model, bits) + extra + unpacked + moving
            if mode == "bypass":
                beside = step.total_bytes - bytes_of(model)
                totals |= held(size, args.layers, beside)
            if mode == "cached-bypass":
                # Its step lends the final norm alone: the backbone may be elsewhere.
                totals["without the backbone"] = step.trained_bytes + moving
            rows.append(
                {
                    "billions": size,
                    "mode": mode,
                    "weights_bytes": step.weights_bytes,
                    "trained_bytes": step.trained_bytes,
                    "optimiser_bytes": step.optimiser_bytes,
                    "saved_bytes": step.saved_bytes,
                    "peak_bytes_above_weights": step.above_bytes,
                    "input_bytes": step.input_bytes,
                    "flops": step.cost.flops,
                    "total_bytes": totals,
                }
            )
            told = "  ".join(f"{k} {v / 1e9:6.2f} GB" for k, v in totals.items())
            print(
                f"{size:>3s} {mode:26s} above weights {step.above_bytes / 1e9:6.2f} GB  saved "
                f"{step.saved_bytes / 1e9:6.2f} GB   in all: {told}",
                flush=True,
            )

    used = peak_of(forecast_all, "cpu")
    forwards = {row["billions"]: row["flops"] for row in rows if row["mode"] == "forward-only"}
    for row in rows:
        row["flops_over_forward"] = row["flops"] / forwards[row["billions"]]
    write(
        args,
        "forecast of one AdamW step, Llama types, 1 text of 2048 tokens",
        rows=rows,
        memory_of_this_forecast_bytes=used,
        notes={
            "full": "weights, gradients and moments in bf16: what mixed precision adds is not here",
            "lora": "PEFT keeps its factors in fp32 and reads the stream in fp32",
            "bypass": "its readout is the last token, so all tokens of all taps are read",
        },
    )
    if args.layers is None and args.sizes == list(SIZES):
        PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


def backbone_of(model: Any) -> list[Any]:
    """The network's own weights, without what PEFT put in."""
    return [p for n, p in model.named_parameters() if "lora_" not in n]


BEGIN, END = "<!-- billions: begin -->", "<!-- billions: end -->"
PAGE = Path(__file__).parents[1] / "docs" / "planning.md"


def gigabytes(value: int | None) -> str:
    """As it is printed."""
    if value is None:
        return ""
    return f"{value / 1e9:,.0f}" if value >= 1e11 else f"{value / 1e9:.3g}"


def tables(rows: list[dict[str, Any]]) -> str:
    """What a step takes by method, and what a device holds for a bypass, GB."""
    sizes = list(dict.fromkeys(row["billions"] for row in rows))
    by = {(row["billions"], row["mode"]): row for row in rows}
    kinds = ("above weights", "bf16", "4-bit")
    heads = [f"{kind}, {size}" for size in sizes for kind in kinds]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for mode in MODES:
        cells = []
        for size in sizes:
            row = by[size, mode]
            totals = row["total_bytes"]
            values = (row["peak_bytes_above_weights"], totals["bf16"], totals.get("4-bit"))
            cells += [gigabytes(value) for value in values]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    # A bypass, by where its backbone is.
    places = {
        "in memory, bf16": ("bypass", "bf16"),
        "in memory, 8-bit": ("bypass", "8-bit"),
        "in memory, 4-bit": ("bypass", "4-bit"),
        f"shared out among {DEVICES} devices (FSDP2), bf16": (
            "bypass",
            f"shared out among {DEVICES}",
        ),
        "offloaded, one module at a time, bf16": ("bypass", "offloaded"),
        "gone: from stored features": ("cached-bypass", "without the backbone"),
    }
    lines += ["", f"| backbone | {' | '.join(f'{s} billion' for s in sizes)} |"]
    lines += ["|---|" + "---:|" * len(sizes)]
    for name, (mode, kind) in places.items():
        cells = [gigabytes(by[size, mode]["total_bytes"][kind]) for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drawn(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with the tables of these rows."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables(rows)}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    main()

"""Memory of one training step on a network of seven billion parameters, of which none is there.

    python benchmarks/seven_billion.py

A Llama-type architecture (32 layers, width 4096, 6.6 billion weights without a language head) in
bf16, one text of 2048 tokens, a head of 100 classes on the last token. Forecast from shapes on any
machine, in a minute and less than a gigabyte. With 8-bit and 4-bit weights the linear maps of the
layers are counted at their packed size, by arithmetic, and one map unpacked to bf16 at a time; the
rest stays in bf16. Trained weights, gradients and AdamW's moments have the type the method's own
library gives them.
"""

from __future__ import annotations

from typing import Any

from common import arguments, peak_of, started, write

TOKENS = 2048
RANK = 8
CLASSES = 100
GROUP = 64
"""Weights that share a scale in 4 bits (bitsandbytes' NF4; its scales are 8 bits, and one fp32 a
256 of them)."""


def llama(layers: int) -> Any:
    """The network on `meta`, bf16, without the cache of generation."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        use_cache=False,
    )
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
            self.head = nn.Linear(4096, CLASSES, dtype=torch.bfloat16, device="meta")

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


def step_of(mode: str, layers: int) -> tuple[Any, Any]:
    """The forecast of one mode, and the backbone."""
    import torch

    import restuning
    from restuning import forecast

    model = llama(layers)
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


def main() -> None:
    """Forecast all rows and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--layers", type=int, default=32)
    args = started(parser)
    rows: list[dict[str, Any]] = []

    def forecast_all() -> None:
        for mode in MODES:
            step, model = step_of(mode, args.layers)
            moving = step.optimiser_bytes + step.input_bytes + step.above_bytes
            totals = {"bf16": step.total_bytes}
            for bits in (8, 4) if mode != "full" else ():
                extra = step.weights_bytes - 2 * sum(p.numel() for p in backbone_of(model))
                unpacked = 0 if mode == "cached-bypass" else largest_map(model)
                totals[f"{bits}-bit"] = packed_bytes(model, bits) + extra + unpacked + moving
            if mode == "cached-bypass":
                # Its step lends the final norm alone: the backbone may be elsewhere.
                totals["without the backbone"] = step.trained_bytes + moving
            rows.append(
                {
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
                f"{mode:26s} above weights {step.above_bytes / 1e9:6.2f} GB  saved "
                f"{step.saved_bytes / 1e9:6.2f} GB   in all: {told}",
                flush=True,
            )

    used = peak_of(forecast_all, "cpu")
    for row in rows:
        row["flops_over_forward"] = row["flops"] / rows[0]["flops"]
    write(
        args,
        "forecast of one AdamW step, Llama type of 7 billion parameters, 1 text of 2048 tokens",
        rows=rows,
        memory_of_this_forecast_bytes=used,
        notes={
            "full": "weights, gradients and moments in bf16: what mixed precision adds is not here",
            "lora": "PEFT keeps its factors in fp32 and reads the stream in fp32",
            "bypass": "its readout is the last token, so all tokens of all taps are read",
        },
    )


def backbone_of(model: Any) -> list[Any]:
    """The network's own weights, without what PEFT put in."""
    return [p for n, p in model.named_parameters() if "lora_" not in n]


if __name__ == "__main__":
    main()

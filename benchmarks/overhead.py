"""What hooks cost: Res-Tuning through `Host` against the same tuners written into the model.

    python benchmarks/overhead.py

ViT-S/16, batch 16, 224 px, fp32, eager, one forward and backward. The other side is timm's own
blocks with the two Res-Adapters and their channel scales written between their lines by hand:
`x = x + attn(norm1(x)) + s1 (up1(gelu(down1(x))))` and the same beside the FFN, with the same
weights; outputs are compared first. Both run in turns in one process; the ratio is the median of
the rounds' ratios.
"""

from __future__ import annotations

from typing import Any

from common import arguments, in_turns, paired, spread, started, target, write

AGREE = 1e-4
"""Largest difference of the logits relative to their size, for the two to count as the same."""
CLASSES = 100


def by_hand(model: Any, task: Any) -> Any:
    """A forward of timm's ViT with the task's tuners written between its lines."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    tuners = task.inline_tuners

    def beside(y: Any, x: Any, name: str) -> Any:
        tuner = tuners[name]
        inner = tuner.tuner
        hidden = F.gelu(F.linear(x, inner.down.weight, inner.down.bias))
        # One product with scale and bias folded in, as anyone would who writes it for speed.
        weight = torch.cat([inner.up.weight, inner.up.bias.unsqueeze(1)], 1)
        weight = weight * tuner.scale.unsqueeze(1)
        flat = hidden.reshape(-1, hidden.shape[-1])
        flat = torch.cat([flat, flat.new_ones(()).expand(len(flat), 1)], 1)
        return torch.addmm(y.reshape(-1, y.shape[-1]), flat, weight.t()).view(y.shape)

    def forward(images: Any) -> Any:
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for number, block in enumerate(model.blocks, 1):
            y = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            x = beside(y, x, f"mha.{number}")
            y = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            x = beside(y, x, f"ffn.{number}")
        return task.head(model.norm(x)[:, 0])

    return forward


def main() -> None:
    """Compare outputs, time both in turns, write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default="vit_small_patch16_224")
    args = started(parser)

    import timm
    import torch
    import torch.nn.functional as F  # noqa: N812

    import restuning

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=0).to(args.device)
    x = torch.randn(args.batch, 3, 224, 224, device=args.device)
    y = torch.randint(CLASSES, (args.batch,), device=args.device)
    bare = timm.create_model(args.model, num_classes=0).to(args.device)
    bare.load_state_dict(model.state_dict())
    bare.eval().requires_grad_(False)
    host = restuning.Host(model, x[:1])
    task = restuning.methods.build("res-tuning", host, num_classes=CLASSES, zero=False)
    task = task.to(args.device)
    tuned, written = restuning.Tuned(host, task), by_hand(bare, task)
    with torch.no_grad():
        one, other = tuned(x[:2]), written(x[:2])
    difference = float((one - other).abs().max() / other.abs().max())
    if difference > AGREE:
        raise SystemExit(f"the two do not compute the same: {difference:.2g}")

    def step(forward: Any) -> Any:
        def run() -> None:
            task.zero_grad(set_to_none=True)
            F.cross_entropy(forward(x), y).backward()

        return run

    def inference(forward: Any) -> Any:
        def run() -> None:
            with torch.no_grad():
                forward(x)

        return run

    rows = []
    for what, make in (("forward and backward", step), ("forward", inference)):
        times = in_turns({"host": make(tuned), "by hand": make(written)}, args.rounds, args.device)
        rows.append(
            {
                "what": what,
                "seconds": {k: spread(v) for k, v in times.items()},
                "host_over_by_hand": paired(times["host"], times["by hand"]),
            }
        )
    with torch.no_grad():
        times = in_turns(
            {"host": lambda: host(x), "by hand": lambda: bare(x)}, args.rounds, args.device
        )
    rows.append(
        {
            "what": "forward without a task",
            "seconds": {k: spread(v) for k, v in times.items()},
            "host_over_by_hand": paired(times["host"], times["by hand"]),
        }
    )
    write(
        args,
        f"{args.model}, batch {args.batch}, fp32, eager: hooks against lines written by hand",
        batch=args.batch,
        difference_of_logits=difference,
        rows=rows,
        targets=[
            target(
                "Res-Tuning through the host over the same written by hand, a step",
                rows[0]["host_over_by_hand"]["median"],
                1.03,
            )
        ],
    )


if __name__ == "__main__":
    main()

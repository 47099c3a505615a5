"""What it costs to hold a backbone to what it was: in every forward, before a training, in a task file.

    python benchmarks/identity.py

ViT-B/16, 224 px, fp32. The check of every forward is compared with a forward of one image, in turns. Sums
of all bytes (taken when a host is built, compared before a training and a save) and the sha256 of all
weights (once a host) are told a gigabyte.
"""

from __future__ import annotations

from typing import Any

from common import arguments, in_turns, paired, seconds, spread, started, target, write


def main() -> None:
    """Time each part, write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default="vit_base_patch16_224")
    args = started(parser)

    import timm
    import torch

    import restuning
    from restuning.host.fingerprint import full_digest
    from restuning.host.snapshot import Snapshot

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=0).to(args.device).eval()
    x = torch.randn(1, 3, 224, 224, device=args.device)
    host = restuning.Host(model, x)
    snapshot = Snapshot(model)
    snapshot.take()
    gigabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def rounds(run: Any, count: int = 1) -> list[float]:
        def repeated() -> None:
            for _ in range(count):
                run()

        repeated()
        return [seconds(repeated, args.device) / count for _ in range(args.rounds)]

    times = in_turns({"forward": forward, "check": snapshot.check}, args.rounds, args.device)
    parts = {
        "sums of all bytes": rounds(snapshot.check_values),
        "sha256 of all weights": rounds(lambda: full_digest(model)),
    }
    host.release()
    ratio = paired(times["check"], times["forward"])
    write(
        args,
        f"{args.model}, fp32: what it costs to hold a backbone to what it was",
        gigabytes=gigabytes,
        check_seconds=spread(times["check"]),
        forward_seconds=spread(times["forward"]),
        check_over_forward=ratio,
        seconds_a_gigabyte={
            what: spread([value / gigabytes for value in values]) for what, values in parts.items()
        },
        targets=[target("the check over a forward of one image", ratio["median"], 0.01)],
    )


if __name__ == "__main__":
    main()

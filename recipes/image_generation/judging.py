"""What every row is judged by, all on scenes and noise that are the same for every method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import parts
import shapes
import torch
from adapt import OBJECTIVE
from torch import Tensor

from restuning.diffusion import EncodedPairs, Objective, frechet_distance, held_out_error, sample

GUIDANCE, SAMPLE_STEPS = 2.0, 15
TEST, VALIDATION = 999, 555
"""Seeds of the scenes that rows are judged on, and of those that settings were chosen on."""

SHIFTS = {"style": ("paper", shapes.SHAPES[:3]), "concept": ("plain", ("star",))}
"""Style of the pictures and their shapes."""


def training_set(shift: str, seed: int) -> EncodedPairs:
    """256 pictures of the shifted domain."""
    style, kinds = SHIFTS[shift]
    return parts.encoded(shapes.scenes(256, 100 + seed, kinds), style, 10 + seed)


def judge(out: Path) -> tuple[parts.Judge, float]:
    """The judge, trained once, and the share of attributes it reads rightly off drawn pictures."""
    file, score = out / "judge.pt", out / "judge.json"
    if not score.exists():
        made, right = parts.trained_judge()
        torch.save(made.state_dict(), file)
        score.write_text(json.dumps(right))
    known = parts.Judge()
    known.load_state_dict(torch.load(file, weights_only=True))
    return known.eval().requires_grad_(False), json.loads(score.read_text())


def judged(
    denoiser: Callable[..., Tensor],
    shift: str,
    out: Path,
    *,
    count: int,
    samples: int,
    scenes: int = TEST,
) -> tuple[dict[str, Any], Tensor]:
    """Error and accuracies of a denoiser as JSON, and its pictures, `samples 3 32 32`."""
    style, kinds = SHIFTS[shift]
    held = shapes.scenes(count, scenes, kinds)
    test, (reader, reads) = parts.encoded(held, style, 77), judge(out)

    def noise_of(x: Tensor, times: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        return OBJECTIVE.clean_and_noise(x, denoiser(x, times, conditions), times)[1]

    error = held_out_error(noise_of, Objective("epsilon", OBJECTIVE.alphas), test)
    drawn = generated(denoiser, test, samples)
    labels = torch.tensor([s.labels for s in held[:samples]])
    right = (reader.labels(drawn) == labels).float().mean(0)
    row = {
        "epsilon_error": error.mean,
        "epsilon_error_by_time": error.buckets,
        "attribute_accuracy": float(right.mean()),
        "accuracy_by_attribute": dict(zip(shapes.ATTRIBUTES, right.tolist(), strict=True)),
        "fd_judge": frechet_distance(reader(drawn), reader(shapes.pictures(held, style, 77))),
        "judge_accuracy_on_drawn_pictures": reads,
        "held_out": count,
        "samples": samples,
        "scenes": scenes,
        "guidance": GUIDANCE,
        "sample_steps": SAMPLE_STEPS,
        "judge": hashlib.sha256((out / "judge.pt").read_bytes()).hexdigest()[:16],
    }
    return row, drawn


def generated(denoiser: Callable[..., Tensor], test: EncodedPairs, count: int) -> Tensor:
    """Pictures of held-out captions."""
    found = []
    for start in range(0, count, 32):
        rows = list(range(start, min(start + 32, count)))
        noise = torch.randn(
            len(rows),
            parts.CHANNELS,
            parts.SIDE,
            parts.SIDE,
            generator=torch.Generator().manual_seed(start),
        )
        found.append(
            sample(
                denoiser,
                OBJECTIVE,
                noise,
                test.conditions(rows),
                steps=SAMPLE_STEPS,
                guidance=GUIDANCE,
                empty=test.empty,
                clip=1.0,
            )
        )
    return parts.unfolded(torch.cat(found)).clamp(-1, 1)

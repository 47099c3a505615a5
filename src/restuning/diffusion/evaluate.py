"""How good a denoiser and its images are: held-out error by time, and distances between sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from restuning._errors import DataError
from restuning.diffusion.encode import EncodedPairs
from restuning.diffusion.objective import Objective
from restuning.diffusion.sample import Denoiser
from restuning.runtime.randomness import mix_seed


@dataclass(frozen=True)
class ErrorByTime:
    """Squared error of a denoiser's answers, without weights.

    Attributes:
        mean: Over all.
        buckets: Over equal parts of time, from hardly noised to pure noise.
    """

    mean: float
    buckets: list[float]


@torch.no_grad()
def held_out_error(
    denoiser: Denoiser,
    objective: Objective,
    data: EncodedPairs,
    *,
    buckets: int = 10,
    rows: int | None = None,
    batch: int = 32,
    seed: int = 0,
) -> ErrorByTime:
    """The error on data that were not trained on, every image at one time of every bucket.

    Noise and times follow from the seed and from where a batch starts, so all denoisers that are
    judged with one `batch` meet the same.

    Args:
        denoiser: The model that is judged.
        objective: The objective it was trained for.
        data: Pairs it was not trained on.
        buckets: Number of equal parts of time.
        rows: Most images to use; None for all.
        batch: Images of one forward.
        seed: Seed of noise and times.
    """
    count = min(len(data), rows or len(data))
    sums = torch.zeros(buckets, dtype=torch.float64)
    for bucket in range(buckets):
        for start in range(0, count, batch):
            index = list(range(start, min(start + batch, count)))
            draw = torch.Generator().manual_seed(mix_seed("held out", seed, bucket, start))
            clean = data.latents(index)
            noise = torch.randn(clean.shape, generator=draw)
            # One time in every bucket for every image: the mean is steadier than over free times.
            share = (bucket + torch.rand(len(index), generator=draw)) / buckets
            if objective.kind != "flow":
                assert objective.alphas is not None
                # Noise schedules count in whole steps; a share that rounds up to 1 is the last of them.
                share = (share * len(objective.alphas)).long().clamp(max=len(objective.alphas) - 1)
            noised = objective.add_noise(clean, noise, share)
            answer = denoiser(noised.sample, noised.time, data.conditions(index))
            sums[bucket] += (answer - noised.target).square().flatten(1).mean(1).double().sum()
    means = (sums / count).tolist()
    return ErrorByTime(sum(means) / buckets, means)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` of two sets of features, `n d` and `m d`.

    Only with Inception's features is it an FID; name it after the features it was taken on.

    Raises:
        DataError: A set has fewer than two rows.
    """
    if min(len(first), len(second)) < 2:
        raise DataError(
            "a distance between sets needs sets",
            found=f"{len(first)} and {len(second)} features",
            fix="give at least two of each, better thousands",
        )
    a, b = first.double(), second.double()
    # `cov` of a single feature is a number.
    one, two = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())
    # tr((C1 C2)^(1/2)) is the sum of the roots of the eigenvalues of C1 C2, which are real and at
    # least zero but for rounding.
    roots = torch.linalg.eigvals(one @ two).real.clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return float((mean + one.trace() + two.trace() - 2 * roots).clamp(min=0))


def density_and_coverage(
    real: Tensor, generated: Tensor, neighbours: int = 5
) -> tuple[float, float]:
    """How much of the generated set lies where real ones are, and how much of the real is met.

    Balls around real samples reach their k-th real neighbour. Density is the mean number of balls
    that a generated sample lies in, over k; coverage the share of balls that hold one.

    Args:
        real: Features, `n d`.
        generated: Features, `m d`.
        neighbours: k; 5 as the authors use it.

    Reference: Naeem et al. 2020, arXiv 2002.09797.

    Raises:
        DataError: There are not more real samples than neighbours.
    """
    if len(real) <= neighbours or not len(generated):
        raise DataError(
            "density and coverage need more samples",
            found=f"{len(real)} real ones, {len(generated)} generated",
            fix=f"give more than {neighbours} real ones",
        )
    within = torch.cdist(real.double(), real.double())
    # One more, because each sample is its own nearest.
    radius = within.kthvalue(neighbours + 1, dim=1).values
    inside = torch.cdist(real.double(), generated.double()) < radius[:, None]
    density = inside.double().sum(0).mean() / neighbours
    return float(density), float(inside.any(1).double().mean())

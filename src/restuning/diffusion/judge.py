"""FID, CLIP score, density and coverage by well-kept libraries, every number with its protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import BackboneError, require
from restuning.diffusion.evaluate import density_and_coverage
from restuning.host import weights_digest

FETCHED = "they are fetched at first use: run once with a network, or put the file where it is kept"


@dataclass(frozen=True)
class JudgingProtocol:
    """How the images and their reference were made. Scores without it cannot be compared.

    The same samples score 19.1 against one split of a data set and 12.8 against another
    (CompVis/latent-diffusion#88), and 134 from 259 samples where 30,000 give 33 (#90).

    Attributes:
        generator: Pipeline, and task folder if any.
        reference: Name of the reference set.
        reference_digest: `Pairs.digest()` of it.
        size: Side in pixels at which both sets are compared.
        resize: Filter and library that brought the reference to it.
        sampler, steps, guidance, seed: How the images were generated.
    """

    generator: str
    reference: str
    reference_digest: str
    size: int
    resize: str
    sampler: str
    steps: int
    guidance: float
    seed: int


@torch.no_grad()
def judge_images(
    reference: Iterable[Tensor],
    generated: Iterable[tuple[Tensor, Sequence[str]]],
    protocol: JudgingProtocol,
    *,
    network: nn.Module | None = None,
    clip: str | None = None,
    neighbours: int = 5,
) -> dict[str, Any]:
    """Compare two sets of images, and images with their captions.

    Args:
        reference: Batches of bytes, `b 3 h w`.
        generated: Batches of bytes, and their captions.
        protocol: How they were made; it comes back with the scores.
        network: Bytes to features `b d`, with `num_features`; None for the Inception that FID is
            defined with. With another network the distance is named after it and is no FID.
        clip: Name or folder of a CLIP model, for the CLIP score; None leaves it out.
        neighbours: k of density and coverage.

    Returns:
        `scores` and `protocol`: the given one with the numbers of images, digests of captions and
        feature networks, and versions of libraries.

    Raises:
        MissingExtraError: torchmetrics or torch-fidelity is not installed.
        BackboneError: Weights of Inception or CLIP are neither here nor can be fetched.
        DataError: Too few images.
    """
    image = require("torchmetrics.image.fid", "fid", "a Fréchet distance between images")
    if network is None:
        require("torch_fidelity", "fid", "the Inception network of FID")
    name = "FID" if network is None else f"FD_{type(network).__name__}"
    size = protocol.size
    try:
        distance = image.FrechetInceptionDistance(
            feature=2048 if network is None else network, input_img_size=(3, size, size)
        )
    except Exception as error:  # noqa: BLE001 (whatever a downloader raises)
        raise _missing_weights_error("Inception", error) from None
    score = None if clip is None else _load_clip(clip)
    real, made, captions = [], [], []
    for batch in reference:
        distance.update(batch, real=True)
        # Density and coverage are taken on the features of the distance itself.
        real.append(distance.inception(batch).flatten(1).cpu())
    for batch, texts in generated:
        distance.update(batch, real=False)
        made.append(distance.inception(batch).flatten(1).cpu())
        captions += texts
        if score is not None:
            score.update(batch, list(texts))
    density, coverage = density_and_coverage(torch.cat(real), torch.cat(made), neighbours)
    scores = {name: float(distance.compute()), "density": density, "coverage": coverage}
    # By contents: a name does not say which weights were fetched.
    networks = {name: weights_digest(distance.inception)}
    if score is not None:
        scores["CLIP score"] = float(score.compute())
        networks["CLIP score"] = weights_digest(score.model)
    return {
        "scores": scores,
        "protocol": {
            **asdict(protocol),
            "reference_images": sum(map(len, real)),
            "generated_images": sum(map(len, made)),
            "captions_digest": hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16],
            "feature_networks": networks,
            "clip": clip,
            "neighbours": neighbours,
            "libraries": {n: version(n) for n in ("torch", "torchmetrics")},
        },
    }


def _load_clip(name: str) -> Any:
    clip = require("torchmetrics.multimodal.clip_score", "fid", "a CLIP score")
    try:
        return clip.CLIPScore(model_name_or_path=name)
    except Exception as error:  # noqa: BLE001 (whatever a hub client raises)
        raise _missing_weights_error(f"CLIP ({name})", error) from None


def _missing_weights_error(what: str, error: Exception) -> BackboneError:
    words = (str(error).strip().splitlines() or [""])[0]
    return BackboneError(
        f"the weights of {what} are not here",
        found=f"{type(error).__name__}: {words[:200]}",
        fix=FETCHED,
    )

"""Judges answers that are a class for every pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from restuning.problems.judge import JudgeOfPixels, keep_worst, mean_of, thin_map, to_floats
from restuning.problems.judged import Breakdown, Confusion, Judged, Mistake, Pixels
from restuning.problems.palette import MOST_CLASSES, make_palette, name_colours

if TYPE_CHECKING:
    from restuning.problems.segmentation import Segmentation

WORDS = 3
"""Classes of a mask that are told of one that is answered badly."""
FIGURES = ("mean_iou", "pixel_accuracy", "mean_accuracy")


class _Kept(NamedTuple):
    """An image that may be among the worst: its masks, its pixels `C C`, and its loss."""

    row: int
    loss: float
    truth: Tensor
    told: Tensor
    counts: Tensor


class JudgeOfMasks(JudgeOfPixels):
    """Of masks: `mean_iou` and `pixel_accuracy`, as `Segmentation.metrics`, and `mean_accuracy`, all over the pixels of a split.

    The intersection over union (IoU) of a class is the number of pixels that are of it and answered so, over those that are
    either; its accuracy (recall) the share of its pixels that are answered so. Means are over the classes that are there; those
    of the IoU also over those that are answered and not there, which have an IoU of 0. Pixels without a class count in nothing.

    Cost: the pixels of a split are counted `C C`; the masks of `WORST` images are held, and one answer is drawn at a time.
    """

    problem: Segmentation

    def __init__(
        self, problem: Segmentation, labels: Sequence[str], temperature: float = 1.0
    ) -> None:
        super().__init__(problem, labels, temperature)
        self._counts: Tensor | None = None
        self._rows: list[dict[str, Any]] = []
        self._worst: list[_Kept] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Take in a batch: logits `b h w c`, masks `b H W`."""
        if not self.labels:
            self.labels = list(map(str, range(logits.shape[-1])))
        for one, wanted in zip(logits.detach().split(1), targets.split(1), strict=True):
            loss = float(self.problem.loss(one, wanted))
            told, truth = self.problem.draw(one, wanted)[0].cpu(), wanted[0].cpu()
            self._take(told.to(truth.dtype), truth, self._count(told, truth), loss)

    def update_in_rows(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take in one image; see `JudgeOfPixels`."""
        told: list[Tensor] = []
        truth: list[Tensor] = []
        total, known = 0.0, 0
        for logits, wanted in parts:
            if not self.labels:
                self.labels = list(map(str, range(logits.shape[-1])))
            there = int(self.problem.known(wanted).sum())
            # A mean over the pixels of a part: over those of the image it weighs by how many they are.
            total += float(self.problem.loss(logits[None], wanted[None])) * there
            known += there
            truth.append(wanted.cpu())
            told.append(logits.argmax(-1).cpu().to(wanted.dtype))
        said, mask = torch.cat(told), torch.cat(truth)
        counts = self._count(said.long(), mask)
        self._take(thin_map(said), thin_map(mask), counts, total / max(1, known))

    def _take(self, told: Tensor, truth: Tensor, counts: Tensor, loss: float) -> None:
        self._counts = counts if self._counts is None else self._counts + counts
        self._losses.append(loss)
        self._rows.append(self._tell_row(counts, loss))
        new = _Kept(len(self._losses) - 1, loss, truth, told, counts)
        self._worst = keep_worst([*self._worst, new])

    def _count(self, told: Tensor, truth: Tensor) -> Tensor:
        """Pixels by true class (rows) and answered class, `C C`."""
        classes, counted = len(self.labels), truth != self.problem.ignore
        pairs = truth[counted].long() * classes + told[counted]
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def _tell_row(self, counts: Tensor, loss: float) -> dict[str, Any]:
        figures = _find_figures(counts)
        each = zip(self.labels, to_floats(_find_ious(counts)), strict=True)
        return {
            "mean IoU": figures["mean_iou"],
            "pixel accuracy": figures["pixel_accuracy"],
            "loss": loss,
            **{f"IoU of {name}": value for name, value in each},
        }

    def conclude(self) -> Judged:
        """What the answers so far are worth."""
        counts = self._counts
        if counts is None:
            return Judged(0, {})
        there = counts.sum(1)
        # The same everywhere: of the largest class its share is right, and no other has a larger IoU.
        constant = torch.zeros_like(counts)
        constant[:, int(there.argmax())] = there
        columns: Mapping[str, Sequence[float | int | None]] = {
            "pixels": there.tolist(),
            "IoU": to_floats(_find_ious(counts)),
            "pixel accuracy": to_floats(counts.diagonal().double() / there),
        }
        return Judged(
            len(self._losses),
            _find_figures(counts),
            _find_figures(constant),
            FIGURES,
            Breakdown(
                self.labels,
                columns,
                ("pixel accuracy", "IoU"),
                colours=name_colours(len(self.labels)),
            ),
            [Confusion(counts, self.labels, "pixels")],
            [self._tell_mistake(each) for each in self._worst],
            rows=self._rows,
        )

    def _tell_mistake(self, kept: _Kept) -> Mistake:
        counts = kept.counts
        iou = _find_figures(counts)["mean_iou"]
        told, truth = (self._say(counts.sum(axis)) for axis in (0, 1))
        told = told if iou is None else f"{told}; mean IoU {iou:.1%}"
        maps: list[Pixels] = []
        if len(self.labels) < MOST_CLASSES:
            maps = [
                Pixels(title, said, self._paint(mask))
                for title, said, mask in (
                    ("true", truth, kept.truth),
                    ("answered", told, kept.told),
                )
            ]
        return Mistake(kept.row, told, truth, kept.loss, maps)

    def _paint(self, mask: Tensor) -> Tensor:
        """In the colours of the classes, `H W 3` in bytes; the last of a palette where there is none."""
        known = mask.long()
        return _palette()[known.where(known != self.problem.ignore, MOST_CLASSES - 1)]

    def _say(self, pixels: Tensor) -> str:
        """The largest classes and their shares."""
        shares = pixels / pixels.sum().clamp(min=1)
        order = shares.argsort(descending=True, stable=True)[:WORDS].tolist()
        told = [f"{self.labels[k]} {float(shares[k]):.1%}" for k in order if pixels[k] > 0]
        return ", ".join(told) or "-"


def _find_figures(counts: Tensor) -> dict[str, float | None]:
    hits, total = counts.diagonal(), int(counts.sum())
    return {
        "mean_iou": mean_of(_find_ious(counts)),
        "pixel_accuracy": int(hits.sum()) / total if total else None,
        "mean_accuracy": mean_of(hits.double() / counts.sum(1)),
    }


def _find_ious(counts: Tensor) -> Tensor:
    """Of each class, `C` in double; NaN of one that is neither there nor answered."""
    hits = counts.diagonal()
    return hits.double() / (counts.sum(0) + counts.sum(1) - hits)


def _palette() -> Tensor:
    return torch.tensor(make_palette(), dtype=torch.uint8).view(MOST_CLASSES, 3)

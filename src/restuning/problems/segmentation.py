"""A class for every pixel, answered on a coarser grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._errors import FormatError, TrainingError
from restuning.problems.answers import MaskAnswer
from restuning.problems.judge_masks import JudgeOfMasks
from restuning.problems.meters import collect
from restuning.problems.pixels import (
    OfPixels,
    enlarge,
    mean_of_images,
    patches_of,
    take_middles,
    thin_out,
)
from restuning.problems.problem import Problem, Shown, problem, refuse_arguments
from restuning.problems.single_label import (
    SCALES,
    SingleLabel,
    to_probabilities,
    weigh_inversely,
)
from restuning.problems.targets import refuse_first, tell_form

UNLABELLED = 255
"""Value of pixels that do not count, in the masks of the field (Pascal VOC, Cityscapes, ADE20K in PNG)."""


@problem("segmentation")
class Segmentation(OfPixels):
    """One class a pixel. Targets are masks of whole numbers, `b H W`; logits stand on a coarser grid, `b h w c`.

    Logits are brought to the size of the mask bilinearly, as all heads on frozen patches are trained and tested. The loss is
    cross-entropy, for each image the mean over its pixels that have a class, so that an image counts as one.

    Args:
        ignore: Value of pixels without a class, which count in no loss and no figure. It is no class's number: of 256 classes
            and more it is given, such as -1.
        window: As of `OfPixels`.

    Raises:
        FormatError: It is no whole number, or the window has no pixels.

    Cost: of a step about four numbers a class and pixel: `b c H W`.
    """

    metric = "mean_iou"
    pipeline_tags = {"image": "image-segmentation"}
    prints = "answer.label, answer.mask.shape"
    loss_name = "cross entropy of pixels"

    def __init__(self, ignore: int = UNLABELLED, window: Sequence[int] | None = None) -> None:
        super().__init__(window)
        if not isinstance(ignore, int) or isinstance(ignore, bool):
            raise refuse_arguments(self.kind, f"ignore={ignore!r}")
        self.ignore = ignore

    def check_outputs(self, outputs: int) -> None:
        """Refuse outputs of which one would be taken for no class.

        Raises:
            FormatError: One has the number `ignore`.
        """
        if 0 <= self.ignore < outputs:
            raise FormatError(
                "the value of pixels without a class is the number of one",
                where=f"{type(self).__name__}(ignore={self.ignore})",
                found=f"{outputs} classes (0 to {outputs - 1})",
                fix="give ignore=-1, and write that into the masks where there is no class",
            )

    def check_targets(
        self, targets: Any, outputs: int | None = None, shown: Shown | None = None
    ) -> None:
        """Refuse what are no masks, and a class beyond the outputs.

        Raises:
            TrainingError: A mask is none, or a pixel of it is of a class that no output stands for.
        """
        whole = isinstance(targets, Tensor) and targets.ndim == 3 and targets.dtype != torch.bool
        if not whole or targets.is_floating_point():
            raise TrainingError(
                "a mask must be whole numbers, one a pixel",
                found=tell_form(targets),
                fix="let the data set yield (image, tensor `h w` of class numbers), "
                f"{self.ignore} where there is none",
            )
        if outputs is None:
            return
        refuse_first(
            ((targets < 0) | (targets >= outputs)) & (targets != self.ignore),
            targets,
            shown,
            "a pixel of a mask is outside the task's classes",
            f"correct the mask, {self.ignore} where there is no class",
            f"; {outputs} classes (0 to {outputs - 1})",
        )

    def stand_in(self, logits: Tensor) -> Tensor:
        """The first class everywhere, in patches of 16 pixels."""
        size = patches_of(logits)
        return torch.zeros(len(logits), *size, dtype=torch.long, device=logits.device)

    def known(self, targets: Tensor) -> Tensor:
        """Those with a class."""
        return targets != self.ignore

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum over images of the mean over pixels of the cross entropy."""
        return self._sum_means(logits, targets, smoothing)

    def _sum_means(
        self, logits: Tensor, targets: Tensor, smoothing: float, weights: Tensor | None = None
    ) -> Tensor:
        """Sums over images of means over pixels that have a class."""
        each = F.cross_entropy(
            enlarge(logits, targets),
            targets.long(),
            ignore_index=self.ignore,
            reduction="none",
            label_smoothing=smoothing,
        )
        if weights is not None:
            # Not torch's own: with smoothing it weighs every class of a pixel by that class's weight.
            known = torch.where(targets == self.ignore, 0, targets.long())
            each = each * weights.to(each)[known]
        return mean_of_images(each, self.known(targets))

    def counts(self, targets: Tensor, outputs: int) -> Tensor:
        """Images in which each class is."""
        return torch.tensor([len(group) for group in self.groups(targets, outputs)])

    def balance(self, targets: Tensor, outputs: int) -> Tensor:
        """`n / (C n_c)` of pixels, as scikit-learn's "balanced": inversely by how many are of a class, 1 on average.

        n counts the pixels that have a class, C the classes that have a pixel; what has none weighs 1.
        """
        counts = sum((self._count_pixels(each, outputs) for each in targets), torch.zeros(outputs))
        return weigh_inversely(counts).float()

    def weighted_loss(
        self, logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """As `loss`, the cross entropy of each pixel times the weight of its class, `C`."""
        return self._sum_means(logits, targets, smoothing, weights)

    def groups(self, targets: Tensor, outputs: int) -> list[Tensor]:
        """The images in which each class is; an image may be of several groups, and one without any class is of none."""
        there = torch.stack([self._count_pixels(each, outputs) > 0 for each in targets])
        return [column.nonzero()[:, 0] for column in there.T]

    def _count_pixels(self, mask: Tensor, outputs: int) -> Tensor:
        """Of each class, `c` in double: sums of millions are exact."""
        counted = mask[mask != self.ignore].long().flatten()
        return torch.bincount(counted, minlength=outputs).double()

    def draw(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The largest of the logits at every pixel of the masks, `b H W`."""
        return enlarge(logits, targets).argmax(1)

    def metrics(self, outputs: int) -> Any:
        """`mean_iou`, the mean over classes that are there or answered, and `pixel_accuracy`, over all pixels."""
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        draw = self.draw

        def of_pixels(kind: Any, average: str) -> Any:
            class Enlarged(kind):
                def update(self, logits: Tensor, targets: Tensor) -> None:
                    answers = draw(logits, targets)
                    super().update(answers.flatten(), targets.flatten().long())

            # Of a single class they are not defined; targets were checked before.
            return Enlarged(
                max(2, outputs),
                average=average,
                ignore_index=self.ignore,
                validate_args=False,
                sync_on_compute=False,
            )

        return collect(
            {
                "mean_iou": of_pixels(MulticlassJaccardIndex, "macro"),
                "pixel_accuracy": of_pixels(MulticlassAccuracy, "micro"),
            }
        )

    def judge(self, labels: Sequence[str], temperature: float = 1.0) -> JudgeOfMasks:
        """See `JudgeOfMasks`."""
        return JudgeOfMasks(self, labels, temperature)

    def values(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Probabilities of every place, which sum to 1."""
        return to_probabilities(logits, temperature)

    def answer(self, values: Tensor, logits: Tensor, labels: Sequence[str]) -> MaskAnswer:
        """A mask, as large as the grid until it lies on an image (`on_image`)."""
        return MaskAnswer(labels, self.ignore, values, logits)

    def choices(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """The place's answer and the class of the pixel in its middle: as many choices as there are places."""
        middle = take_middles(logits, targets).long()
        counted = self.known(middle)
        return (logits[counted], middle[counted]) if bool(counted.any()) else None

    def thin(self, logits: Tensor, targets: Tensor) -> tuple[Problem, Tensor, Tensor] | None:
        """`choices` at some places of each image, which lie evenly; of them one class each is answered."""
        chosen = self.choices(logits, targets)
        if chosen is None:
            return None
        answers, truth = chosen
        return SingleLabel(), thin_out(answers, len(logits)), thin_out(truth, len(logits))

    def columns(self, targets: Tensor, outputs: int) -> Tensor:
        """One-hot, `n H W c`; zeros where there is no class."""
        counted = targets != self.ignore
        classes = torch.where(counted, targets.long(), 0)
        return F.one_hot(classes, outputs).double() * counted.unsqueeze(-1)

    def from_columns(self, columns: Tensor) -> Tensor:
        """Where the one is."""
        return torch.where(columns.sum(-1) > 0, columns.argmax(-1), self.ignore)

    @property
    def scales(self) -> Sequence[float]:
        """From 1 to 128."""
        return SCALES

    def surprise(self, outputs: int) -> float:
        """`log C`."""
        return math.log(max(2, outputs))

    def gradient(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Probabilities less the truth over the number of pixels, of logits on the grid of the columns."""
        counted = columns.sum(-1, keepdim=True)
        pixels = counted.sum((1, 2), keepdim=True).clamp(min=1)
        return (logits.softmax(-1) * counted - columns) / pixels

"""What figures are called in a report, and what they mean, in a line each."""

from __future__ import annotations

from typing import NamedTuple


class Word(NamedTuple):
    """Of a figure.

    Attributes:
        name: As it is shown.
        meaning: In a line.
        lower: Whether less is better.
    """

    name: str
    meaning: str = ""
    lower: bool = False


WORDS = {
    "accuracy": Word("accuracy", "share of right answers"),
    "balanced_accuracy": Word(
        "balanced accuracy", "mean recall: every class counts alike, however rare"
    ),
    "f1_macro": Word(
        "F1, macro", "mean over classes or labels of the mean of precision and recall"
    ),
    "auroc": Word(
        "AUROC",
        "chance that an example of a class is ranked above one of the others; 50% is a guess",
    ),
    "mean_average_precision": Word(
        "mean average precision", "area under precision over recall, mean over labels or queries"
    ),
    "recall_at_1": Word(
        "recall at 1", "share of examples whose nearest other example is of their class"
    ),
    "recall_at_5": Word(
        "recall at 5", "share of examples with one of their class among the five nearest"
    ),
    "mean_iou": Word(
        "mean IoU",
        "pixels that are of a class and answered so, over those that are either; mean over classes",
    ),
    "pixel_accuracy": Word("pixel accuracy", "share of pixels that are answered right"),
    "mean_accuracy": Word(
        "mean accuracy", "mean over classes of the share of their pixels that are answered right"
    ),
    "nll": Word("NLL", "mean -log of the probability that was told of what is true", lower=True),
    "ece": Word(
        "calibration error",
        "how far told probabilities are from shares of right answers (ECE)",
        lower=True,
    ),
    "r2": Word("R2", "share of the variance that is explained; 0 is the mean of all"),
    "mae": Word("MAE", "mean distance from the truth, in its units", lower=True),
    "rmse": Word("RMSE", "root of the mean squared distance, in its units", lower=True),
    "abs_rel": Word(
        "relative error", "mean of the distance from the truth over the truth", lower=True
    ),
    "delta_1": Word("within 1.25", "share of answers within a factor of 1.25 of the truth"),
    "loss": Word("loss", "what training makes small", lower=True),
}

HIDDEN = ("ece_uncalibrated",)
"""Figures that only say something beside another, where a text tells both."""


def find_word(name: str) -> Word:
    """Of a figure by its name in torchmetrics; one that is not known is its own word."""
    return WORDS.get(name, Word(name.replace("_", " ")))

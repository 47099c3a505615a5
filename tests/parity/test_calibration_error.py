"""Our expected calibration error against the one of torchmetrics."""

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from restuning.problems.reliability import BINS
from restuning.training import calibration_error

SUMS = 1e-6
"""torchmetrics adds up in float32."""


@pytest.mark.parametrize("loudness", [0.1, 1.0, 5.0, 1000.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_it_is_the_multiclass_calibration_error_of_torchmetrics(loudness, classes):
    draw = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (500,), generator=draw)
    logits = torch.randn(500, classes, generator=draw)
    logits[range(500), labels] += 1
    chances = (loudness * logits).softmax(1)
    theirs = MulticlassCalibrationError(num_classes=classes, n_bins=BINS, norm="l1")
    ours = calibration_error(chances.amax(1), chances.argmax(1) == labels)
    assert ours == pytest.approx(float(theirs(chances, labels)), abs=SUMS)
    assert BINS == 15

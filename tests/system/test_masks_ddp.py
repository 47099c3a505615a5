"""Two processes train on masks as one does: weighed, drawn evenly by class, by steps and in closed form."""

import json
from pathlib import Path

import pytest
import torch
from launching import PATIENCE, alone, forked, start_both
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("masks_script.py")
SUM_ORDER = 1e-4
"""Sums of gradients and of products in another order, kept in single precision."""


def test_two_processes_end_with_the_weights_and_figures_of_one(tmp_path):
    alone([SCRIPT, tmp_path / "one"])
    forked([SCRIPT, tmp_path / "two"])
    for method in ("linear", "ridge"):
        one, two = (load_file(tmp_path / n / f"{method}.safetensors") for n in ("one", "two"))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], atol=SUM_ORDER, rtol=SUM_ORDER)
        logs = [
            [json.loads(line) for line in (tmp_path / n / method / "log.jsonl").open()]
            for n in ("one", "two")
        ]
        assert logs[0]
        for ours, theirs in zip(*logs, strict=True):
            assert ours["step"] == theirs["step"]
            for figure in ("loss", "val_loss", "val_mean_iou"):
                assert ours.get(figure) == pytest.approx(theirs.get(figure), abs=SUM_ORDER), figure
        # It is trained: of nothing both would have learned the same.
        assert logs[0][-1]["val_mean_iou"] > 0.4


def test_an_ensemble_is_refused_in_both_processes_before_anything_is_trained(tmp_path):
    both = start_both([SCRIPT, tmp_path / "two", "ensemble"])
    for child in both:
        _, errors = child.communicate(timeout=PATIENCE)
        assert child.returncode == 1
        assert "an ensemble is trained in one process" in errors
    assert not (tmp_path / "two" / "ensemble").exists()

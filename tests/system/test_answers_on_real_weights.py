"""Three kinds of answers on drawn scenes, with a backbone as people have it."""

import pytest
import scenes
import torch

from restuning import load_backbone, train
from restuning.data.targets import list_targets
from restuning.training.run import Source

ROWS = 200


@pytest.mark.data
@pytest.mark.longer
def test_labels_and_a_count_are_told_from_one_pass_far_above_any_constant(shared_data, tmp_path):
    weights = shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    backbone = load_backbone("timm:vit_tiny_patch16_224", weights=weights)
    table = scenes.write_table(tmp_path / "scenes", ROWS, size=224)
    passed = []
    backbone.model.register_forward_hook(lambda _, args, __: passed.append(len(args[0])))
    found = train(
        table,
        backbone=backbone,
        method="ridge",
        label=["ground", "shapes", "count"],
        out=tmp_path / "run",
        store=tmp_path / "stores",
    )
    # Few at a time are those by which sites and rounding are proved.
    assert sum(size for size in passed if size > 4) == ROWS
    shapes = Source(str(table), label="shapes").load(backbone)
    constant = float(torch.stack(list_targets(shapes.test)).mean())
    assert found["shapes"].test_score > constant + 0.3
    assert found["count"].test_score > 0.8
    assert found["ground"].test_accuracy > 0.9

"""The closed form at every place: what it is solved from, what it is chosen on, and maps."""

import pytest
import torch
from torch import nn

from awake import wake
from restuning import Host, Tuned, methods
from restuning._errors import NoSitesError, TrainingError, TunerShapeError
from restuning.bypass import GridRidge
from restuning.problems import UNLABELLED, Segmentation

CLASSES, SIDE, WIDTH, PATCH = 3, 4, 6, 8
SAME_TOLERANCE = 1e-4
"""Sums in double, in another order; kept in single precision."""


def draw(images=12, noise=0.3):
    """Taps whose numbers say the class of each place, and masks."""
    made = torch.Generator().manual_seed(0)
    classes = torch.randint(CLASSES, (images, SIDE, SIDE), generator=made)
    means = torch.randn(CLASSES, WIDTH, generator=made)
    maps = means[classes] + noise * torch.randn(images, SIDE, SIDE, WIDTH, generator=made)
    masks = classes.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    return {"block.1": maps}, masks.to(torch.uint8)


def solved(taps, masks, batch=5, parts=1):
    network = GridRidge(["block.1"], [WIDTH], CLASSES, parts)
    network.problem = Segmentation()
    at = range(0, len(masks), batch)
    rows = [({n: t[i : i + batch] for n, t in taps.items()}, masks[i : i + batch]) for i in at]
    return network, network.solve(rows)


@pytest.mark.parametrize("parts", [1, 2])
def test_it_learns_what_tokens_say_and_knows_it_from_images_left_out(parts):
    taps, masks = draw()
    network, (answers, targets) = solved(taps, masks, parts=parts)
    assert answers.shape == (12, SIDE * parts, SIDE * parts, CLASSES)
    made = network.problem
    new, truth = draw()
    # Bilinear edges between patches cost the rest.
    assert made.measure(network(new), truth) > 0.8
    assert made.measure(answers, targets) > 0.8
    # Of noise images left out say what it is worth.
    noise = {"block.1": torch.randn(taps["block.1"].shape)}
    _, (answers, targets) = solved(noise, masks)
    assert made.measure(answers, targets) < 0.45


def test_the_solution_depends_on_no_batches_and_pixels_without_a_class_on_nothing():
    taps, masks = draw()
    masks[:, 3:, :11] = UNLABELLED
    one, other = (solved(taps, masks, batch)[0] for batch in (5, 12))
    torch.testing.assert_close(one.weight, other.weight, rtol=SAME_TOLERANCE, atol=SAME_TOLERANCE)
    masks[3] = UNLABELLED
    before = solved(taps, masks)[0]
    taps["block.1"][3] = 100 * torch.randn(SIDE, SIDE, WIDTH)
    after = solved(taps, masks)[0]
    torch.testing.assert_close(
        after.weight, before.weight, rtol=SAME_TOLERANCE, atol=SAME_TOLERANCE
    )


def test_what_cannot_be_solved_is_refused():
    taps, masks = draw(2)
    with pytest.raises(TunerShapeError, match="1 images"):
        solved({n: t[:1] for n, t in taps.items()}, masks[:1])
    with pytest.raises(TunerShapeError, match="no place with a class"):
        solved(taps, torch.full_like(masks, UNLABELLED))
    with pytest.raises(TrainingError, match="before it was solved"):
        GridRidge(["block.1"], [WIDTH], CLASSES)(taps)
    with pytest.raises(TunerShapeError, match="parts=0"):
        GridRidge(["block.1"], [WIDTH], CLASSES, 0)


class Convolutions(nn.Module):
    """Two residual stages of maps, and a head."""

    def __init__(self):
        super().__init__()
        from timm.models.resnet import BasicBlock, ResNet

        self.net = ResNet(BasicBlock, [1, 1, 1, 1], channels=(8, 8, 16, 16), num_classes=0)

    def forward(self, x):
        return self.net(x)


def test_maps_are_answered_on_the_finest_of_their_grids_and_heads_on_the_last():
    host = Host(wake(Convolutions()), torch.zeros(1, 3, 64, 64))
    x, masks = torch.randn(6, 3, 64, 64), torch.randint(CLASSES, (6, 64, 64))
    found = {}
    for name in ("linear", "ridge", "res-tuning-bypass"):
        task = methods.build(name, host, num_classes=CLASSES, pool="grid")
        task.problem = Segmentation()
        if name == "ridge":
            task.side.solve([(host.features(x, keep=task.needs(host.readout_rule)), masks)])
        found[name] = Tuned(host, task).eval()(x).shape[1:3]
    assert found == {"linear": (2, 2), "ridge": (64, 64), "res-tuning-bypass": (2, 2)}
    with pytest.raises(NoSitesError, match="(?s)streams of tokens.*ridge, linear"):
        methods.build("mixing-bypass", host, num_classes=CLASSES, pool="grid")

"""Corruptions, attacks, forgetting and ensembles do what they are named after."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from restuning import FitSettings, Host, RestuningError, Tuned, methods
from restuning.backbones import load_backbone
from restuning.bench import Bench, read_protocol, run_grid
from restuning.bench.studies.attacks import fgsm, input_gradient, pgd
from restuning.bench.studies.corruptions import CORRUPTIONS, corrupt
from restuning.bench.studies.ensembles import disagreement, ensemble_accuracy
from restuning.bench.studies.forgetting import learn_in_sequence
from restuning.bench.studies.load_trained import load_trained
from restuning.bench.studies.robustness import robustness, tabulate_robustness
from restuning.data import Data
from restuning.data.data import collate_batch
from restuning.data.decoded import DecodedImages

DIFFERENCE_TOLERANCE = 0.03
"""Of a gradient against a difference of two fp32 losses: relative, a few bits of the loss are left."""


@pytest.fixture(scope="module")
def world():
    backbone = load_backbone("restuning-tiny")
    return Host(backbone.model, *backbone.example), backbone.preprocessing.normalise


def pixels(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_keeps_form_and_seed_and_grows(kind):
    # Smooth over a few pixels, as photographs are.
    x = torch.nn.functional.interpolate(pixels(3)[:, :, :28, :28].float(), 112, mode="bilinear")
    x = x.round().to(torch.uint8)
    changed = [corrupt(x, kind, s) for s in (1, 3, 5)]
    assert all(c.shape == x.shape and c.dtype == torch.uint8 for c in changed)
    assert torch.equal(changed[0], corrupt(x, kind, 1))
    distances = [(c.float() - x.float()).abs().mean() for c in changed]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_unknown_corruptions_are_refused():
    with pytest.raises(RestuningError, match="no such corruption"):
        corrupt(pixels(), "fog", 1)
    with pytest.raises(RestuningError, match="no such corruption"):
        corrupt(pixels(), "contrast", 6)


@pytest.mark.parametrize("method", ["linear", "res-tuning", "res-tuning-bypass"])
def test_the_gradient_in_the_pixels_is_the_numerical_one_even_where_a_method_detaches(
    world, method
):
    host, normalise = world
    torch.manual_seed(0)
    start = {} if method == "linear" else {"zero": False}
    tuned = Tuned(host, methods.build(method, host, num_classes=3, **start)).eval()
    tuned.task.head.weight.data.mul_(20)
    x, y = pixels(2).float() / 255, torch.tensor([0, 2])
    gradient = input_gradient(tuned, x, y, normalise)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        step = 0.05
        up, down = (
            F.cross_entropy(tuned(normalise(255 * (x + s * direction))), y, reduction="sum")
            for s in (step, -step)
        )
    numerical = float((up - down) / (2 * step))
    assert numerical == pytest.approx(
        float((gradient * direction).sum().detach()), rel=DIFFERENCE_TOLERANCE
    )
    assert all(p.grad is None for p in tuned.parameters())


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_attacks_stay_inside_their_radius_and_raise_the_loss(world, attack):
    host, normalise = world
    torch.manual_seed(0)
    tuned = Tuned(host, methods.build("res-tuning-bypass", host, num_classes=3)).eval()
    tuned.task.head.weight.data.mul_(20)
    x, y = pixels(4), torch.tensor([0, 1, 2, 0])
    moved = attack(tuned, x, y, normalise, 2.0)
    assert (moved - x.float()).abs().max() <= 2.0 + 1e-3
    assert moved.min() >= 0 and moved.max() <= 255
    with torch.no_grad():
        before, after = (F.cross_entropy(tuned(normalise(v)), y) for v in (x, moved))
    assert after > before


@pytest.mark.slow
def test_robustness_is_measured_on_kept_tasks_once(grid):
    from dataclasses import replace

    job = replace(grid(methods="linear,lora"), keep=True)
    assert run_grid(job) == 0
    bench = Bench(read_protocol(job.folder), job.folder)
    tuned, result = load_trained(bench, job.runs[0])
    test = bench.data(job.runs[0].task).apart.test
    classes = tuned(test.gather(range(len(test)), [])[0]).argmax(1)
    assert (classes == test.labels).float().mean().item() == pytest.approx(result["accuracy"])
    for run in job.runs:
        found = robustness(bench, run, images=6, severities=(1, 5), radii=(8.0,))
        assert set(found["corruptions"]) == set(CORRUPTIONS) and len(found["pgd"]) == 1
        assert found["pgd"][0] <= found["clean"]
        assert robustness(bench, run, images=6, severities=(1, 5), radii=(8.0,)) == found
    assert [row[0] for row in tabulate_robustness(job.folder).rows] == ["linear", "lora"]


def test_tasks_that_were_not_kept_are_refused_in_words(grid):
    job = grid()
    run_grid(job)
    with pytest.raises(RestuningError, match="not kept"):
        load_trained(Bench(job.protocol, job.folder), job.runs[0])


def data(world, seed, count=24):
    _, normalise = world
    # Noise can only be learned by heart, which the next task is sure to disturb.
    x, y = pixels(count, seed), torch.arange(count) % 2
    held = DecodedImages(x, y, normalise)
    return Data(f"d{seed}", held, None, held, ["a", "b"], collate=collate_batch)


@pytest.mark.slow
def test_tasks_of_their_own_forget_nothing_and_a_shared_network_changes(world, tmp_path):
    host, _ = world
    tasks = [data(world, seed) for seed in (0, 3)]
    settings = FitSettings(epochs=2, batch_size=8, lr=1e-2)
    own = learn_in_sequence(host, "res-tuning", tasks, settings, tmp_path / "own", shared=False)
    assert own.forgetting == 0 and own.changed == 0
    shared = learn_in_sequence(host, "full", tasks, settings, tmp_path / "full", shared=True)
    assert shared.answers[0][0].shape == shared.answers[1][0].shape
    assert shared.changed > 0


def test_an_ensemble_answers_with_the_mean_of_its_members():
    labels = torch.tensor([0, 1, 1])
    one = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    two = torch.tensor([[0.3, 0.7], [0.1, 0.9], [0.4, 0.6]])
    assert ensemble_accuracy([one], labels) == pytest.approx(2 / 3)
    assert ensemble_accuracy([one, two], labels) == 1.0
    assert disagreement([one, two]) == pytest.approx(2 / 3) and disagreement([one]) == 0
    with pytest.raises(RestuningError, match="needs a member"):
        ensemble_accuracy([], labels)

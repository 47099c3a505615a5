"""Distances between sets of images, held-out error, and recipes that refuse politely."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from children import Child
from restuning._errors import BackboneError, DataError
from restuning.diffusion import (
    EncodedPairs,
    JudgingProtocol,
    Objective,
    density_and_coverage,
    frechet_distance,
    held_out_error,
    judge_images,
    linear_alphas,
)

RECIPES = Path(__file__).parents[2] / "recipes"
SAME = 1e-3
"""Two ways to a matrix root, in fp64 and in torchmetrics's own arithmetic."""

PROTOCOL = JudgingProtocol("nothing", "noise", "0" * 16, 8, "none", "none", 1, 1.0, 0)


class Colours(nn.Module):
    """Mean and spread of every colour."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        x = images.float() / 255 * self.weight
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def test_the_frechet_distance_of_gaussians_is_known():
    torch.manual_seed(0)
    a, b = torch.randn(20_000, 3), torch.randn(20_000, 3) * 2 + 1
    assert frechet_distance(a, a) < 1e-6
    # |1|^2 in three dimensions and (2 - 1)^2 in each.
    assert frechet_distance(a, b) == pytest.approx(6.0, rel=0.05)
    with pytest.raises(DataError, match="two"):
        frechet_distance(a[:1], b)


def test_density_and_coverage_fall_where_sets_part():
    torch.manual_seed(0)
    real = torch.randn(400, 4)
    alike = density_and_coverage(real, torch.randn(400, 4))
    narrow = density_and_coverage(real, torch.randn(400, 4) * 0.05)
    apart = density_and_coverage(real, torch.randn(400, 4) + 30)
    assert alike[0] == pytest.approx(1.0, abs=0.15) and alike[1] > 0.9
    assert narrow[0] > alike[0] and narrow[1] < 0.3
    assert apart == (0.0, 0.0)
    with pytest.raises(DataError, match="more"):
        density_and_coverage(real[:5], real)


def test_scores_stand_with_their_protocol_and_only_inception_makes_an_fid():
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    torch.manual_seed(0)
    real = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    made = torch.randint(0, 200, (60, 3, 8, 8), dtype=torch.uint8)
    found = judge_images(
        real.split(20), [(part, ["a"] * 20) for part in made.split(20)], PROTOCOL, network=Colours()
    )
    scores, protocol = found["scores"], found["protocol"]
    assert set(scores) == {"FD_Colours", "density", "coverage"}
    network = Colours()
    ours = frechet_distance(network(real).detach(), network(made).detach())
    assert scores["FD_Colours"] == pytest.approx(ours, rel=0.02, abs=SAME)
    assert protocol["reference_images"] == protocol["generated_images"] == 60
    assert protocol["libraries"]["torchmetrics"] == torchmetrics.__version__
    assert len(protocol["feature_networks"]["FD_Colours"]) == 16
    assert json.dumps(found)
    assert FrechetInceptionDistance is not None


def test_weights_that_cannot_be_fetched_are_said(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")
    from torchmetrics.image import fid

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(fid, "NoTrainInceptionV3", unreachable)
    with pytest.raises(BackboneError, match="Inception"):
        judge_images([], [], PROTOCOL)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_held_out_error_is_that_of_the_answers_by_bucket_of_time(kind):
    objective = Objective(kind, linear_alphas() if kind == "epsilon" else None)
    data = EncodedPairs(
        torch.zeros(10, 1, 2, 2),
        torch.zeros(10, 1, 2, 2),
        {"c": torch.zeros(1, 1)},
        torch.zeros(10, dtype=torch.long),
        {"c": torch.zeros(1, 1)},
        ("",) * 10,
        "k",
    )
    seen = []

    def denoiser(x, t, conditions):
        seen.append(t)
        return torch.zeros_like(x)

    found = held_out_error(denoiser, objective, data, buckets=4, batch=4)
    # The target is noise (or noise less nothing) of variance one.
    assert found.mean == pytest.approx(1.0, abs=0.4) and len(found.buckets) == 4
    scale = 1000
    for bucket in range(4):
        for t in seen[bucket * 3 : bucket * 3 + 3]:
            assert (t >= bucket * scale / 4 - 1).all() and (t <= (bucket + 1) * scale / 4).all()
    again = held_out_error(denoiser, objective, data, buckets=4, batch=4)
    assert again == found


def test_the_coco_recipe_says_what_it_needs_and_runs_nothing(tmp_path):
    pytest.importorskip("diffusers")
    recipe = RECIPES / "coco2017.py"
    child = Child([recipe, "--coco", tmp_path, "--pipeline", tmp_path])
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "train2017.zip" in errors and "Traceback" not in errors


@pytest.mark.parametrize("method", ["none", "res-tuning-bypass"])
def test_the_coco_recipe_shows_ours_beside_what_is_published(method, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("diffusers")
    from diffusion.pipelines import SIDE, sd15

    sd15(tmp_path).save_pretrained(tmp_path / "pipeline")
    write_coco(tmp_path / "coco")
    main = runpy.run_path(str(RECIPES / "coco2017.py"))["main"]

    def judge(reference, generated, protocol, clip):
        # Inception cannot be fetched here: its place, and so the name of the score, is taken.
        found = judge_images(reference, generated, protocol, network=Colours())
        found["scores"]["FID"] = found["scores"].pop("FD_Colours")
        return found

    main.__globals__["judge_images"] = judge
    sizes = [
        f"--size={SIDE}",
        "--steps=2",
        "--batch-size=4",
        "--sample-steps=1",
        f"--images={IMAGES}",
    ]
    places = [f"--{name}={tmp_path / name}" for name in ("coco", "pipeline", "out")]
    main([*places, *sizes, f"--method={method}"])
    told = capsys.readouterr().out
    fid = json.loads((tmp_path / "out" / method / "scores.json").read_text())["scores"]["FID"]
    published = {"none": "15.48", "res-tuning-bypass": "14.89"}[method]
    verdict = "reached" if fid <= float(published) else "MISSED"
    assert f"{fid:.2f} / {published}, {verdict}" in told
    assert ("- / -" if method == "none" else " / 3.76") in told


IMAGES = 8
"""More than the neighbours that density and coverage look at."""


def write_coco(folder):
    """COCO2017's layout, with a few plain pictures."""
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir()
        images, notes = [], []
        for number in range(IMAGES):
            name = f"{number:012}.png"
            Image.new("RGB", (20, 24), (30 * number, 90, 200)).save(folder / f"{split}2017" / name)
            images.append({"id": number, "file_name": name})
            notes.append({"image_id": number, "caption": f"a plain picture {number}"})
        written = json.dumps({"images": images, "annotations": notes})
        (folder / "annotations" / f"captions_{split}2017.json").write_text(written)


def test_the_procedural_pictures_show_what_their_captions_say():
    sys.path.insert(0, str(RECIPES / "image_generation"))
    try:
        import shapes
    finally:
        sys.path.pop(0)
    scene = shapes.Scene("square", "blue", "large", "top right")
    image = shapes.picture(scene, "plain", 1)
    assert image.shape == (3, 32, 32) and torch.equal(image, shapes.picture(scene, "plain", 1))
    assert image[2, 10, 22] > image[0, 10, 22] and image[:, 26, 6].max() < -0.5
    assert shapes.picture(scene, "paper", 1)[:, 26, 6].min() > 0.5
    assert scene.caption == "a large blue square at the top right"
    row = shapes.tokens([scene.caption, ""])
    assert row.shape == (2, shapes.LENGTH)
    assert shapes.WORDS[row[0][2]] == "blue" and shapes.WORDS[row[1][0]] == "<end>"
    assert shapes.scenes(5, 3) == shapes.scenes(5, 3)

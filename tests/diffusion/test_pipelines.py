"""Pipelines of every kind are trained on what they sample with."""

import pytest
import torch

from awake import wake
from diffusion.pipelines import PIPELINES
from diffusion.test_pairs import folder
from restuning import Host, Tuned, methods
from restuning._errors import BackboneError
from restuning.backbones.conditions import nest_conditions
from restuning.backbones.diffusion import text_to_image
from restuning.diffusion import (
    DenoiserSettings,
    DenoiserTraining,
    Objective,
    encode,
    load_pairs,
    train_denoiser,
)

pytest.importorskip("diffusers")
CAPTION = "a red ball"


@pytest.fixture(scope="module", params=list(PIPELINES))
def parts(request, tmp_path_factory):
    return text_to_image(PIPELINES[request.param](tmp_path_factory.mktemp(request.param)))


def heard(parts, prompt, guidance):
    """What the pipeline gives its denoiser at the first step."""
    found = []
    handle = parts.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    parts.generate([prompt], steps=2, guidance=guidance)
    handle.remove()
    return found[0]


def same(ours, theirs, row):
    if isinstance(ours, dict):
        assert ours.keys() <= theirs.keys()
        for name in ours:
            same(ours[name], theirs[name], row)
    elif ours is None:
        assert theirs is None
    else:
        wanted = theirs if theirs.shape == ours.shape else theirs[row : row + 1]
        assert torch.equal(ours, wanted.to(ours.dtype))


def test_the_denoiser_is_told_in_training_what_its_pipeline_tells_it(parts):
    args, kwargs = heard(parts, CAPTION, guidance=1.0)
    ours = {**nest_conditions(parts.texts([CAPTION])), **parts.fixed}
    distilled = ours.pop("guidance", None)
    same(ours, kwargs, 0)
    assert (distilled is None) == (kwargs.get("guidance") is None)
    # All that is a condition is told: what is left are latents, time and switches.
    told = {n for n, v in kwargs.items() if torch.is_tensor(v) or (isinstance(v, dict) and v)}
    assert told <= {*ours, "hidden_states", "timestep", "guidance"}
    sample = args[0] if args else kwargs["hidden_states"]
    assert parts.example[0][0].shape == sample.shape


def test_a_dropped_caption_is_what_guidance_leads_away_from(parts):
    if "guidance" in parts.texts([CAPTION]):
        pytest.skip("its guidance is distilled: no second prediction")
    _, kwargs = heard(parts, CAPTION, guidance=4.0)
    same({**nest_conditions(parts.texts([""])), **parts.fixed}, kwargs, 0)


@pytest.mark.parametrize("method", ["res-tuning", "res-tuning-bypass"])
def test_a_pipeline_is_trained_and_draws_with_its_task(parts, method, tmp_path):
    (tmp_path / "images").mkdir()
    folder(tmp_path / "images")
    data = encode(load_pairs(tmp_path / "images"), parts, parts.size)
    args, kwargs = parts.example
    host = Host(parts.denoiser, *args, **kwargs)
    task = wake(methods.build(method, host, rank=3), 1)
    before = [p.detach().clone() for p in task.parameters()]
    objective = Objective(parts.objective, parts.alphas, time_scale=parts.conditioning.time_scale)
    settings = DenoiserSettings(steps=2, batch_size=3, lr=1e-2, warmup_steps=0)
    bare = parts.generate([CAPTION], steps=2)
    train_denoiser(
        DenoiserTraining(
            host, {"a": task}, data, objective, settings, tmp_path / "run", parts.fixed
        )
    )
    assert all(not torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    assert Tuned(host, task)(*args, **kwargs)[0].shape[0] == 1
    tuned = parts.generate([CAPTION], steps=2, using=host.using(task))
    assert tuned.shape == (1, 3, parts.size, parts.size)
    assert not torch.equal(tuned, bare)
    host.release()
    assert torch.equal(parts.generate([CAPTION], steps=2), bare)


def test_every_encoder_and_tokenizer_is_part_of_the_key(parts):
    names = [n for n, p in parts.pipeline.components.items() if p is not None]
    wanted = {n for n in names if n.startswith(("text_encoder", "tokenizer"))}
    assert wanted < parts.identity().keys()


@pytest.mark.parametrize("name", ["sd15"])
def test_a_pipeline_that_lacks_a_part_or_has_an_unknown_denoiser_is_sent_to_python(name, tmp_path):
    pipeline = PIPELINES[name](tmp_path)
    pipeline.register_modules(unet=torch.nn.Linear(2, 2))
    with pytest.raises(BackboneError, match=r"Linear.*\n.*Python"):
        text_to_image(pipeline)
    pipeline.register_modules(text_encoder=None)
    with pytest.raises(BackboneError, match=r"text_encoder.*\n.*Python"):
        text_to_image(pipeline)

"""Noising, targets, weights and sampling."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from restuning._errors import TrainingError
from restuning.diffusion import Objective, linear_alphas, sample
from restuning.diffusion.sample import _time_grid

EXACT = 1e-4
"""fp32 through square roots of numbers as small as 4e-5 (the last step of the linear schedule)."""


def objectives():
    alphas = linear_alphas()
    return [Objective("epsilon", alphas), Objective("v", alphas), Objective("flow")]


@pytest.mark.parametrize("objective", objectives(), ids=lambda o: o.kind)
def test_a_right_answer_gives_back_sample_and_noise(objective):
    clean, noise = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4)
    times = objective.draw_times(6, torch.Generator().manual_seed(0))
    if objective.kind != "flow":
        times = times.clamp(max=700)
    noised = objective.add_noise(clean, noise, times)
    back, implied = objective.clean_and_noise(noised.sample, noised.target, times)
    assert torch.allclose(back, clean, atol=EXACT * 100)
    assert torch.allclose(implied, noise, atol=EXACT * 100)


@pytest.mark.parametrize("objective", objectives(), ids=lambda o: o.kind)
def test_a_perfect_denoiser_samples_the_only_picture_it_knows(objective):
    picture = torch.randn(1, 3, 4, 4)

    def perfect(x, told, conditions):
        times = told / objective.time_scale if objective.kind == "flow" else told.long()
        if objective.kind == "flow":
            return (x - picture) / times.view(-1, 1, 1, 1).clamp_min(1e-6)
        a = objective.alphas[times].view(-1, 1, 1, 1)
        noise = (x - a.sqrt() * picture) / (1 - a).sqrt()
        return noise if objective.kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * picture

    found = sample(perfect, objective, torch.randn(2, 3, 4, 4), {}, steps=10)
    assert torch.allclose(found, picture.expand(2, -1, -1, -1), atol=1e-3)


def test_ddim_steps_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(8)
    alphas = linear_alphas()
    assert torch.allclose(alphas, scheduler.alphas_cumprod, atol=1e-6)
    assert _time_grid(Objective("epsilon", alphas), 8)[:-1].tolist() == scheduler.timesteps.tolist()
    weight = torch.randn(3, 3) * 0.2

    def denoiser(x, t, conditions):
        return torch.einsum("ij,bjhw->bihw", weight, x) + t.view(-1, 1, 1, 1) / 2000

    start = torch.randn(2, 3, 4, 4)
    ours = sample(denoiser, Objective("epsilon", alphas), start, {}, steps=8)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t.expand(2), {}), t, x).prev_sample
    assert torch.allclose(ours, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


def test_guidance_is_the_difference_of_two_answers_in_one_batch():
    calls = []

    def denoiser(x, t, conditions):
        calls.append(len(x))
        return conditions["c"].view(-1, 1, 1, 1).expand_as(x)

    objective = Objective("flow")
    start = torch.zeros(3, 1, 2, 2)
    found = sample(
        denoiser,
        objective,
        start,
        {"c": torch.tensor([1.0, 2.0, 3.0])},
        steps=1,
        guidance=2.0,
        empty={"c": torch.tensor([0.5])},
    )
    assert calls == [6]
    wanted = -(0.5 + 2.0 * (torch.tensor([1.0, 2.0, 3.0]) - 0.5))
    assert torch.allclose(found[:, 0, 0, 0], wanted)


@given(st.integers(0, 999), st.floats(0.1, 20))
def test_min_snr_weights_never_exceed_those_without_a_cap(step, cap):
    alphas = linear_alphas()
    x = torch.randn(1, 1, 2, 2)
    for kind in ("epsilon", "v"):
        weight = Objective(kind, alphas, cap).add_noise(x, x, torch.tensor([step])).weight
        ratio = alphas[step] / (1 - alphas[step])
        wanted = ratio.clamp(max=cap) / (ratio if kind == "epsilon" else ratio + 1)
        assert torch.allclose(weight, wanted[None])
        assert 0 < weight <= 1


def test_objectives_that_lack_something_say_so():
    for given_, word in ((("x",), "objective"), (("v",), "schedule"), (("flow", None, 5.0), "SNR")):
        with pytest.raises(TrainingError, match=word):
            Objective(*given_)

"""A bypass beside a UNet's decoder or a diffusion transformer's blocks."""

import copy

import pytest
import torch

from awake import wake
from diffusion.small import CASES, dit, flux, sampled, stable_diffusion, unet
from restuning import (
    Blend,
    FilmAdapter,
    Guided,
    Host,
    PerRow,
    Task,
    Tuned,
    UNetBypass,
    load,
    methods,
    save,
)
from restuning._errors import (
    BackboneChangedError,
    FormatError,
    MissingInputError,
    NoSitesError,
    WrongTaskError,
)
from restuning.forecast.ledger import SavedTensors

pytest.importorskip("diffusers")

BATCHED = 2e-5
"""One forward of two rows against two of one row: other kernels, fp32, values of about one."""

ROUNDED = 2**-5
"""The same in bf16, whose last bit is 2^-8 of a value: eight of them, a layer rounding one."""


def hosted(case):
    return Host(case.model, *case.args, **case.kwargs)


def bypass_task(host, **options):
    return methods.build("res-tuning-bypass", host, rank=4, **options)


FORMS = [{}, {"kernel": 3}, {"form": "replace"}, {"form": "replace", "kernel": 3}, {"film": False}]


@pytest.mark.parametrize("options", FORMS)
def test_a_fresh_bypass_of_a_unet_changes_nothing_to_the_last_bit(options):
    case = unet()
    host = hosted(case)
    before = case()
    task = bypass_task(host, **options)
    assert isinstance(task.side, UNetBypass)
    assert torch.equal(Tuned(host, task)(*case.args, **case.kwargs).sample, before)
    wake(task, 3)
    assert not torch.equal(Tuned(host, task)(*case.args, **case.kwargs).sample, before)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_a_fresh_bypass_of_a_transformer_changes_nothing_to_the_last_bit(name):
    case = CASES[name]()
    host = hosted(case)
    before = case()
    task = bypass_task(host, time_scale=1000.0 if name == "flux" else 1.0)
    assert torch.equal(Tuned(host, task)(*case.args, **case.kwargs).sample, before)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_a_bypass_gets_a_gradient_and_none_enters_the_backbone(name):
    case = CASES[name]()
    host = hosted(case)
    task = wake(bypass_task(host), 1)
    graphs = []
    handles = [
        m.register_forward_hook(
            lambda m, a, out: graphs.append(any(t.grad_fn is not None for t in _tensors(out)))
        )
        for m in (case.model.get_submodule(s.module) for s in host.sites.pick("mha").values())
    ]
    Tuned(host, task)(*case.args, **case.kwargs).sample.square().mean().backward()
    [h.remove() for h in handles]
    assert graphs and not any(graphs)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in task.parameters())
    assert all(p.grad is None for p in case.model.parameters())


def _tensors(out):
    return [t for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]


def test_all_stages_of_a_correcting_bypass_learn_from_the_first_step():
    case = unet()
    host = hosted(case)
    task = bypass_task(host)
    Tuned(host, task)(*case.args, **case.kwargs).sample.square().mean().backward()
    assert all(t.up.weight.grad.abs().max() > 0 for t in task.side.horizontal)


def test_a_replacing_bypass_is_the_recursion_of_the_released_example():
    """`x_l' = x_l + h(x_l) + up(M v(x_{l-1}'))` in plain lines."""
    host = hosted(unet())
    bypass = wake(bypass_task(host, form="replace", film=False), 2).side
    taps = {
        n: torch.randn(2, s, s, d)
        for n, s, d in zip(bypass.taps, (4, 8, 8), bypass.dims, strict=True)
    }
    x0, x1, x2 = taps.values()
    h, v, m = bypass.horizontal, bypass.vertical, bypass.maps
    state = x0 + h[0](x0)
    state = m[0](state + v[0](state)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    state = x1 + state + h[1](x1)
    state = x2 + m[1](state + v[1](state)) + h[2](x2)
    assert torch.allclose(bypass(taps), state, atol=BATCHED)


def test_a_convolution_between_stages_follows_the_growing_of_the_map():
    bypass = UNetBypass(["a", "b"], [3, 2], [None, None], [None], kernel=3, form="replace")
    with torch.no_grad():
        bypass.maps[0].weight.normal_()
    a, b = torch.randn(1, 2, 3, 3), torch.randn(1, 5, 6, 2)
    grown = torch.nn.functional.interpolate(a.movedim(-1, 1), (5, 6))
    wanted = b + bypass.maps[0](grown).movedim(1, -1)
    assert torch.allclose(bypass({"a": a, "b": b}), wanted)


@pytest.mark.parametrize("size", [(15, 13), (9, 16), (17, 17)])
def test_grids_that_do_not_halve_evenly_are_met(size):
    case = unet(size)
    host = hosted(unet())
    other = case.model
    assert type(other) is type(host.model)
    task = wake(bypass_task(host), 2)
    for options in ({}, {"kernel": 3}):
        task = bypass_task(host, **options)
        out = Tuned(host, task)(*case.args, **case.kwargs).sample
        assert torch.equal(out, host.model(*case.args, **case.kwargs).sample)
        wake(task, 2)
        assert Tuned(host, task)(*case.args, **case.kwargs).sample.shape == out.shape


@pytest.mark.parametrize("name", CASES)
def test_the_base_prediction_and_those_of_k_bypasses_come_from_one_forward(name):
    case = CASES[name]()
    host = hosted(case)
    tasks = [wake(bypass_task(host), seed) for seed in (1, 2, 3)]
    forwards = []
    first = case.model.get_submodule(host.sites["block.1"].module)
    handle = first.register_forward_hook(lambda *_: forwards.append(1))
    together = host.predict_side_by_side([t.side for t in tasks], *case.args, **case.kwargs)
    handle.remove()
    assert len(forwards) == 1
    assert (together[0] - case()).abs().max() < BATCHED
    for one, task in zip(together[1:], tasks, strict=True):
        alone = Tuned(host, task)(*case.args, **case.kwargs).sample
        assert (one - alone).abs().max() < BATCHED * alone.abs().max()


@pytest.mark.parametrize("name", ["unet", "dit", "sd3"])
def test_k_bypasses_train_on_one_backbone_forward_as_each_would_alone(name):
    case = CASES[name]()
    host = hosted(case)
    tasks = [wake(bypass_task(host), seed) for seed in (1, 2)]
    bypasses = [t.side for t in tasks]
    together = host.predict_side_by_side(bypasses, *case.args, base=False, **case.kwargs)
    together.square().mean((1, 2, 3, 4)).sum().backward()
    gradients = [[p.grad.clone() for p in t.parameters()] for t in tasks]
    for task, seen in zip(tasks, gradients, strict=True):
        task.zero_grad()
        Tuned(host, task)(*case.args, **case.kwargs).sample.square().mean().backward()
        for p, gradient in zip(task.parameters(), seen, strict=True):
            assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=1e-6)


def test_predictions_side_by_side_leave_nothing_open_when_the_tail_fails():
    case = unet()
    host = hosted(case)
    task = wake(bypass_task(host), 1)
    handle = case.model.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        host.predict_side_by_side([task.side], *case.args, **case.kwargs)
    handle.remove()
    assert torch.equal(torch.zeros(2) + 1, torch.ones(2))
    assert not torch._C._functorch.maybe_current_level()
    host.predict_side_by_side([task.side], *case.args, **case.kwargs)


@pytest.mark.parametrize("make", [unet, dit])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_denoiser_in_half_precision_is_given_what_training_has(make, autocast):
    case = make()
    case.model.to(torch.bfloat16)
    host = hosted(case)
    tasks = [wake(bypass_task(host), seed) for seed in (1, 2)]
    sides = [task.side for task in tasks]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together = host.predict_side_by_side(sides, *case.args, base=False, **case.kwargs)
        alone = [Tuned(host, task)(*case.args, **case.kwargs).sample for task in tasks]
    assert together.dtype == torch.bfloat16
    for one, other in zip(together, alone, strict=True):
        assert (one - other).abs().max() < ROUNDED * other.abs().max()


def test_a_change_is_noticed_by_predictions_side_by_side():
    case = unet()
    host = hosted(case)
    task = wake(bypass_task(host), 1)
    with torch.no_grad():
        case.model.conv_in.bias[0] += 1e-3
    with pytest.raises(BackboneChangedError, match=r"conv_in\.bias"):
        host.predict_side_by_side([task.side], *case.args, **case.kwargs)


def test_guidance_without_a_classifier_in_one_batch_equals_two_calls(tmp_path):
    case = unet()
    host = hosted(case)
    task = wake(bypass_task(host), 1)
    x, text = case.args[0][:1], case.kwargs["encoder_hidden_states"]
    with host.using(task), torch.no_grad():
        both = case.model(x.expand(2, -1, -1, -1), 7, encoder_hidden_states=text).sample
        single = [case.model(x, 7, encoder_hidden_states=t[None]).sample for t in text]
    assert (both - torch.cat(single)).abs().max() < BATCHED


def test_a_pipeline_is_guided_by_the_difference_to_the_base_prediction():
    case = unet()
    host = hosted(case)
    task = wake(bypass_task(host), 1)
    base, tuned = case(), Tuned(host, task)(*case.args, **case.kwargs).sample
    for scale in (0.0, 1.0, 2.5):
        with host.using(Guided(task, scale)):
            out = case()
        assert (out - (base + scale * (tuned - base))).abs().max() < 10 * BATCHED
    with pytest.raises(WrongTaskError, match="bypass"):
        Guided(methods.build("res-tuning[mha=adapter,ffn=adapter]", host), 2.0)


def test_strength_moves_the_last_stream_and_mixtures_add_up():
    case = unet()
    host = hosted(case)
    first, second = wake(bypass_task(host), 1), wake(bypass_task(host), 2)
    taps = host.features(*case.args, keep=first.side.taps, **case.kwargs)
    last = taps[first.side.taps[-1]]
    mixed = Blend((first, 0.5), (second, -1.0)).side(taps)
    wanted = last + 0.5 * (first.side(taps) - last) - (second.side(taps) - last)
    assert torch.allclose(mixed, wanted, atol=BATCHED)
    with host.using(Blend((first, 0.0))):
        assert torch.equal(case(), case())


@pytest.mark.parametrize("name", ["unet", "dit", "flux"])
def test_several_bypasses_are_sampled_in_one_batch_through_one_backbone(name):
    case = CASES[name]()
    host = hosted(case)
    tasks = [wake(bypass_task(host), 1), wake(bypass_task(host), 2)]
    with host.using(PerRow(tasks)):
        together = case()
    for row, task in enumerate(tasks):
        with host.using(task):
            assert (together[row] - case()[row]).abs().max() < BATCHED
    with host.using(PerRow([None, tasks[1]])):
        assert (case()[0] - _bare(case)[0]).abs().max() < BATCHED


def _bare(case):
    """Of a copy without any hook."""
    model = copy.deepcopy(case.model)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with torch.no_grad():
        return model(*case.args, **case.kwargs).sample


def test_a_bypass_runs_in_an_untouched_pipeline_which_is_bit_equal_after_it(tmp_path):
    pipeline = stable_diffusion(tmp_path)
    before = sampled(pipeline, ["a red ball", "a blue box"])
    example = unet()
    host = Host(pipeline.unet, *example.args, **example.kwargs)
    tasks = [wake(bypass_task(host), seed) for seed in (1, 2)]
    with host.using(tasks[0]):
        one = sampled(pipeline, ["a red ball", "a blue box"])
    with host.using(PerRow(tasks)):
        each = sampled(pipeline, ["a red ball", "a blue box"])
    assert (one[0] - each[0]).abs().max() < 10 * BATCHED
    assert (one[1] - each[1]).abs().max() > 1e-3
    with host.using(Guided(tasks[0], 1.0)):
        guided = sampled(pipeline, ["a red ball", "a blue box"])
    assert (guided - one).abs().max() < 10 * BATCHED
    assert torch.equal(sampled(pipeline, ["a red ball", "a blue box"]), before)


@pytest.mark.parametrize("name", ["unet", "flux"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_bypass_is_saved_and_loaded_whole(tmp_path, name, kernel):
    case = CASES[name]()
    host = hosted(case)
    options = {"kernel": kernel, "form": "replace"} if name == "unet" else {"time_scale": 1000.0}
    task = wake(bypass_task(host, **options), 1)
    save(task, host, tmp_path / "style.task", backbone="diffusers:somewhere/unet")
    again = load(tmp_path / "style.task", host)
    assert again.spec() == task.spec()
    ours, theirs = (Tuned(host, t)(*case.args, **case.kwargs).sample for t in (task, again))
    assert torch.equal(ours, theirs)


def test_the_time_step_reaches_the_tuners_of_a_bypass_and_of_inline_tasks():
    case = unet()
    host = hosted(case)
    inline = Task.inline(
        host.sites.pick("mha"), lambda s: wake(FilmAdapter(s.dim, rank=3), s.layer)
    )
    for task in (wake(bypass_task(host), 1), inline):
        seen = {}
        film = next(t for t in task.modules() if isinstance(t, FilmAdapter)).film
        handle = film.register_forward_hook(lambda m, a, out, seen=seen: seen.update(x=a[0]))
        with host.using(task):
            case()
            assert seen["x"].shape[0] == 2 and not torch.equal(*seen["x"])
            with torch.no_grad():
                case.model(case.args[0], 7, **case.kwargs)
            assert seen["x"].shape[0] == 1
        handle.remove()


def test_a_time_aware_tuner_says_what_is_missing_on_other_backbones():
    with pytest.raises(MissingInputError, match="time step"):
        FilmAdapter(8)(torch.zeros(1, 2, 8))


def test_a_bypass_of_a_unet_is_refused_where_there_is_no_decoder_and_in_forms_that_do_not_exist():
    host = hosted(dit())
    with pytest.raises(NoSitesError, match="decoder"):
        UNetBypass.plan(host.sites, None, None)
    with pytest.raises(FormatError, match="kernel"):
        bypass_task(hosted(unet()), kernel=5)


def test_a_step_of_a_bypass_saves_a_fraction_of_what_full_tuning_saves():
    case = unet(32, block_out_channels=(32, 64))
    host = hosted(case)
    task = wake(bypass_task(host), 1)

    def saved(run, weights):
        with (ledger := SavedTensors(weights)).hooks():
            out = run()
        size = ledger.bytes()
        assert out.requires_grad
        return size

    weights = [*case.model.parameters(), *task.parameters()]
    ours = saved(lambda: Tuned(host, task)(*case.args, **case.kwargs).sample, weights)
    case.model.requires_grad_(True)
    full = saved(lambda: case.model(*case.args, **case.kwargs).sample, weights)
    case.model.requires_grad_(False)
    assert ours < 0.2 * full


def test_flux_counts_time_from_nought_to_one():
    host = hosted(flux())
    task = bypass_task(host, time_scale=1000.0)
    assert all(t.time_scale == 1000.0 for t in task.side.tuners)

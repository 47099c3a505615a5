"""Hosts for denoisers and pipelines of diffusers: where they can be tuned, and what is left behind."""

import pytest
import torch

from awake import wake
from diffusion.small import CASES, dit, flux, pixart, sampled, sd3, stable_diffusion, unet
from restuning import Blend, Host, PerRow, ResAdapter, Task, Tuned, methods
from restuning._errors import ProjectionsError, TunerShapeError, WrongTaskError

pytest.importorskip("diffusers")

SUM = 2e-5
"""Two orders of the same sum in fp32, on values of about one."""


def hosted(case):
    return Host(case.model, *case.args, **case.kwargs)


def awake_task(host, name="res-tuning[mha=adapter,ffn=adapter]", seed=3, **options):
    return wake(methods.build(name, host, rank=4, **options), seed)


@pytest.mark.parametrize("name", CASES)
def test_operations_are_found_by_structure_and_proved_by_one_forward(name):
    host = hosted(CASES[name]())
    wanted = {
        "unet": {"mha", "cross", "ffn", "block", "stage"},
        "pixart": {"mha", "cross", "ffn", "block"},
    }
    assert {s.op for s in host.sites.values()} == wanted.get(name, {"mha", "ffn", "block"})
    operations = [s for s in host.sites.values() if s.op in ("mha", "cross", "ffn")]
    assert all(s.proof == "residual" for s in operations)
    gated = {s.op for s in host.sites.values() if s.gated}
    assert gated == (set() if name == "unet" else {"mha", "ffn"})


def test_resnet_and_transformer_blocks_of_a_unet_are_sites_and_its_decoder_stages_are_taps():
    host = hosted(unet())
    assert [s.module for s in host.sites.pick("stage").values()] == [
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    ]
    blocks = [s.module for s in host.sites.pick("block").values()]
    assert sum("resnets" in path for path in blocks) == 8
    assert sum("transformer_blocks" in path for path in blocks) == 4
    assert host.sites.taps[-1] == "stage.3" and "start.2" not in host.sites.taps


@pytest.mark.parametrize("words", [5, 16])
@pytest.mark.parametrize("make", [sd3, flux])
def test_the_image_stream_is_told_from_the_text_stream_of_joint_blocks(make, words):
    case = make(words)
    host = hosted(case)
    taps = host.features(*case.args, **case.kwargs)
    seen = {}
    names = [s.module for s in host.sites.pick("block").values()]
    handles = [
        case.model.get_submodule(n).register_forward_hook(
            lambda m, a, out, n=n: seen.update({n: out[1]})
        )
        for n in names
    ]
    case()
    [h.remove() for h in handles]
    for layer, n in enumerate(names, 1):
        assert torch.equal(taps[f"block.{layer}"], seen[n])


@pytest.mark.parametrize("name", CASES)
def test_without_a_task_the_denoiser_answers_bit_for_bit(name):
    case = CASES[name]()
    before = case()
    host = hosted(case)
    assert torch.equal(case(), before)
    with host.using(awake_task(host)):
        assert not torch.equal(case(), before)
    assert torch.equal(case(), before)
    host.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


@pytest.mark.parametrize("make", [dit, sd3, flux])
def test_a_tuner_of_a_gated_branch_is_added_at_the_residual_sum(make):
    """Adding delta at the sum equals adding delta / gate to what the attention returns."""
    case = make()
    host = hosted(case)
    site = host.sites["mha.1"]
    delta = torch.randn(site.dim) * 0.1
    tuner = ResAdapter(site.dim, rank=2, zero=True)
    with torch.no_grad():
        tuner.up.bias.copy_(delta)
    with host.using(Task(tuners={"mha.1": tuner})):
        ours = case()
    block = case.model.get_submodule(site.leave)
    gates = []
    first = block.norm1.register_forward_hook(lambda m, a, out: gates.append(out[1]))

    def beside(module, args, out):
        added = delta / gates[-1].unsqueeze(1)
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    second = case.model.get_submodule(site.module).register_forward_hook(beside)
    wanted, bare = case(), None
    first.remove()
    second.remove()
    bare = case()
    assert (ours - wanted).abs().max() < SUM * wanted.abs().max()
    assert (ours - bare).abs().max() > 1e-3


def test_a_gated_block_with_cross_attention_runs_as_it_is_written_with_tuners():
    """PixArt's block in plain lines."""
    case = pixart()
    host = hosted(case)
    task = awake_task(host, "res-tuning[mha=adapter,cross=adapter,ffn=adapter]", scale="none")
    given, returned = {}, []
    block = case.model.transformer_blocks[0]
    handles = [
        block.register_forward_pre_hook(
            lambda m, a, k: given.update(k, hidden_states=a[0]), with_kwargs=True
        ),
        block.register_forward_hook(lambda m, a, out: returned.append(out)),
    ]
    with host.using(task):
        case()
    [h.remove() for h in handles]
    t = task.inline_tuners
    x = given["hidden_states"]
    with torch.no_grad():
        table = block.scale_shift_table[None] + given["timestep"].reshape(2, 6, -1)
        shift, scale, gate, shift2, scale2, gate2 = table.chunk(6, 1)
        x = x + gate * block.attn1(block.norm1(x) * (1 + scale) + shift) + t["mha.1"](x)
        x = (
            x
            + t["cross.1"](x)
            + block.attn2(
                x,
                encoder_hidden_states=given["encoder_hidden_states"],
                attention_mask=given["encoder_attention_mask"],
            )
        )
        x = x + t["ffn.1"](x) + gate2 * block.ff(block.norm2(x) * (1 + scale2) + shift2)
    assert (returned[0] - x).abs().max() < SUM * x.abs().max()


def test_a_sequential_adapter_works_on_what_the_operation_returns_before_its_gate():
    case = dit()
    host = hosted(case)
    task = awake_task(host, "adapter")
    with host.using(task):
        ours = case()
    handles = [
        case.model.get_submodule(host.sites[name].module).register_forward_hook(
            lambda m, a, out, tuner=tuner: out + tuner(out)
        )
        for name, tuner in task.inline_tuners.items()
    ]
    assert (ours - case()).abs().max() < SUM * ours.abs().max()
    [h.remove() for h in handles]


@pytest.mark.parametrize("name", CASES)
def test_every_inline_tuner_of_a_denoiser_gets_a_gradient_and_no_weight_does(name):
    case = CASES[name]()
    host = hosted(case)
    ops = [op for op in ("mha", "cross", "ffn") if any(s.op == op for s in host.sites.values())]
    task = awake_task(host, f"res-tuning[{','.join(f'{op}=adapter' for op in ops)},block=adapter]")
    out = Tuned(host, task)(*case.args, **case.kwargs)
    out.sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in task.parameters())
    assert all(p.grad is None for p in case.model.parameters())


def test_checkpointing_gated_blocks_keeps_gradients_equal():
    case = dit()
    host = hosted(case)
    task = awake_task(host)
    gradients = []
    for on in (False, True):
        host.checkpoint(on)
        task.zero_grad()
        Tuned(host, task)(*case.args, **case.kwargs).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in task.parameters()])
    host.checkpoint(False)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*gradients, strict=True))


def test_prefix_and_prompt_borrow_maps_in_a_unet():
    case = unet()
    host = hosted(case)
    for kind in ("prefix", "prompt"):
        name = f"res-tuning[mha={kind},cross={kind},ffn=adapter]"
        task = wake(methods.build(name, host, rank=3), 1)
        assert all(t.query == "mha" for t in task.modules() if hasattr(t, "query"))
        out = Tuned(host, task)(*case.args, **case.kwargs).sample
        out.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in task.parameters())


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_prefix_and_prompt_take_the_stream_as_queries_where_a_norm_is_modulated(name, kind):
    case = CASES[name]()
    host, bare = hosted(case), case()
    task = methods.build(f"res-tuning[mha={kind},ffn={kind}]", host, rank=3)
    queries = {n: t.query for n, t in task.named_modules() if hasattr(t, "query")}
    assert queries and set(queries.values()) == {"stream"}
    with host.using(task):
        assert torch.equal(case(), bare)
    Tuned(host, wake(task, 1))(*case.args, **case.kwargs).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in task.parameters())
    with host.using(task):
        assert not torch.equal(case(), bare)


def test_maps_are_still_borrowed_beside_a_modulated_norm_and_refused_at_it():
    case = pixart()
    host = hosted(case)
    cross = methods.build("res-tuning[cross=prefix]", host, rank=3)
    assert {t.query for t in cross.modules() if hasattr(t, "query")} == {"mha"}
    with host.using(wake(cross, 1)):
        case()
    task = methods.build("res-tuning[mha=prefix,ffn=adapter]", host, rank=3, query="mha")
    with pytest.raises(ProjectionsError, match="stream"), host.using(task):
        case()


def test_exact_prefix_tuning_of_cross_attention_equals_longer_keys():
    """The identity of the paper, where the layer reads a text: keys and values of the text grow."""
    case = unet()
    host = hosted(case)
    site = host.sites["cross.2"]
    task = methods.build("res-tuning[cross=prefix]", host, rank=3, scale="exact", layers=[2])
    wake(task, 2)
    with host.using(task):
        ours = case()
    tuner = task.inline_tuners["cross.2"].tuner
    attention = case.model.get_submodule(site.module)
    handles = [
        attention.to_k.register_forward_hook(
            lambda m, a, out: torch.cat([out, tuner.k.expand(len(out), -1, -1)], 1)
        ),
        attention.to_v.register_forward_hook(
            lambda m, a, out: torch.cat([out, tuner.v.expand(len(out), -1, -1)], 1)
        ),
    ]
    wanted = case()
    [h.remove() for h in handles]
    assert (ours - wanted).abs().max() < SUM * wanted.abs().max()
    assert (ours - case()).abs().max() > 1e-4


def test_an_untouched_pipeline_uses_a_task_inside_the_block_and_is_bit_equal_after_it(tmp_path):
    pipeline = stable_diffusion(tmp_path)
    before = sampled(pipeline, "a red ball")
    keys = list(pipeline.unet.state_dict())
    example = unet()
    host = Host(pipeline.unet, *example.args, **example.kwargs)
    task = awake_task(host)
    with host.using(task):
        tuned = sampled(pipeline, "a red ball")
    assert not torch.equal(tuned, before)
    assert torch.equal(sampled(pipeline, "a red ball"), before)
    assert list(pipeline.unet.state_dict()) == keys


def test_a_pipeline_is_bit_equal_after_an_error_inside_the_block(tmp_path):
    pipeline = stable_diffusion(tmp_path)
    before = sampled(pipeline, "a red ball")
    example = unet()
    host = Host(pipeline.unet, *example.args, **example.kwargs)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), host.using(awake_task(host)):
        sampled(pipeline, "a red ball", callback_on_step_end=stop)
    assert torch.equal(sampled(pipeline, "a red ball"), before)


def test_styles_are_chosen_per_call_and_mixed_by_weight(tmp_path):
    pipeline = stable_diffusion(tmp_path)
    example = unet()
    host = Host(pipeline.unet, *example.args, **example.kwargs)
    first, second = awake_task(host, seed=1), awake_task(host, seed=2)

    def with_task(task):
        with host.using(task):
            return sampled(pipeline, "a red ball")

    bare, one, two = with_task(None), with_task(first), with_task(second)
    assert not torch.equal(one, two)
    assert torch.equal(with_task(Blend((first, 1.0))), one)
    assert torch.equal(with_task(Blend((first, 0.0))), bare)
    assert torch.equal(with_task(Blend((first, 1.0), (second, 0.0))), one)
    half = with_task(Blend((first, 0.5), (second, 0.5)))
    assert not any(torch.equal(half, other) for other in (bare, one, two))


def test_a_blend_adds_the_weighted_deltas_of_its_tasks():
    case = dit()
    host = hosted(case)
    first, second = awake_task(host, seed=1), awake_task(host, seed=2)
    both = Blend((first, 0.3), (second, -0.7)).inline_tuners
    x, y = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for name, tuner in both.items():
        wanted = y + 0.3 * first.inline_tuners[name](x) - 0.7 * second.inline_tuners[name](x)
        assert torch.allclose(tuner.added(y, x), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_rows_give_every_input_of_a_batch_its_own_task(name):
    case = CASES[name]()
    host = hosted(case)
    tasks = [awake_task(host, seed=1), None]
    with host.using(PerRow(tasks)):
        together = case()
    for row, task in enumerate(tasks):
        with host.using(task):
            assert torch.allclose(together[row], case()[row], atol=SUM)


def test_a_batch_for_rows_must_divide_and_tasks_with_heads_are_refused():
    case = unet()
    host = hosted(case)
    with pytest.raises(TunerShapeError, match="divide"), host.using(PerRow([awake_task(host)] * 3)):
        case()
    with pytest.raises(WrongTaskError, match="head"):
        Blend((methods.build("res-tuning", host, num_classes=3), 1.0))


def test_a_text_encoder_is_a_backbone_too(tmp_path):
    pipeline = stable_diffusion(tmp_path)
    before = sampled(pipeline, "a red ball")
    host = Host(pipeline.text_encoder, torch.tensor([[78, 1, 2, 3, 79, 79]]))
    assert {s.op for s in host.sites.values()} == {"mha", "ffn", "block"}
    with host.using(awake_task(host)):
        assert not torch.equal(sampled(pipeline, "a red ball"), before)
    assert torch.equal(sampled(pipeline, "a red ball"), before)


def test_exact_prompt_tuning_of_cross_attention_equals_a_longer_text():
    case = unet()
    host = hosted(case)
    task = wake(methods.build("res-tuning[cross=prompt]", host, rank=3, scale="exact"), 2)
    with host.using(task):
        ours = case()
    handles = []
    for name, tuner in task.inline_tuners.items():
        attention = case.model.get_submodule(host.sites[name].module)

        def longer(m, args, kwargs, prompt=tuner.tuner.prompt):
            text = kwargs["encoder_hidden_states"]
            text = torch.cat([text, prompt.expand(len(text), -1, -1)], 1)
            return args, {**kwargs, "encoder_hidden_states": text}

        handles.append(attention.register_forward_pre_hook(longer, with_kwargs=True))
    wanted = case()
    [h.remove() for h in handles]
    assert (ours - wanted).abs().max() < SUM * wanted.abs().max()
    assert (ours - case()).abs().max() > 1e-4

"""LoRA at linear sites is PEFT's LoRA: outputs and gradients, with the same weights, family by family."""

import pytest
import torch
from torch import nn

from awake import tiny_vit
from peft_families import (
    FAMILIES,
    GROUPED,
    first,
    give_weights,
    host_of,
    run,
    weights_of,
    with_peft,
)
from restuning import Host, Tuned, methods

pytest.importorskip("peft")

EXACT = 1e-12
"""Relative to the largest value, in double precision: nothing but the order of a sum may differ."""

TOLERANCE = 1e-5
"""The same in single precision: networks that were not trained double what rounding makes, layer by layer."""


def pair(family, dtype=torch.float32, **options):
    """A task of ours with numbers in B, on a host, and PEFT's model with the same numbers."""
    model = family.make().to(dtype)
    options = {"rank": 4, "alpha": 6.0, **options}
    theirs = {"r": options["rank"], "lora_alpha": options["alpha"]}
    theirs["use_rslora"] = bool(options.get("rslora", False))
    theirs["lora_dropout"] = options.get("dropout", 0.0)
    host = host_of(family, model, inputs_of(family, dtype))
    torch.manual_seed(3)
    task = methods.build("lora", host, targets=family.targets, zero=False, **options).to(dtype)
    plain = family.make().to(dtype)
    wrapped = with_peft(plain, host.sites.linear.pick(*family.targets), **theirs).to(dtype)
    give_weights(task, host, wrapped)
    return host, task, wrapped


def inputs_of(family, dtype):
    inputs = family.inputs()
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


def assert_close(ours, theirs, tolerance):
    size = theirs.abs().max()
    assert size > 0
    assert (ours - theirs).abs().max() <= tolerance * size


@pytest.mark.parametrize("family", [*FAMILIES.values(), GROUPED], ids=[*FAMILIES, "ResNeXt"])
def test_outputs_and_gradients_are_pefts(family):
    host, task, wrapped = pair(family, torch.float64)
    inputs = inputs_of(family, torch.float64)
    bare = first(run(host, inputs))
    ours, theirs = first(run(Tuned(host, task), inputs)), first(run(wrapped, inputs))
    assert not torch.allclose(ours, bare, atol=1e-3)
    assert_close(ours, theirs, EXACT)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5)).double()
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    for site, tuner in task.inline_tuners.items():
        own = tuner.a.weight, tuner.b.weight
        peers = weights_of(wrapped, host.sites.linear[site])
        for mine, its in zip(own, peers, strict=True):
            assert_close(mine.grad, its.grad, EXACT)


def test_the_scale_of_rslora_is_pefts():
    family = FAMILIES["CLIP"]
    host, task, wrapped = pair(family, torch.float64, rslora=True)
    inputs = inputs_of(family, torch.float64)
    assert_close(first(run(Tuned(host, task), inputs)), first(run(wrapped, inputs)), EXACT)


def test_outputs_in_single_precision_are_pefts():
    family = FAMILIES["Llama"]
    host, task, wrapped = pair(family)
    with torch.no_grad():
        ours = first(run(Tuned(host, task), family.inputs()))
        assert_close(ours, first(run(wrapped, family.inputs())), TOLERANCE)


def test_dropout_leaves_out_what_pefts_leaves_out():
    family = FAMILIES["timm ViT"]
    host, task, wrapped = pair(family, dropout=0.3)
    tuned = Tuned(host, task).train()
    for layer in wrapped.modules():
        layer.training = type(layer).__name__ == "Dropout" and layer.p == 0.3
    torch.manual_seed(1)
    ours = first(run(tuned, family.inputs()))
    torch.manual_seed(1)
    assert_close(ours, first(run(wrapped, family.inputs())), TOLERANCE)


def test_parts_of_a_fused_map_are_maps_of_their_own():
    """What LoRA on q and v is where the backbone has them apart, it is in a fused map."""
    fused, apart = tiny_vit(), SplitAttention.split(tiny_vit())
    x = FAMILIES["timm ViT"].inputs()["*"]
    host, other = Host(fused, x), Host(apart, x)
    assert host.sites.linear["q.1"].module == "blocks.0.attn.qkv"
    assert other.sites.linear["q.1"].module == "blocks.0.attn.q_proj"
    torch.manual_seed(3)
    task = methods.build("lora", host, targets="q+v", zero=False)
    with torch.no_grad():
        ours = Tuned(host, task)(x)
        assert not torch.allclose(ours, host(x), atol=1e-3)
        assert_close(ours, Tuned(other, task)(x), TOLERANCE)


class SplitAttention(nn.Module):
    """timm's attention with three maps in the place of one."""

    def __init__(self, fused):
        super().__init__()
        self.num_heads, self.scale = fused.num_heads, fused.scale
        dim = fused.qkv.in_features
        weights, biases = fused.qkv.weight.chunk(3), fused.qkv.bias.chunk(3)
        for name, weight, bias in zip(("q", "k", "v"), weights, biases, strict=True):
            map_ = nn.Linear(dim, dim)
            map_.weight.data, map_.bias.data = weight.data.clone(), bias.data.clone()
            setattr(self, f"{name}_proj", map_)
        self.proj = fused.proj

    @classmethod
    def split(cls, model):
        for block in model.blocks:
            block.attn = cls(block.attn)
        return model.eval()

    def forward(self, x, **_):
        heads = [
            each(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        ]
        q, k, v = heads
        mixed = ((q * self.scale) @ k.mT).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))

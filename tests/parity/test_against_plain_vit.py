"""The library against the paper in plain lines: outputs and gradients, on three backbones."""

import pytest
import torch
import transformers

from awake import tiny_vit, wake
from reference import plain_vit as plain
from restuning import Host, Tuned, methods

SAME = 1e-5
"""fp32 through three layers by two orders of operations; relative to the largest entry."""
SIZES = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    image_size=32,
    patch_size=8,
)


def timm_vit():
    model = tiny_vit()
    return model, plain.from_timm(model.state_dict(), 4)


def hf_vit():
    model = wake(transformers.ViTModel(transformers.ViTConfig(**SIZES), add_pooling_layer=False))
    return model, plain.from_hf_vit(model.state_dict(), 4)


def clip():
    model = wake(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)))
    return model, plain.from_clip(model.state_dict(), 4)


@pytest.fixture(params=[timm_vit, hf_vit, clip], ids=lambda f: f.__name__)
def pair(request):
    model, weights = request.param()
    return Host(model, torch.zeros(1, 3, 32, 32)), weights


def drawn(task):
    with torch.no_grad():
        for p in task.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return task


def same(a, b):
    assert (a - b).abs().max() <= SAME * max(1.0, b.abs().max().item())


def compare(host, task, plainly):
    """Logits and the gradient of every parameter of the task."""
    images = torch.randn(3, 3, 32, 32)
    ours = Tuned(host, task)(images)
    names, parameters = zip(*task.named_parameters(), strict=True)
    target = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * target).sum(), parameters)
    theirs = task.head(plainly(images))
    expected = torch.autograd.grad((theirs * target).sum(), parameters)
    same(ours, theirs)
    for name, a, b in zip(names, grads, expected, strict=True):
        assert b.abs().max() > 0, name
        same(a, b)


def linear(layer):
    return {"down": (layer.down.weight, layer.down.bias), "up": (layer.up.weight, layer.up.bias)}


def test_bare_plain_vit_equals_the_backbone(pair):
    host, weights = pair
    images = torch.randn(2, 3, 32, 32)
    last = host.features(images, keep=["block.3"])["block.3"]
    same(host.readout(last), plain.forward(weights, images))


def test_exact_res_prefix_equals_prefix_tuning(pair):
    host, weights = pair
    task = drawn(methods.build("prefix", host, 5))
    tuners = [task.tuners[f"mha_{i}"].tuner for i in (1, 2, 3)]
    compare(host, task, lambda x: plain.forward(weights, x, prefix=[(t.k, t.v) for t in tuners]))


def test_exact_res_prompt_equals_vpt_deep(pair):
    host, weights = pair
    task = drawn(methods.build("vpt-deep", host, 5))
    prompts = [task.tuners[f"mha_{i}"].tuner.prompt for i in (1, 2, 3)]
    compare(host, task, lambda x: plain.forward(weights, x, prompt=prompts))


def test_output_fed_res_adapter_equals_the_sequential_adapter(pair):
    host, weights = pair
    task = drawn(methods.build("adapter", host, 5))
    adapters = [linear(task.tuners[f"ffn_{i}"]) for i in (1, 2, 3)]
    compare(host, task, lambda x: plain.forward(weights, x, adapter=adapters))


def test_dual_res_tuning_equals_the_plain_form(pair):
    host, weights = pair
    task = drawn(methods.build("res-tuning", host, 5))
    beside = [
        {
            op: (linear(task.tuners[f"{op}_{i}"].tuner), task.tuners[f"{op}_{i}"].scale)
            for op in ("mha", "ffn")
        }
        for i in (1, 2, 3)
    ]
    compare(host, task, lambda x: plain.forward(weights, x, beside=beside))


def test_bypass_equals_the_plain_form(pair):
    host, weights = pair
    task = drawn(methods.build("res-tuning-bypass", host, 5))
    across, below = (
        [linear(t) for t in side] for side in (task.side.horizontal, task.side.vertical)
    )
    compare(host, task, lambda x: plain.bypass(weights, x, across, below, task.side.gate))


def test_the_unbinding_identity_holds_in_the_plain_form_itself():
    _, weights = timm_vit()
    weights["layers"] = [
        {k: tuple(t.double() for t in v) for k, v in layer.items()} for layer in weights["layers"]
    ]
    x, layer = torch.randn(2, 17, 48).double(), weights["layers"][0]
    k, v = torch.randn(10, 48).double(), torch.randn(10, 48).double()
    bound = plain.mha(weights, layer, x, prefix=(k, v))
    keys, values = (plain.heads_of(t, 4) for t in (k, v))
    assert torch.allclose(bound, plain.mha_unbound(weights, layer, x, keys, values), atol=1e-12)

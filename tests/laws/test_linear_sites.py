"""Linear sites: found in every family, named by what they are for, and proved."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from awake import tiny_swin, tiny_vit, wake
from peft_families import FAMILIES, first, host_of, run
from restuning import Host, NoSitesError, ResAdapter, Task, Tuned, load_backbone, methods
from restuning._errors import PlacementError, RecomputedError, TunerShapeError
from restuning.forecast import load_shapes
from restuning.tuners import ConvLora, Lora

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ROLES = {
    "timm ViT": "qkv q k v o up down",
    "HF ViT": "q k v o up down",
    "CLIP": "q k v o up down",
    "BERT": "q k v o up down",
    "Llama": "q k v o gate up down",
    "GPT-2": "qkv q k v o up down",
}


@pytest.fixture
def host():
    return Host(tiny_vit(), X[:1])


@pytest.mark.parametrize("name", ROLES)
def test_every_map_of_a_transformer_has_its_role_and_is_proved(name):
    host = host_of(FAMILIES[name], FAMILIES[name].make())
    layers = host.sites.layers
    counted = Counter(s.role for s in host.sites.linear.values())
    assert counted == dict.fromkeys(ROLES[name].split(), layers)
    assert {s.proof for s in host.sites.linear.values()} == {"product"}
    assert {s.evidence for s in host.sites.linear.values()} == {"projections", "widths"}
    # Each map once, but for the parts of a fused one.
    maps = [s.module for s in host.sites.linear.values() if not s.part]
    own = [n for n, m in host.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    inside = [n for n in own if any(n.startswith(f"{s.module}.") for s in host.sites.values())]
    assert sorted(maps) == sorted(inside)


def test_linear_sites_do_not_change_what_a_backbone_is_known_by(host):
    assert not {*host.sites} & {*host.sites.linear}
    without = Host(tiny_vit(), X[:1], sites=type(host.sites)(host.sites.values()))
    assert without.fingerprint() == host.fingerprint()


def test_a_host_answers_as_the_backbone_and_leaves_nothing_on_it():
    for family in FAMILIES.values():
        model = family.make()
        with torch.no_grad():
            bare = first(run(model, family.inputs()))
            host = host_of(family, model)
            assert torch.equal(first(run(host, family.inputs())), bare)
        host.release()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forecast_finds_the_same_sites_without_weights():
    name = "timm:vit_tiny_patch16_224"
    _, shapes = load_shapes(name)
    real = load_backbone(name, random=True).host()

    def places(host):
        return [(s.name, s.module, s.dim_in, s.dim, s.start) for s in host.sites.linear.values()]

    assert places(shapes) == places(real)
    assert {s.proof for s in shapes.sites.linear.values()} == {"shape"}
    for targets in ("qkv", "q+v", "all"):
        sizes = [
            methods.build("lora", h, 5, targets=targets).tuner_parameters() for h in (shapes, real)
        ]
        assert sizes[0] == sizes[1]


class Twice(nn.Module):
    """A block whose one map is called twice, and whose other is given its input by keyword."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.mlp(self.mlp(self.norm(x)).relu())
        return x + self.other(input=y)


class Chain(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(x)


def test_a_map_that_is_called_twice_is_tuned_in_both_and_what_no_hook_sees_is_none():
    x = torch.randn(2, 5, 8)
    model = wake(Chain(Twice(), Twice()))
    host = Host(model, x)
    assert {s.module for s in host.sites.linear.values()} == {"blocks.0.mlp", "blocks.1.mlp"}
    name = next(iter(host.sites.linear))
    tuner = wake(Lora(8, rank=2))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.blocks[0].mlp.weight += tuner.b.weight @ tuner.a.weight
        # Outside: the copy has the hooks as well.
        expected = tuned(x)
        with host.using(Task(tuners={name: tuner})):
            torch.testing.assert_close(host(x), expected)


class OnceByKeyword(Twice):
    """Whose map is given its input by keyword in its second call."""

    def __init__(self, always=True):
        super().__init__()
        self.by_keyword = always

    def forward(self, x):
        y = self.mlp(self.norm(x)).relu()
        y = self.mlp(input=y) if self.by_keyword else self.mlp(y)
        return x + self.other(y)


def test_a_map_that_is_once_called_by_keyword_is_no_site_and_is_refused_where_that_begins_later():
    x = torch.randn(2, 5, 8)
    host = Host(wake(Chain(OnceByKeyword(), OnceByKeyword())), x)
    assert {s.module for s in host.sites.linear.values()} == {"blocks.0.other", "blocks.1.other"}
    later = Host(wake(Chain(OnceByKeyword(always=False))), x)
    task = methods.build("lora", later, targets="all")
    later.model.blocks[0].by_keyword = True
    with pytest.raises(PlacementError, match=r"(?s)by keyword.*blocks\.0\.mlp"), later.using(task):
        later(x)


def test_a_map_of_several_blocks_is_one_site():
    one = Twice()
    other = Twice()
    other.mlp = one.mlp
    host = Host(wake(Chain(one, other)), torch.randn(2, 5, 8))
    assert [s.module for s in host.sites.linear.values()] == ["blocks.0.mlp"]


def test_maps_inside_torchs_own_attention_are_no_sites_for_its_kernel_does_not_call_them():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    host = Host(wake(nn.TransformerEncoder(layer, 2)), torch.randn(2, 5, 16))
    assert Counter(s.module.rpartition(".")[2] for s in host.sites.linear.values()) == {
        "linear1": 2,
        "linear2": 2,
    }


def test_of_windows_the_order_of_a_fused_map_is_not_known():
    host = Host(tiny_swin(), X[:1])
    assert host.sites.linear.pick("qkv")
    with pytest.raises(NoSitesError, match="targets=q"):
        methods.build("lora", host, targets="q+v")


def test_what_there_is_not_is_refused_with_what_there_is():
    family = FAMILIES["ResNet"]
    host = host_of(family, family.make())
    with pytest.raises(NoSitesError, match="conv"):
        methods.build("lora", host, 3)
    with pytest.raises(NoSitesError, match="here are"):
        host.sites.linear.pick("conv", layers=[9])
    with pytest.raises(TunerShapeError, match="multiple of the groups"):
        ConvLora(8, kernel=[3], groups=3)


def test_a_tuner_of_other_widths_is_refused_before_anything_runs(host):
    with pytest.raises(PlacementError, match="from 48 to 144"):
        Tuned(host, Task(tuners={"qkv.1": Lora(48, rank=2)}))(X)
    with pytest.raises(TunerShapeError, match="48 channels"):
        Lora(48).added(torch.zeros(2, 5, 144), torch.zeros(2, 5, 48))


def test_any_tuner_may_stand_beside_a_square_map(host):
    adapter = wake(ResAdapter(48, rank=4))
    seen = {}
    module = host.model.blocks[0].attn.proj
    handle = module.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
    with host.using(Task(tuners={"o.1": adapter})), torch.no_grad():
        host(X)
        expected = module.forward(seen["x"]) + adapter(seen["x"])
        torch.testing.assert_close(seen["y"], expected)
    handle.remove()


def test_sites_survive_copies_and_pickles(host):
    for again in (copy.deepcopy(host.sites), pickle.loads(pickle.dumps(host.sites))):  # noqa: S301
        assert dict(again.linear) == dict(host.sites.linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_maps_are_proved_and_tuners_stay_in_fp32(dtype):
    host = Host(tiny_vit().to(dtype), X[:1].to(dtype))
    assert {s.proof for s in host.sites.linear.values()} == {"product"}
    task = methods.build("lora", host, 3, targets="qkv+down")
    Tuned(host, task)(X).sum().backward()
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    assert all(p.grad is not None for p in task.tuners.parameters())


def test_gradient_checkpointing_keeps_the_gradients(host):
    task = wake(methods.build("lora", host, 3, targets="all"))
    parameters = list(task.parameters())
    plain = torch.autograd.grad(Tuned(host, task)(X).square().sum(), parameters)
    host.checkpoint()
    again = torch.autograd.grad(Tuned(host, task)(X).square().sum(), parameters)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_a_part_of_a_block_that_is_run_again_without_its_task_is_refused(host):
    mlp = host.model.blocks[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: checkpoint(forward, x, use_reentrant=True)
    task = wake(methods.build("lora", host, 3, targets="all"))
    with pytest.raises(RecomputedError, match=r"blocks\.1\.mlp\.fc1"):
        Tuned(host, task)(X).sum().backward()

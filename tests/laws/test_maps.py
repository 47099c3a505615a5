"""Laws of maps and hierarchies: CNNs, stages, layouts, and the bypass on pooled vectors."""

import pytest
import timm
import torch
from torch import nn

from awake import wake
from restuning import Host, NoSitesError, Task, Tuned, Tuner, methods
from restuning._errors import ProjectionsError, TunerShapeError
from restuning.bypass import STARTING_LAMBDA
from restuning.tuners import ConvAdapter, ResAdapter, ResPrefix

CONSTANT_TOLERANCE = 1e-4
"""fp32 sums of maps of size about ten."""
X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def cnn(name="test_resnet", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **kwargs).eval()


class Channel(Tuner):
    """Moves one channel by one, and says what it was given."""

    kind = "channel"

    def __init__(self, dim, channel):
        super().__init__()
        self.dim, self.channel, self.seen = dim, channel, []

    def reset_parameters(self):
        pass

    def forward(self, x, view=None):
        self.seen.append(x.clone())
        return torch.zeros_like(x).index_fill(-1, torch.tensor(self.channel), 1.0)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv2_035", "test_nfnet"])
def test_a_tuner_on_a_map_moves_its_channel_and_no_other(name):
    model = cnn(name)
    host = Host(model, X[:1])
    for site in host.sites.pick("block").values():
        tuner = Channel(site.dim, 2)
        seen = []
        leave = model.get_submodule(site.leave)
        keep = leave.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y.clone()))
        with torch.no_grad():
            model(X)
            host.run_tuned({site.name: tuner}, Task().needs(host.readout_rule), X)
        keep.remove()
        bare, tuned = seen
        assert site.layout == "b d h w"
        assert bare.shape[1] == site.dim
        moved = (tuned - bare).movedim(1, -1).flatten(0, -2)
        wanted = torch.zeros(site.dim)
        wanted[2] = 1
        assert (moved - wanted).abs().max() < CONSTANT_TOLERANCE
        read = tuner.seen[0]
        assert read.dim() == 3
        if site.changes:
            assert torch.equal(read, bare.flatten(2).mT)


def test_the_first_block_of_a_stage_reads_its_output_and_the_others_the_stream():
    host = Host(cnn("resnet18"), X[:1])
    changes = [s.changes for s in host.sites.pick("block").values()]
    assert changes == [False, False, True, False, True, False, True, False]
    assert [s.dim for s in host.sites.values()] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert [s.dim_in for s in host.sites.values()] == [64, 64, 64, 128, 128, 256, 256, 512]


def test_a_width_equal_to_the_grid_is_no_riddle():
    """64 channels on a grid of 64 x 64: only modules whose axes are known can tell."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(16, 16)
            self.drop = nn.Identity()

        def forward(self, x):
            return x + self.drop(self.map(x))

    class Net(nn.Module):
        def __init__(self, block, axes):
            super().__init__()
            self.blocks, self.axes = nn.Sequential(block(), block()), axes

        def forward(self, x):
            return self.blocks(x).mean(self.axes)

    x = torch.randn(1, 16, 16, 16)
    first = Host(Net(Block, (2, 3)), x).sites
    last = Host(Net(Last, (1, 2)), x).sites
    assert {s.layout for s in first.values()} == {"b d h w"}
    assert {s.layout for s in last.values()} == {"b h w d"}


@pytest.mark.parametrize("name", ["vgg11", "densenet121"])
def test_a_network_without_sums_is_tuned_at_its_stages(name):
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=5)
    host = Host(model, X[:1])
    blocks = host.sites.pick("block").values()
    assert len(blocks) == {"vgg11": 5, "densenet121": 4}[name]
    assert all(s.changes and s.proof == "residual" for s in blocks)
    features = host.features(X)
    grids = [features[tap].shape[1] for tap in host.sites.taps]
    assert grids == sorted(set(grids), reverse=True)


def test_parallel_branches_count_as_a_sum():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.thin = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x):
            return self.act(self.wide(x) + self.thin(x) + self.norm(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 8, 3), nn.Sequential(Parallel(), Parallel())

        def forward(self, x):
            return self.blocks(self.stem(x)).mean((2, 3))

    assert Host(Net().eval(), X[:1]).sites.layers == 2


@pytest.mark.parametrize("name", ["resnet18", "test_nfnet", "test_convnext", "test_vit"])
def test_half_precision_shows_the_same_sites(name):
    wanted = Host(wake(cnn(name)), torch.zeros(1, 3, 160, 160)).sites
    found = Host(wake(cnn(name)).bfloat16(), torch.zeros(1, 3, 160, 160).bfloat16()).sites
    assert [(s.name, s.leave, s.layout) for s in found.values()] == [
        (s.name, s.leave, s.layout) for s in wanted.values()
    ]


def test_what_is_no_sum_is_no_block():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.twin = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv(x) * self.twin(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 8, 3), nn.Sequential(Gate(), Gate())

        def forward(self, x):
            return self.blocks(self.stem(x)).mean((2, 3))

    with pytest.raises(NoSitesError, match="no chain of stages"):
        Host(Net().eval(), X[:1])


def test_a_stream_overwritten_in_place_is_not_read():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv(self.act(x)) + x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 8, 3), nn.Sequential(Block(), Block())

        def forward(self, x):
            return self.blocks(self.stem(x)).mean((2, 3))

    host = Host(Net().eval(), X[:1])
    assert host.sites.layers == 2
    assert all(s.changes for s in host.sites.values())
    tuned = Tuned(host, methods.build("res-tuning", host, num_classes=2))
    tuned(X).sum().backward()


def test_a_frozen_batch_norm_does_not_move_while_a_task_trains():
    model = cnn("resnet18")
    host = Host(model, X[:1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        bare = model(X)
    for method in ("res-tuning", "res-tuning-bypass", "linear", "full"):
        tuned = Tuned(host, methods.build(method, host, num_classes=2)).train()
        assert not any(m.training for m in model.modules())
        optimiser = torch.optim.SGD(tuned.task.parameters(), 0.1)
        for _ in range(2):
            optimiser.zero_grad()
            tuned(X * 3 + 1).square().sum().backward()
            optimiser.step()
    after = model.state_dict()
    assert any("running_mean" in k for k in after)
    assert all(torch.equal(after[k], before[k]) for k in before)
    with torch.no_grad():
        assert torch.equal(model(X), bare)


def test_pooled_taps_are_the_means_of_the_streams_and_the_last_is_the_own_feature():
    host = Host(cnn("mobilenetv2_035"), X[:1])
    task = methods.build("res-tuning-bypass", host, num_classes=2)
    needs = task.needs(host.readout_rule)
    assert needs.tokens == "pool"
    pooled, whole = host.features(X, keep=needs), host.features(X)
    for tap in host.sites.taps[:-1]:
        assert torch.allclose(pooled[tap], whole[tap].mean((1, 2))[:, None], atol=1e-6)
    with torch.no_grad():
        assert torch.equal(pooled[host.sites.taps[-1]][:, 0], host.model(X))


def test_streams_folded_into_the_batch_are_pooled_by_input():
    """MobileViT runs its transformer on patches as a batch."""
    host = Host(cnn("mobilevit_xxs"), X[:1])
    both, one = (
        host.features(x, keep=methods.build("linear", host, 2).needs(host.readout_rule))
        for x in (X, X[:1])
    )
    needs = methods.build("res-tuning-bypass", host, 2).needs(host.readout_rule)
    both, one = host.features(X, keep=needs), host.features(X[:1], keep=needs)
    for tap in needs.taps:
        assert both[tap].shape == (3, 1, both[tap].shape[-1])
        assert torch.allclose(both[tap][:1], one[tap], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "last"), [("resnet18", STARTING_LAMBDA), ("mobilenetv2_035", 0.5)]
)
def test_a_bypass_starts_half_way_to_a_feature_of_another_width(name, last):
    """The state comes to it through a map that is drawn at random; resnet18's needs none."""
    side = methods.build("res-tuning-bypass", Host(cnn(name), X[:1]), num_classes=4).side
    lambdas = side.gate.sigmoid().tolist()
    assert lambdas == pytest.approx([*[STARTING_LAMBDA] * (len(lambdas) - 1), last])
    assert (side.dims[-1] == side.dims[-2]) == (last == STARTING_LAMBDA)


def test_a_bypass_on_a_hierarchy_is_the_linear_probe_as_its_last_gate_closes():
    host = Host(cnn("resnet18"), X[:1])
    task = methods.build("res-tuning-bypass", host, num_classes=4)
    probe = methods.build("linear", host, num_classes=4)
    probe.head.load_state_dict(task.head.state_dict())
    with torch.no_grad():
        for t in task.side.tuners:
            t.up.bias.zero_()
        task.side.gate[-1] = 40.0
        assert torch.allclose(Tuned(host, task)(X), Tuned(host, probe)(X), atol=1e-5)


def test_every_token_wise_tuner_runs_on_maps_unchanged():
    host = Host(cnn(), X[:1])
    for make in (
        lambda s: ResAdapter(s.dim, rank=2),
        lambda s: ResPrefix(s.dim, length=2, query="stream", heads=2),
        lambda s: ConvAdapter(s.dim, rank=2),
    ):
        task = Task.inline(host.sites, make)
        with torch.no_grad():
            out = Tuned(host, task)(X)
            assert out.shape == host.model(X).shape
            assert not torch.equal(out, host.model(X))


def test_a_convolution_on_a_map_is_that_convolution():
    tuner = ConvAdapter(6, rank=4)
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    x = torch.randn(2, 5, 7, 6)
    down = nn.functional.conv2d(
        x.movedim(-1, 1), tuner.down.weight[:, :, None, None], tuner.down.bias
    )
    mixed = nn.functional.gelu(
        nn.functional.conv2d(
            down, tuner.depthwise.weight, tuner.depthwise.bias, padding=1, groups=4
        )
    )
    up = nn.functional.conv2d(mixed, tuner.up.weight[:, :, None, None], tuner.up.bias)
    assert torch.allclose(tuner(x), up.movedim(1, -1), atol=1e-5)
    tokens = x[:, :5, :5].flatten(1, 2)
    assert torch.allclose(tuner(tokens).unflatten(1, (5, 5)), tuner(x[:, :5, :5]), atol=1e-6)


def test_a_convolution_refuses_tokens_that_form_no_grid():
    with pytest.raises(TunerShapeError, match="no square grid"):
        ConvAdapter(6)(torch.randn(1, 5, 6))
    with pytest.raises(TunerShapeError, match="odd kernel"):
        ConvAdapter(6, kernel=2)


def test_a_mixing_tuner_is_refused_in_a_pooled_bypass_and_runs_over_the_grid_otherwise():
    host = Host(
        cnn(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=24,
            depths=(2, 1),
            num_heads=(2, 4),
        ),
        X[:1],
    )
    assert {s.layout for s in host.sites.pick("block").values()} == {"b h w d"}

    def plan(site):
        return ConvAdapter(site.dim, rank=2)

    pooled = Task.bypass(host.sites, plan, pool="own", own=host.dim)
    with pytest.raises(TunerShapeError, match="mixes tokens"):
        Tuned(host, pooled)(X)
    task = Task.bypass(host.sites, plan, vertical=plan, pool="mean")
    assert task.needs(host.readout_rule).tokens == "all"
    out = Tuned(host, task)(X)
    assert out.shape == (3, host.dim)
    out.sum().backward()
    assert all(p.grad is not None for p in task.parameters())


def test_prompts_and_prefixes_are_refused_where_there_is_no_attention():
    host = Host(cnn(), X[:1])
    with pytest.raises(NoSitesError, match="no site fits"):
        methods.build("res-tuning-single", host, num_classes=2)
    with pytest.raises(NoSitesError, match="appended to a map"):
        methods.build("vpt-shallow", host, num_classes=2)
    task = Task.inline(host.sites, lambda s: ResPrefix(s.dim, length=2))
    with pytest.raises(ProjectionsError):
        Tuned(host, task)(X)


def test_checkpointing_blocks_of_a_cnn_keeps_every_gradient():
    host = Host(wake(cnn()), X[:1])
    tuned = Tuned(host, methods.build("res-tuning", host, num_classes=2, zero=False))

    def gradients():
        tuned.zero_grad()
        tuned(X).square().sum().backward()
        return [p.grad.clone() for p in tuned.task.parameters()]

    plain = gradients()
    host.checkpoint()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))

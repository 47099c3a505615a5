"""Laws of declared sites: what structure does not show a user says, and it is held against a forward."""

import pytest
import torch
from torch import nn

from awake import wake
from restuning import Host, NoSitesError, ResPrefix, Scaled, Tuned, find_sites, methods
from restuning._errors import ProjectionsError
from restuning.sites import Branch, Layer, Projections, Sites
from restuning.task import Task

WIDTH, HEADS = 16, 2
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


class Looking(nn.Module):
    """Attention under names that nobody uses."""

    def __init__(self):
        super().__init__()
        self.asks, self.tells, self.says = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.ends = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (
            m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for m in (self.asks, self.tells, self.says)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.ends(y.transpose(1, 2).flatten(2))


class Step(nn.Module):
    """A block whose second sum is scaled outside of any module, so that it is no sum as it stands."""

    def __init__(self):
        super().__init__()
        self.first, self.look = nn.LayerNorm(WIDTH), Looking()
        self.second = nn.LayerNorm(WIDTH)
        self.think = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x):
        x = x + self.look(self.first(x))
        return 0.5 * x + 0.7 * self.think(self.second(x))


class Unknown(nn.Module):
    """Blocks in no list, under names of their own."""

    def __init__(self):
        super().__init__()
        self.start, self.middle, self.end = nn.Linear(WIDTH, WIDTH), Step(), Step()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(self.end(self.middle(self.start(x)))).mean(1)


PROJECTIONS = {
    "q": "look.asks",
    "k": "look.tells",
    "v": "look.says",
    "out": "look.ends",
    "heads": HEADS,
}


def layers(**changed):
    attention = Branch(
        "look", enter="first", projections=Projections.declare(**{**PROJECTIONS, **changed})
    )
    thinking = Branch("think", enter="second")
    return [Layer(path, mha=attention, ffn=thinking) for path in ("middle", "end")]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wake(Unknown().eval())


def test_nothing_is_found_in_the_network_by_itself_and_the_error_says_to_declare(model):
    with pytest.raises(NoSitesError, match=r"Sites\.declare"):
        find_sites(model, X)


def test_declared_layers_become_sites_with_their_widths_and_their_proofs(model):
    host = Host(model, X, sites=Sites.declare(layers()))
    assert list(host.sites) == ["mha.1", "ffn.1", "block.1", "mha.2", "ffn.2", "block.2"]
    assert {s.dim for s in host.sites.values()} == {WIDTH}
    assert host.sites["mha.1"].proof == "residual"
    assert host.sites["ffn.1"].proof == "declared"
    assert host.sites["ffn.2"].leave == "end.think" and host.sites["ffn.2"].enter == "end.second"
    assert host.readout_rule.proof == "exact" and host.readout_rule.pool == "mean"
    assert host.lacks_projections({"mha.1": ResPrefix(WIDTH, length=2)}) == []


@pytest.mark.parametrize("method", ["res-tuning", "res-tuning-bypass", "prefix", "vpt-deep"])
def test_methods_train_on_declared_sites_and_the_backbone_stays_what_it_was(model, method):
    bare = model(X)
    host = Host(model, X, sites=Sites.declare(layers()))
    tuned = Tuned(host, wake(methods.build(method, host, num_classes=3), 2))
    tuned(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tuned.task.parameters())
    assert torch.equal(model(X), bare)


def test_an_exact_prefix_with_declared_projections_equals_longer_keys(model):
    host = Host(model, X, sites=Sites.declare(layers()))
    prefix = wake(ResPrefix(WIDTH, length=3), 1)
    task = Task.inline(host.sites.pick("mha", layers=[1]), lambda s: Scaled(prefix, "exact"))
    look, seen = model.middle.look, {}
    handle = look.register_forward_hook(lambda m, a, out: seen.update(x=a[0], y=out))
    try:
        with host.using(task):
            model(X)
    finally:
        handle.remove()

    def heads(x):
        return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)

    x = seen["x"]
    longer = [
        torch.cat([heads(own).expand(2, -1, -1, -1), heads(made)], -2)
        for own, made in ((prefix.k, look.tells(x)), (prefix.v, look.says(x)))
    ]
    y = nn.functional.scaled_dot_product_attention(heads(look.asks(x)), *longer)
    wanted = look.ends(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["y"], wanted, atol=1e-5, rtol=1e-5)


def test_a_declared_layer_leaves_the_others_to_be_found():
    model = nn.Sequential(nn.ModuleList([Step(), Step()]), nn.Identity())
    model.forward = lambda x: model[0][1](model[0][0](x))
    wake(model.eval())
    found, _ = find_sites(model, X)
    assert all(s.projections is None for s in found.values())
    mine = [
        Layer("0.1", mha=Branch("look", "first", projections=Projections.declare(**PROJECTIONS)))
    ]
    sites, _ = find_sites(model, X, declared=Sites.declare(mine))
    assert sites["mha.2"].projections is not None and "block.1" in sites


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (Layer("muddle"), r"does not exist: muddle .*(?s:.*)the backbone holds end, middle"),
        (Layer("middle", mha=Branch("look.x")), r"does not exist: middle\.look\.x (?s:.*)asks"),
        (Layer("middle", mha=Branch("a.b.c")), r"there is no middle\.a\.b either"),
        (Layer("middle", mha=Branch("look", leave="first")), r"did not run: middle\.first"),
        (Layer("middle", ffn=Branch("think", leave="think.0")), "did not run"),
        (Layer("middle", ffn=Branch("think.0", enter="second")), "cannot be added to its stream"),
    ],
)
def test_a_declaration_that_is_not_so_is_refused_in_words(model, layer, says):
    with pytest.raises(NoSitesError, match=says):
        Host(model, X, sites=Sites.declare([layer]))


def test_a_block_that_never_runs_is_refused(model):
    model.spare = Step()
    with pytest.raises(NoSitesError, match="a declared block is none: spare"):
        Host(model, X, sites=Sites.declare([*layers(), Layer("spare")]))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q": "look.tells", "k": "look.asks"}, "differs from the layer's by"),
        ({"v": "look.tells"}, "differs from the layer's by"),
        ({"heads": 4}, "differs from the layer's by"),
        ({"scale": 1.0}, "differs from the layer's by"),
        ({"heads": 3}, "do not make 3 heads|differs"),
        ({"q": "first"}, "no linear map: q"),
        ({"q": "think.0"}, "differs|do not make"),
        ({"norm": "second"}, "does not read what middle.second makes"),
    ],
)
def test_projections_that_do_not_reproduce_the_layer_are_refused_in_words(model, changed, says):
    with pytest.raises(ProjectionsError, match=says):
        Host(model, X, sites=Sites.declare(layers(**changed)))


def test_a_declaration_says_each_block_once_and_at_least_one():
    with pytest.raises(NoSitesError, match="declared twice"):
        Sites.declare([Layer("a"), Layer("a")])
    with pytest.raises(NoSitesError, match="without layers"):
        Sites.declare([])

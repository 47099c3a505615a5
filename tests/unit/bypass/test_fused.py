"""A bypass of adapters, fused with its gradient by hand, is the bypass as it is written."""

import pytest
import torch
from torch.autograd import gradcheck

from restuning import Bypass
from restuning.bypass import fused
from restuning.tuners import DropPath, ResAdapter, Scaled

WRITTEN_TOLERANCE = 1e-5
"""The same sums in another order, in fp32."""
DIM, LAYERS, ROWS = 12, 4, 7


def adapter(activation="gelu", form="none", factor=1.0, rank=3):
    tuner = ResAdapter(DIM, rank=rank, activation=activation, factor=factor)
    return tuner if form == "none" else Scaled(tuner, form, start=0.7)


def bypass(horizontal=True, vertical=True, **options):
    torch.manual_seed(0)
    taps = [f"block.{i}" for i in range(LAYERS + 1)]
    made = Bypass(
        taps,
        [DIM] * (LAYERS + 1),
        [adapter(**options) if horizontal else None for _ in range(LAYERS)],
        [adapter(**{"rank": 2, **options}) if vertical else None for _ in range(LAYERS)],
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return made


def taps(*shape):
    torch.manual_seed(1)
    return {f"block.{i}": torch.randn(*shape, DIM) for i in range(LAYERS + 1)}


def answer(net, features):
    net.zero_grad()
    state = net(features)
    (state * torch.linspace(-1, 1, state.numel()).view(state.shape)).sum().backward()
    return state.detach(), {n: p.grad.clone() for n, p in net.named_parameters()}


@pytest.mark.parametrize("shape", [(ROWS, 1), (2, 5), (2, 3, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu"},
        {"activation": "silu"},
        {"form": "scalar"},
        {"form": "channel", "factor": 0.1},
        {"horizontal": False},
        {"vertical": False},
        {"horizontal": False, "vertical": False},
    ],
)
def test_fused_equals_written_in_value_and_gradient(monkeypatch, shape, options):
    net, features = bypass(**options), taps(*shape)
    assert net.can_fuse(list(features.values()))
    state, gradients = answer(net, features)
    monkeypatch.setattr(Bypass, "can_fuse", lambda self, streams: False)
    written, theirs = answer(net, features)
    torch.testing.assert_close(state, written, atol=WRITTEN_TOLERANCE, rtol=WRITTEN_TOLERANCE)
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=WRITTEN_TOLERANCE, rtol=WRITTEN_TOLERANCE
        )


@pytest.mark.parametrize("arms", [1, 3])
def test_the_gradient_by_hand_is_the_numerical_one(arms):
    torch.manual_seed(0)
    streams = [torch.randn(4, 5, dtype=torch.double) for _ in range(4)]

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.double, requires_grad=True)

    gate = torch.rand(arms, 3, dtype=torch.double, requires_grad=True)
    shapes = [(arms, 2, 5), (arms, 2), (arms, 5, 2), (arms, 5)]
    weights = [drawn(*shape) for _ in range(2 * 3) for shape in shapes]

    def value(gate, *weights):
        return fused.run(streams, gate, weights[:12], weights[12:], "gelu")

    assert gradcheck(value, (gate, *weights))


def test_k_bypasses_at_once_are_each_of_them_alone():
    nets = [bypass(form="channel"), bypass(form="channel")]
    with torch.no_grad():
        for p in nets[1].parameters():
            p.mul_(0.5)
    features = taps(ROWS, 1)
    named = [dict(net.named_parameters()) for net in nets]
    names = {p: n for n, p in named[0].items()}
    together = nets[0].run_fused(features, lambda p: torch.stack([n[names[p]] for n in named]))
    for net, state in zip(nets, together, strict=True):
        torch.testing.assert_close(
            state, net(features), atol=WRITTEN_TOLERANCE, rtol=WRITTEN_TOLERANCE
        )


def test_what_is_no_plain_adapter_is_left_to_autograd():
    plain, dropped = [adapter(), adapter()], [adapter(), DropPath(adapter(), 0.5)]
    assert fused.fused_signature(plain, plain) == (3, 3, "gelu")
    assert fused.fused_signature(plain, dropped) is None
    assert fused.fused_signature(plain, dropped, at_rest=True) == (3, 3, "gelu")
    assert fused.fused_signature([adapter(form="gate")] * 2, plain) is None
    assert fused.fused_signature([adapter(), adapter(rank=2)], plain) is None
    assert fused.fused_signature([adapter(), torch.nn.Identity()], plain) is None
    assert fused.fused_signature([adapter("relu")] * 2, plain) is None
    assert fused.fused_signature([torch.nn.Identity()] * 2, [adapter(form="channel")] * 2) == (
        0,
        3,
        "gelu",
    )


def test_a_bypass_with_gaps_runs_as_it_is_written():
    net, features = bypass(), taps(ROWS, 1)
    net.horizontal[1] = torch.nn.Identity()
    assert not net.can_fuse(list(features.values()))
    state, gradients = answer(net, features)
    assert state.shape == (ROWS, 1, DIM)
    assert all(g.abs().max() > 0 for g in gradients.values())


def test_what_backward_needs_is_one_state_a_layer():
    net, features = bypass(), taps(ROWS, 1)
    large = []

    def pack(tensor):
        if tensor.numel() >= ROWS * DIM and tensor.shape[-2:] == (ROWS, DIM):
            large.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(features)
    assert len(set(large)) == 2 * LAYERS


def test_compiling_records_the_bypass_as_it_is_written():
    net, features = bypass().eval(), taps(ROWS, 1)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(features), net(features), atol=WRITTEN_TOLERANCE, rtol=WRITTEN_TOLERANCE
    )

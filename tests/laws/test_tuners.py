"""Laws over the table of tuners: a new tuner gets them by existing."""

import copy
import json
import pickle

import pytest
import torch

from restuning import DropPath, ResAdapter, ResPrefix, ResPrompt, Scaled, Sum, Tuner
from restuning.tuners import (
    ContextAdapter,
    ConvAdapter,
    ConvLora,
    FilmAdapter,
    Lora,
    LowRankAttention,
    at_time,
    from_spec,
    kinds,
)

SAMPLES = {
    "res_adapter": lambda: ResAdapter(16, rank=3),
    "res_prefix": lambda: ResPrefix(16, length=3, query="stream", heads=2),
    "res_prompt": lambda: ResPrompt(16, length=3, query="stream", heads=2),
    "scaled": lambda: Scaled(ResAdapter(16, rank=3), "channel"),
    "sum": lambda: Sum(ResAdapter(16, rank=3), ResPrefix(16, length=2, query="stream")),
    "conv_adapter": lambda: ConvAdapter(16, rank=3, prefix=1),
    "low_rank_attention": lambda: LowRankAttention(16, rank=4, heads=2),
    "context_adapter": lambda: ContextAdapter(16, rank=3),
    "film_adapter": lambda: FilmAdapter(16, rank=3, zero=False),
    "lora": lambda: Lora(16, rank=3, zero=False),
    "conv_lora": lambda: ConvLora(16, rank=3, kernel=[3], padding=[1], zero=False),
    "drop_path": lambda: DropPath(ResAdapter(16, rank=3), 0.5),
}
OTHER_SHAPE = {"stem_prompt"}  # appends tokens, is no delta


@pytest.fixture(autouse=True)
def _some_time():
    with at_time(torch.tensor([300.0])):
        yield


@pytest.fixture(params=sorted(set(kinds()) - OTHER_SHAPE))
def tuner(request) -> Tuner:
    assert request.param in SAMPLES, f"give tests/laws/test_tuners.py a sample of {request.param}"
    return SAMPLES[request.param]().eval()


@pytest.mark.parametrize("lead", [(2,), (2, 3), (1,)])
def test_the_shape_is_kept(tuner, lead):
    x = torch.randn(*lead, 5, 16)
    assert tuner(x).shape == x.shape


FUSED_TOLERANCE = 1e-5
"""One product in place of a product and two passes: fp32 rounds in another order."""


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
def test_adding_in_one_product_equals_adding_the_delta(tuner, scaled, contiguous):
    x, y = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    y = y if contiguous else torch.randn(2, 16, 5).mT
    scale = torch.randn(16, requires_grad=True) if scaled else None
    leaves = [*tuner.parameters(), *([scale] if scaled else [])]
    one = tuner.added(y, x, None, scale)
    plain = y + tuner(x) * (1 if scale is None else scale)
    torch.testing.assert_close(one, plain, atol=FUSED_TOLERANCE, rtol=FUSED_TOLERANCE)
    weights = torch.randn_like(one)
    for a, b in zip(
        torch.autograd.grad((one * weights).sum(), leaves),
        torch.autograd.grad((plain * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=FUSED_TOLERANCE, rtol=FUSED_TOLERANCE)


def test_a_stream_in_fp32_keeps_its_precision_under_autocast(tuner):
    y = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        total = tuner.added(y, torch.zeros(2, 5, 16))
    assert total.dtype is torch.float32


def test_every_parameter_gets_a_gradient(tuner):
    tuner(torch.randn(2, 5, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tuner.parameters())


def test_bf16_works(tuner):
    assert tuner.bfloat16()(torch.randn(2, 5, 16).bfloat16()).dtype is torch.bfloat16


def test_a_spec_survives_json_and_gives_the_same_function(tuner):
    again = from_spec(json.loads(json.dumps(tuner.spec()))).eval()
    again.load_state_dict(tuner.state_dict(), strict=True)
    x = torch.randn(2, 5, 16)
    assert torch.equal(again(x), tuner(x))


def test_copies_by_deepcopy_and_pickle_are_equal(tuner):
    x = torch.randn(2, 5, 16)
    for other in (copy.deepcopy(tuner), pickle.loads(pickle.dumps(tuner))):  # noqa: S301
        assert torch.equal(other(x), tuner(x))


def test_it_can_be_built_on_meta_and_filled(tuner):
    with torch.device("meta"):
        empty = from_spec(tuner.spec())
    filled = empty.to_empty(device="cpu")
    filled.reset_parameters()
    assert all(torch.isfinite(p).all() for p in filled.parameters())


def test_token_wise_tuners_say_so_truthfully(tuner):
    x = torch.randn(1, 5, 16)
    alone = tuner(x[:, :1])
    if not tuner.mixes_tokens:
        assert torch.allclose(tuner(x)[:, :1], alone, atol=1e-6)


@pytest.mark.parametrize("wrap", [Scaled, Sum, DropPath], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("name", ["mixes_tokens", "looks_ahead", "needs_view", "needs_grid"])
def test_a_wrapper_has_every_trait_that_a_member_has(wrap, name):
    inside = [
        ResAdapter(16),
        ResPrefix(16, length=2),
        ConvAdapter(16, rank=3),
        LowRankAttention(16, rank=4),
    ]
    for member in inside:
        assert getattr(wrap(member), name) == getattr(member, name)
    assert getattr(Sum(*inside), name)


def test_zero_start_is_no_change():
    x = torch.randn(2, 5, 16)
    assert not ResAdapter(16, zero=True)(x).any()
    assert not ResPrefix(16, zero=True, query="stream")(x).any()
    assert not Lora(16)(x).any()


@pytest.mark.parametrize("form", ["none", "scalar", "channel", "gate"])
def test_a_scale_is_what_its_form_says(form):
    x, inner = torch.randn(2, 5, 16), ResAdapter(16, rank=3)
    scaled = Scaled(inner, form)
    factor = {
        "none": lambda: 1.0,
        "scalar": lambda: scaled.scale,
        "channel": lambda: scaled.scale,
        "gate": lambda: scaled.gate(x).sigmoid().mean(1, keepdim=True),
    }[form]()
    assert torch.allclose(scaled(x), inner(x) * factor, atol=1e-6)

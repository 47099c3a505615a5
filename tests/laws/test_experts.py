"""A mixture of experts is a feed-forward: it has a site, and a tuner there adds what it adds."""

from typing import Any

import pytest
import torch
from torch import nn

from restuning import Host
from restuning.sites import Needs
from restuning.tuners import ResAdapter

hf = pytest.importorskip("transformers")

ROUNDING = 1e-5
"""Of fp32 over two layers, relative to the largest value."""

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 16,
    },
    # Returns its router's scores beside the stream.
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # The first layer is dense.
    "DeepseekV3": {
        **MLA,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


def build(name):
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**SMALL, **MODELS[name])
    return getattr(hf, f"{name}Model")(config).eval()


class Pair(nn.Module):
    """A feed-forward of several experts in one weight, which returns its router's scores as well."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(0.1 * torch.randn(3, 16, 16))
        self.router = nn.Parameter(torch.randn(3, 16))

    def forward(self, x):
        scores = (x @ self.router.T).softmax(-1)
        return torch.einsum("bnd,edf,bne->bnf", x, self.experts, scores), scores


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn, self.mlp = nn.MultiheadAttention(16, 2, batch_first=True), Pair()

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y)[0]
        return x + self.mlp(self.norm2(x))[0]


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def check_site(host, args, kwargs):
    """A tuner at every feed-forward adds its delta to the stream after it, once."""
    sites = host.sites.pick("ffn")
    assert len(sites) == 2
    assert {s.proof for s in sites.values()} == {"residual"}
    for name, site in sites.items():
        tuner = ResAdapter(site.dim, rank=4)
        # The stream that the feed-forward's norm reads is what the tuner reads.
        seen = []
        norm = host.model.get_submodule(site.enter)
        handle = norm.register_forward_pre_hook(lambda m, a: seen.append(a[0]))  # noqa: B023
        block = f"block.{site.layer}"
        with torch.no_grad():
            bare = host.features(*args, keep=Needs((block,)), **kwargs)[block]
            tuned, _ = host.run_tuned({name: tuner}, Needs((block,)), *args, **kwargs)
            delta = tuner(seen[0])
        handle.remove()
        error = (tuned[block] - bare - delta).abs().max()
        assert error <= ROUNDING * bare.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_experts_of_transformers_are_a_feed_forward(name):
    ids = torch.tensor([[2, 3, 4, 2, 3, 9]])
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    host = Host(build(name), **kwargs)
    assert [s.op for s in host.sites.values()] == ["mha", "ffn", "block"] * 2
    check_site(host, (), kwargs)


def test_a_feed_forward_that_returns_scores_beside_the_stream_has_a_site():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 16)
    check_site(Host(Own().eval(), x), (x,), {})

"""Projections of language models: proved, and equal to prefixes that are really there."""

import pytest
import torch
import transformers as hf

from restuning import Host, Tuned
from zoo.language import (
    ALL,
    DECODERS,
    TWO_STACKS,
    WIDE_HEADS,
    Member,
    awake_task,
    batch,
    close,
    example,
    texts,
)

EMBEDDED_TOLERANCE = 2e-5
"""Of the largest logit: softmax over r + n tokens at once, and over both parts apart."""


@pytest.mark.parametrize("name", ALL)
def test_every_attention_lends_maps_that_were_proved(name):
    model = ALL[name].make()
    host = Host(model, **example(ALL[name]))
    layers = 4 if name in TWO_STACKS else 2
    assert host.sites.layers == layers
    for op in ("mha", "ffn", "block"):
        sites = host.sites.pick(op)
        assert len(sites) == layers
        assert all(s.projections is not None for s in sites.values())
    if name in TWO_STACKS:
        cross = host.sites.pick("cross")
        assert [s.layer for s in cross.values()] == [3, 4]
        assert all(s.projections.module.endswith("EncDecAttention") for s in cross.values())
        assert host.sites.taps == ("block.0", "block.1", "block.2", "start.3", "block.3", "block.4")
    causal = [s.projections.causal for s in host.sites.pick("mha").values()]
    assert (
        causal == ([False] * 2 if name not in DECODERS else [True] * 2)
        if layers == 2
        else (causal == [False, False, True, True])
    )


def test_what_is_known_of_grouped_queries_rotary_positions_and_norms():
    sites = {
        n: Host(ALL[n].make(), **example(ALL[n])).sites["mha.1"].projections
        for n in ("llama", "qwen3", "gemma", "gpt2")
    }
    assert (sites["llama"].heads, sites["llama"].kv_heads, sites["llama"].rope) == (4, 2, "half")
    assert sites["qwen3"].q_norm
    assert sites["qwen3"].key_width == 32
    assert sites["gemma"].head_dim == 16
    assert sites["gpt2"].rope == ""


def test_maps_of_a_layer_that_caps_its_scores_are_not_lent():
    member = Member("Gemma2ForCausalLM", "Gemma2Config", WIDE_HEADS)
    host = Host(member.make(), **example(member))
    assert all(s.projections is None for s in host.sites.values())


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3", "gemma"])
def test_an_exact_prefix_is_a_cache_that_was_filled_with_it(name, eager):
    model = ALL[name].make()
    if name == "mistral":
        # A window would push the first keys of the cache out; beside the layer they stay.
        model.config.sliding_window = None
    if eager:
        model.set_attn_implementation("eager")
    host = Host(model, **example(ALL[name]))
    task = awake_task("prefix", host, classes=None, rank=4)
    ids = texts((9,))[0][None].repeat(2, 1)
    cache = hf.DynamicCache()
    for index in range(2):
        prefix = task.inline_tuners[f"mha.{index + 1}"].tuner
        projections = host.sites[f"mha.{index + 1}"].projections
        heads = [
            t.detach()
            .unflatten(-1, (projections.kv_heads, -1))
            .transpose(0, 1)
            .expand(2, -1, -1, -1)
            for t in (prefix.k, prefix.v)
        ]
        cache.update(*heads, index)
    positions = torch.arange(9)[None]
    with torch.no_grad():
        bare = model(input_ids=ids, position_ids=positions).logits
        embedded = model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            attention_mask=torch.ones(2, 4 + 9, dtype=torch.long),
        ).logits
        ours = Tuned(host, task)(input_ids=ids, position_ids=positions).logits
    assert (embedded - bare).abs().max() > 100 * EMBEDDED_TOLERANCE
    close(ours, embedded, EMBEDDED_TOLERANCE)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", ["res-tuning[mha=prefix,ffn=prompt]", "res-tuning-bypass"])
def test_no_token_sees_a_later_one(name, method):
    model = ALL[name].make()
    host = Host(model, **example(ALL[name]))
    tuned = Tuned(host, awake_task(method, host, classes=None))
    ids = texts((9,))[0][None]
    changed = ids.clone()
    changed[0, 6:] = 3 + (changed[0, 6:] + 5) % 50
    with torch.no_grad():
        before = tuned(**batch(model, [ids[0]])).logits
        after = tuned(**batch(model, [changed[0]])).logits
    close(after[:, :6], before[:, :6], EMBEDDED_TOLERANCE)
    assert (after[:, 6:] - before[:, 6:]).abs().max() > 0.01

"""Generation: cached decoding equals uncached, and a bypass is a residual on the last stream."""

import pytest
import torch

from awake import wake
from restuning import Host, ResPrefix, Scaled, Task, Tuned, methods
from restuning._errors import DecodingError, PlacementError
from restuning.sites.linear import is_linear
from zoo.language import ALL, DECODERS, TWO_STACKS, awake_task, batch, close, example, texts

CACHED_TOLERANCE = 2e-5
"""Of the largest logit: one row of scores at a time, and all rows at once."""
NEW = 7

METHODS = [
    "res-tuning",
    "res-tuning[mha=prefix,ffn=prompt]",
    "prefix",
    "vpt-deep",
    "res-tuning-bypass",
]


@pytest.fixture(scope="module", params=[*DECODERS, *TWO_STACKS])
def member(request):
    model = ALL[request.param].make()
    return request.param, model, Host(model, **example(ALL[request.param]))


def generated(model, given, cache=True):
    found = model.generate(
        **given,
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, torch.stack(found.logits, 1)


def asked(model, rows):
    given = batch(model, rows, "left")
    return {k: given[k] for k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("method", METHODS)
def test_cached_decoding_equals_uncached_in_every_token_and_logit(member, method):
    name, model, host = member
    if method in ("prefix", "vpt-deep") and not host.sites["mha.1"].projections.direct:
        with pytest.raises(PlacementError, match="no identity"):
            Tuned(host, awake_task(method, host, classes=None))(**example(ALL[name]))
        return
    task = awake_task(method, host, classes=None)
    given = asked(model, texts((6, 4, 5)))
    bare, untuned = generated(model, given)
    with host.using(task):
        tokens, logits = generated(model, given)
        again, uncached = generated(model, given, cache=False)
    assert torch.equal(tokens, again)
    assert (logits[:, 0] - untuned[:, 0]).abs().max() > 100 * CACHED_TOLERANCE
    close(logits, uncached, CACHED_TOLERANCE)
    after, _ = generated(model, given)
    assert torch.equal(after, bare)


@pytest.mark.parametrize("form", ["none", "exact"])
@pytest.mark.parametrize("name", TWO_STACKS)
def test_tuners_beside_cross_attention_decode_with_a_cache_too(name, form):
    model = ALL[name].make()
    host = Host(model, **example(ALL[name]))

    def plan(site):
        prefix = ResPrefix(site.dim, length=3, width=site.projections.key_width)
        with torch.no_grad():
            prefix.v.mul_(5)
        return Scaled(prefix, form)

    task = Task.inline(host.sites.pick("cross"), plan)
    given = asked(model, texts((6, 4, 5)))
    _, untuned = generated(model, given)
    with host.using(task):
        tokens, logits = generated(model, given)
        again, uncached = generated(model, given, cache=False)
    assert torch.equal(tokens, again)
    assert (logits[:, 0] - untuned[:, 0]).abs().max() > 100 * CACHED_TOLERANCE
    close(logits, uncached, CACHED_TOLERANCE)


@pytest.mark.parametrize("method", ["res-tuning[mha=prefix,ffn=prompt]", "res-tuning-bypass"])
def test_prompts_padded_on_the_left_go_on_as_each_would_alone(member, method):
    name, model, host = member
    rows = texts((6, 4, 5))
    with host.using(awake_task(method, host, classes=None)):
        _, together = generated(model, asked(model, rows))
        alone = torch.cat([generated(model, asked(model, [row]))[1] for row in rows])
    close(together, alone, CACHED_TOLERANCE)


def test_a_bypass_for_generation_starts_as_the_bare_model_bit_for_bit(member):
    name, model, host = member
    task = methods.build("res-tuning-bypass", host)
    assert task.side.residual
    given = example(ALL[name])
    with torch.no_grad():
        assert torch.equal(Tuned(host, task)(**given).logits, model(**given).logits)
        start = asked(model, texts((6, 4)))
        with host.using(task):
            tokens, logits = generated(model, start)
        bare, wanted = generated(model, start)
    assert torch.equal(tokens, bare)
    assert torch.equal(logits, wanted)


def test_a_bypass_for_generation_learns_without_a_gradient_in_the_backbone(member):
    name, model, host = member
    task = methods.build("res-tuning-bypass", host)
    tuned = Tuned(host, task).train()
    backwards = []
    last = list(host.sites.values())[-1].module
    inside = [
        m for p, m in model.named_modules() if is_linear(m) and p != "lm_head" and "norm" not in p
    ]
    handles = [m.register_full_backward_hook(lambda *_: backwards.append(1)) for m in inside]
    assert last
    given = example(ALL[name])
    labels = given.get("decoder_input_ids", given["input_ids"])
    optimiser = torch.optim.AdamW(task.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = tuned(**given, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    for handle in handles:
        handle.remove()
    assert not backwards
    assert all(p.grad is None for p in model.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_a_saved_bypass_for_generation_comes_back_as_it_was(member, tmp_path):
    from restuning import load, save

    name, model, host = member
    task = awake_task("res-tuning-bypass", host, classes=None)
    again = load(save(task, host, tmp_path / "a.task"), host)
    assert again.side.residual
    with torch.no_grad():
        given = example(ALL[name])
        assert torch.equal(Tuned(host, again)(**given).logits, Tuned(host, task)(**given).logits)


def test_a_gate_over_all_tokens_is_refused_where_a_cache_hides_them():
    model = ALL["llama"].make()
    host = Host(model, **example(ALL["llama"]))
    for method in ("res-tuning", "res-tuning-bypass"):
        task = awake_task(method, host, classes=None, scale="gate")
        with host.using(task), pytest.raises(DecodingError, match="looks at all tokens"):
            generated(model, asked(model, texts((5,))))
        with host.using(task):
            generated(model, asked(model, texts((5,))), cache=False)


def test_a_fixed_cache_gives_the_same_tokens():
    model = wake(ALL["llama"].make())
    host = Host(model, **example(ALL["llama"]))
    given = asked(model, texts((6, 4)))
    with host.using(awake_task("prefix", host, classes=None)):
        tokens, _ = generated(model, given)
        fixed = model.generate(
            **given,
            max_new_tokens=NEW,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
        )
    assert torch.equal(fixed, tokens)

"""Padding changes nothing: every tuner, every readout, left and right, in every family."""

import pytest
import torch

from restuning import Host, Tuned
from restuning._errors import PlacementError
from restuning.task import Bank
from zoo.language import (
    ALL,
    DECODERS,
    ENCODERS,
    TWO_STACKS,
    awake_task,
    batch,
    close,
    example,
    takes_left_padding,
    texts,
)

PADDED_TOLERANCE = 1e-5
"""Of the largest value: attention over a padded row sums the same numbers in other blocks."""

METHODS = [
    ("linear", {}),
    ("res-tuning", {}),
    ("res-tuning", {"scale": "gate"}),
    ("res-tuning[mha=prefix,ffn=prompt]", {}),
    ("prefix", {}),
    ("vpt-deep", {}),
    ("res-tuning-bypass", {}),
    ("res-tuning-bypass", {"scale": "gate"}),
    ("res-tuning-bypass", {"residual": True}),
    ("mixing-bypass", {"width": 8, "heads": 2, "rank": 8}),
]


@pytest.fixture(scope="module", params=[*ENCODERS, *DECODERS])
def member(request):
    model = ALL[request.param].make()
    return request.param, model, Host(model, **example(ALL[request.param]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_agrees_with_every_text_alone(member, side):
    name, model, host = member
    if side == "left" and not takes_left_padding(model):
        pytest.skip("the backbone itself has no way to be told where a text begins")
    rows = texts()
    for method, options in METHODS:
        exact = method in ("prefix", "vpt-deep")
        if exact and not host.sites["mha.1"].projections.direct:
            continue
        for pool in ("mean", "last", "cls"):
            task = awake_task(method, host, pool=pool, **options)
            tuned = Tuned(host, task)
            with torch.no_grad():
                together = tuned(**batch(model, rows, side))
                alone = torch.cat([tuned(**batch(model, [row])) for row in rows])
            assert together.isfinite().all(), (method, pool)
            close(together, alone, PADDED_TOLERANCE)


def test_checkpointing_by_the_host_keeps_the_gradients_of_padded_texts(member):
    name, model, host = member
    padded = batch(model, texts(), "right")
    # A decoder never sees what is appended.
    for method in ("res-tuning", "full", *(["vpt-shallow"] if name in ENCODERS else [])):
        for pool in ("mean", "last", "cls"):
            task = awake_task(method, host, pool=pool)
            gradients = []
            try:
                for on in (False, True):
                    host.checkpoint(on)
                    task.zero_grad()
                    Tuned(host, task)(**padded).square().sum().backward()
                    gradients.append([p.grad for p in task.parameters() if p.grad is not None])
            except PlacementError:
                # Appended tokens have no place among relative positions.
                assert method == "vpt-shallow" and not gradients
                continue
            finally:
                host.checkpoint(False)
            plain, again = gradients
            assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), (method, pool)


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_logits_at_real_tokens_do_not_see_the_padding(member, side):
    name, model, host = member
    if side == "left" and not takes_left_padding(model):
        pytest.skip("the backbone itself has no way to be told where a text begins")
    rows = texts()
    for method in ("res-tuning", "res-tuning-bypass", "res-tuning[mha=prefix]"):
        tuned = Tuned(host, awake_task(method, host, pool="all"))
        with torch.no_grad():
            padded = batch(model, rows, side)
            together = tuned(**padded)
            for row, text in enumerate(rows):
                real = together[row][padded["attention_mask"][row].bool()]
                close(real, tuned(**batch(model, [text]))[0], PADDED_TOLERANCE)


def test_the_mask_decides_and_not_a_default(member):
    """The law would hold for a readout of the first token whatever the mask says: others move."""
    name, model, host = member
    rows = texts()
    padded = batch(model, rows)
    unmasked = {**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}
    for pool in ("mean", "last"):
        tuned = Tuned(host, awake_task("linear", host, pool=pool))
        with torch.no_grad():
            assert (tuned(**padded)[1] - tuned(**unmasked)[1]).abs().max() > 100 * PADDED_TOLERANCE


@pytest.mark.parametrize("name", TWO_STACKS)
def test_an_encoder_decoder_pads_both_of_its_sides(name):
    model = ALL[name].make()
    host = Host(model, **example(ALL[name]))
    sources, targets = texts((9, 5, 7)), texts((6, 8, 3), 5)
    for method, options in METHODS:
        if method == "linear":
            continue
        for pool in ("mean", "last"):
            tuned = Tuned(host, awake_task(method, host, pool=pool, **options))
            given, wanted = batch(model, sources), batch(model, targets)
            with torch.no_grad():
                together = tuned(
                    **given,
                    decoder_input_ids=wanted["input_ids"],
                    decoder_attention_mask=wanted["attention_mask"],
                )
                alone = torch.cat(
                    [
                        tuned(**batch(model, [s]), decoder_input_ids=t[None])
                        for s, t in zip(sources, targets, strict=True)
                    ]
                )
                close(together, alone, PADDED_TOLERANCE)
                if tuned.task.side is not None:
                    taps = host.features(
                        **given,
                        decoder_input_ids=wanted["input_ids"],
                        decoder_attention_mask=wanted["attention_mask"],
                    )
                    assert torch.equal(taps.mask, wanted["attention_mask"].bool())
                    close(tuned.task(taps), together, PADDED_TOLERANCE)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_tokens_appended_at_the_stem_attend_and_are_seen_beside_padding(name):
    model = ALL[name].make()
    host = Host(model, **example(ALL[name]))
    tuned = Tuned(host, awake_task("vpt-shallow", host, pool="mean"))
    rows = texts()
    with torch.no_grad():
        together = tuned(**batch(model, rows))
        alone = torch.cat([tuned(**batch(model, [row])) for row in rows])
        close(together, alone, PADDED_TOLERANCE)
        for p in tuned.task.tuners.parameters():
            p.zero_()
        assert (tuned(**batch(model, rows)) - together).abs().max() > 100 * PADDED_TOLERANCE


@pytest.mark.parametrize(("name", "why"), [("llama", "never seen"), ("t5 encoder", "no place")])
def test_tokens_appended_where_they_cannot_work_are_refused(name, why):
    model = ALL[name].make()
    host = Host(model, **example(ALL[name]))
    with pytest.raises(PlacementError, match=why):
        Tuned(host, awake_task("vpt-shallow", host))(**batch(model, texts()))


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("pool", ["mean", "last", "cls"])
def test_a_bank_reads_padded_texts_as_its_tasks_do(name, pool):
    model = ALL[name].make()
    host = Host(model, **example(ALL[name]))
    tasks = {
        "a": awake_task("res-tuning-bypass", host, pool=pool),
        "b": awake_task("res-tuning-bypass", host, classes=5, pool=pool),
        "c": awake_task("linear", host, pool=pool),
        "d": awake_task("res-tuning-bypass", host, pool=pool, residual=True),
    }
    bank, padded = Bank(tasks), batch(model, texts(), "left" if name == "llama" else "right")
    with torch.no_grad():
        answers = bank(host.features(keep=bank.keep, **padded))
        for key, task in tasks.items():
            close(answers[key], Tuned(host, task)(**padded), PADDED_TOLERANCE)
    one_token = pool in ("cls", "last")
    assert bank.keep.tokens == (pool if one_token else "all")


def test_a_bypass_that_reads_one_token_keeps_one_token_a_text():
    model = ALL["gpt2"].make()
    host = Host(model, **example(ALL["gpt2"]))
    task = awake_task("res-tuning-bypass", host)
    needs = task.needs(host.readout_rule)
    assert needs.tokens == host.readout_rule.pool == "last"
    padded = batch(model, texts())
    few, whole = host.features(keep=needs, **padded), host.features(keep=needs.taps, **padded)
    assert all(tap.shape[1] == 1 for tap in few.values())
    with torch.no_grad():
        close(task(few), task(whole), PADDED_TOLERANCE)

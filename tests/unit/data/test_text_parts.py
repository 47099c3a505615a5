"""Masks in readouts, words and tokens, scores of labelled tokens: against plain loops."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from restuning._errors import DataError, TrainingError
from restuning.backbones import Backbone
from restuning.data import TagBatch, TextBatch, load_data
from restuning.problems import IGNORED, Tokens
from restuning.sites import average_tokens, take_one_token
from restuning.tuners import real_tokens
from restuning.tuners.context import average_real_tokens
from zoo import folders

MEAN_TOLERANCE = 1e-6
"""A sum of at most eight numbers of size one, in another order."""

MASKS = st.lists(
    st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=4
)


@given(MASKS)
def test_one_vector_of_a_text_is_that_of_its_real_tokens(rows):
    mask = torch.tensor(rows)
    state = torch.randn(len(rows), 5, 3)
    for row, real in enumerate(rows):
        own = state[row][torch.tensor(real)]
        assert torch.equal(take_one_token(state, "cls", mask)[row, 0], own[0])
        assert torch.equal(take_one_token(state, "last", mask)[row, 0], own[-1])
        assert (average_tokens(state, mask)[row] - own.mean(0)).abs().max() < MEAN_TOLERANCE
        with real_tokens(mask):
            assert (average_real_tokens(state)[row, 0] - own.mean(0)).abs().max() < MEAN_TOLERANCE
    assert torch.equal(average_real_tokens(state), state.mean(1, keepdim=True))


def test_padding_that_is_not_a_number_reaches_no_vector():
    state = torch.ones(1, 3, 2)
    state[0, 2] = torch.nan
    mask = torch.tensor([[True, True, False]])
    for vector in (average_tokens(state, mask), take_one_token(state, "last", mask)[:, 0]):
        assert torch.equal(vector, torch.ones(1, 2))


def test_a_mask_of_earlier_tokens_too_counts_for_the_last():
    state = torch.arange(4.0).view(1, 2, 2)
    mask = torch.tensor([[True, True, True, True, False]])
    assert torch.equal(take_one_token(state, "last", mask)[0, 0], state[0, 0])


# --------------------------------------------------------------- scores of labelled tokens


@given(
    st.lists(
        st.lists(st.sampled_from([IGNORED, 0, 1, 2]), min_size=4, max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_a_text_of_labelled_tokens_counts_as_the_mean_of_them(rows):
    labels = torch.tensor(rows)
    logits = torch.randn(len(rows), 4, 3)
    loss, hits = Tokens().score(logits, labels)
    wanted_loss, wanted_hits = 0.0, 0.0
    for row, each in enumerate(rows):
        kept = [i for i, y in enumerate(each) if y != IGNORED]
        for i in kept:
            wanted_loss += F.cross_entropy(logits[row, i], labels[row, i]).item() / len(kept)
            wanted_hits += (logits[row, i].argmax() == labels[row, i]).item() / len(kept)
    assert loss.item() == pytest.approx(wanted_loss, abs=1e-4)
    assert hits.item() == pytest.approx(wanted_hits, abs=1e-4)


def test_labels_of_texts_and_logits_of_tokens_are_refused_together():
    with pytest.raises(TrainingError, match='pool="all"'):
        Tokens().score(torch.randn(2, 5, 3), torch.tensor([0, 1]))


# ------------------------------------------------------------------------ words and tokens


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    import transformers

    folder = folders.bert(tmp_path_factory.mktemp("bert"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Backbone("bert", torch.nn.Identity(), (), {}, None, tokenizer)


WORD = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=6).filter(
    lambda w: not w.startswith("-DOCSTART-") and w == w.strip()
)
SENTENCES = st.lists(
    st.lists(st.tuples(WORD, st.sampled_from(["O", "LOC", "PER"])), min_size=1, max_size=5),
    min_size=10,
    max_size=14,
)


@settings(max_examples=30, deadline=None)
@given(SENTENCES, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_tagged_words_come_back_as_they_were_written(tmp_path_factory, backbone, rows, end, more):
    rows = [*rows, [("a", "O"), ("b", "LOC"), ("c", "PER")]]
    middle = " NN " if more else " "
    text = (end * 2).join(end.join(f"{w}{middle}{t}" for w, t in s) for s in rows)
    folder = tmp_path_factory.mktemp("tags")
    for name in ("train", "test"):
        (folder / f"{name}.conll").write_bytes(("-DOCSTART- O" + end * 2 + text + end).encode())
    data = load_data(str(folder), backbone)
    assert (data.kind, data.labels[0]) == ("tags", "O")
    for split in (data.train, data.test):
        found = [
            [(w, data.labels[y]) for w, y in zip(words, tags, strict=True)] for words, tags in split
        ]
        assert found == rows


def test_the_first_token_of_a_word_bears_its_label_and_no_other(backbone):
    collate = TagBatch(backbone.tokenizer)
    batch, labels = collate([(["ann", "good-bad", "in"], [1, 2, 0]), (["paris"], [2])])
    names = backbone.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert names == ["[CLS]", "ann", "good", "[UNK]", "bad", "in", "[SEP]"]
    assert labels[0].tolist() == [IGNORED, 1, 2, IGNORED, IGNORED, 0, IGNORED]
    assert labels[1].tolist() == [IGNORED, 2] + [IGNORED] * 5


def test_words_beyond_the_longest_text_have_no_label(backbone):
    batch, labels = TagBatch(backbone.tokenizer, 4)([(["ann", "in", "paris", "and"], [1, 0, 2, 0])])
    assert batch["input_ids"].shape == (1, 4)
    assert labels.tolist() == [[IGNORED, 1, 0, IGNORED]]


def test_texts_are_padded_on_the_right_whatever_the_tokenizer_s_habit(backbone):
    backbone.tokenizer.padding_side = "left"
    try:
        batch, _ = TextBatch(backbone.tokenizer)([("a good film", 0), ("bad", 1)])
    finally:
        backbone.tokenizer.padding_side = "right"
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_a_word_without_a_tag_is_named_by_its_line(backbone, tmp_path):
    (tmp_path / "a.conll").write_text("ann PER\nin\n")
    with pytest.raises(DataError, match="line 2"):
        load_data(str(tmp_path / "a.conll"), backbone)

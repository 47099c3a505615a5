"""Texts are cut where the model's positions end, and longer ones are not asked for."""

import pytest
import torch

from restuning import load_backbone, load_data
from restuning._errors import DataError
from restuning.data import make_text_batch

hf = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

POSITIONS = 40
NARROW = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "pad_token_id": 1,
}


def bert_like(name, rows=POSITIONS, **more):
    config = getattr(hf, f"{name}Config")(**NARROW, max_position_embeddings=rows, **more)
    return getattr(hf, f"{name}Model")(config)


def opt():
    config = hf.OPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=POSITIONS,
    )
    return hf.OPTModel(config)


MODELS = {
    "bert": lambda: bert_like("Bert"),
    "electra": lambda: bert_like("Electra", embedding_size=16),
    # Two rows are kept: for the padding token's number, 1, and below it.
    "roberta": lambda: bert_like("Roberta", POSITIONS + 2),
    "mpnet": lambda: bert_like("MPNet", POSITIONS + 2),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(
            vocab_size=50,
            dim=16,
            n_layers=1,
            n_heads=2,
            hidden_dim=16,
            max_position_embeddings=POSITIONS,
        )
    ),
    "gpt2": lambda: hf.GPT2Model(
        hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS)
    ),
    "opt": opt,
    # Rotary: it would run, beyond what it was trained at.
    "llama": lambda: bert_like("Llama"),
}
ENDLESS = {"llama"}


@pytest.fixture
def folder(tmp_path):
    """Writes a model with a tokenizer that knows no limit."""

    def write(model):
        words = {w: i for i, w in enumerate(["[UNK]", "[PAD]", "a", "b", "c"])}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
        hf.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(tmp_path)
        model.eval().save_pretrained(tmp_path)
        rows = "".join(f"{'a b c ' * n},{n % 2}\n" for n in (1, 2, 50, 61) * 5)
        (tmp_path / "texts.csv").write_text(f"text,label\n{rows}")
        return tmp_path

    return write


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_cut_at_the_last_position_and_not_before(name, folder):
    where = folder(MODELS[name]())
    backbone = load_backbone(f"hf:{where}")
    data = load_data(str(where / "texts.csv"), backbone)
    batch, _ = data.collate([data.train[i] for i in range(len(data.train))])
    assert batch["input_ids"].shape[1] == POSITIONS
    assert data.collate.to_dict()["max_tokens"] == POSITIONS
    with torch.no_grad():
        backbone.model(**batch)
        if name not in ENDLESS:
            longer = {k: torch.cat([v, v[:, -1:]], 1) for k, v in batch.items()}
            with pytest.raises((IndexError, RuntimeError)):
                backbone.model(**longer)


def test_more_tokens_than_positions_are_refused_with_the_number(folder):
    where = folder(MODELS["roberta"]())
    backbone = load_backbone(f"hf:{where}")
    with pytest.raises(DataError, match=f"takes {POSITIONS}"):
        load_data(str(where / "texts.csv"), backbone, max_tokens=POSITIONS + 1)
    fewer = load_data(str(where / "texts.csv"), backbone, max_tokens=POSITIONS - 1)
    assert fewer.collate.limit == POSITIONS - 1


def test_a_task_of_before_with_more_tokens_still_opens(folder):
    backbone = load_backbone(f"hf:{folder(MODELS['bert']())}")
    batch = make_text_batch(backbone.tokenizer, {"kind": "text", "max_tokens": 200})
    assert batch.limit == POSITIONS


def test_a_model_without_positions_leaves_the_tokenizer_s_limit(folder):
    config = hf.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=1
    )
    where = folder(hf.T5Model(config))
    backbone = load_backbone(f"hf:{where}")
    assert load_data(str(where / "texts.csv"), backbone, max_tokens=600).collate.limit == 600

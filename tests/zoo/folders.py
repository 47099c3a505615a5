"""Small language models as folders that `from_pretrained` reads, with tokenizers of whole words."""

from pathlib import Path

import tokenizers
import torch
import transformers as hf

from awake import wake

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad film very a to the and paris berlin ann bob in"
VOCABULARY = {word: i for i, word in enumerate(WORDS.split())}


def _tokenizer(folder: Path, ends: bool) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if ends:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    more = {"pad_token": "[PAD]"} if ends else {"eos_token": "[SEP]"}
    hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        **more,
    ).save_pretrained(folder)


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    wake(hf.BertModel(config)).save_pretrained(folder)
    _tokenizer(folder, ends=True)
    return folder


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=2,
        eos_token_id=3,
    )
    wake(hf.GPT2LMHeadModel(config)).save_pretrained(folder)
    _tokenizer(folder, ends=False)
    return folder


def t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=len(VOCABULARY),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=3,
    )
    wake(hf.T5ForConditionalGeneration(config)).save_pretrained(folder)
    _tokenizer(folder, ends=True)
    return folder

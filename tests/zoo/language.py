"""Small language models of the main families with random, awake weights."""

import inspect
from dataclasses import dataclass

import torch
import transformers as hf

from awake import wake
from restuning import methods

PAD = 1
"""Also RoBERTa's, which finds its positions by it."""
WORDS = 60
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "pad_token_id": PAD,
}
ENDS = {"bos_token_id": 2, "eos_token_id": None}
GROUPED = {**SIZES, **ENDS, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 16}
T5 = {
    "vocab_size": WORDS,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": PAD,
    "decoder_start_token_id": 2,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Member:
    """One model, and what is known of it."""

    cls: str
    config: str
    settings: dict

    def make(self, seed: int = 0):
        torch.manual_seed(seed)
        config = getattr(hf, self.config)(**self.settings)
        model = wake(getattr(hf, self.cls)(config), seed)
        if hasattr(model, "generation_config"):
            model.generation_config.pad_token_id = PAD
        return model

    @property
    def two_stacks(self) -> bool:
        return self.cls in ("T5Model", "T5ForConditionalGeneration")


ENCODERS = {
    "bert": Member("BertModel", "BertConfig", SIZES),
    "roberta": Member("RobertaModel", "RobertaConfig", SIZES),
    "distilbert": Member(
        "DistilBertModel",
        "DistilBertConfig",
        {
            "vocab_size": WORDS,
            "dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 96,
            "pad_token_id": PAD,
        },
    ),
    "t5 encoder": Member("T5EncoderModel", "T5Config", T5),
}
DECODERS = {
    "gpt2": Member(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": WORDS, "n_embd": 48, "n_layer": 2, "n_head": 4, **ENDS},
    ),
    "llama": Member("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": Member("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 6}),
    "qwen2": Member("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": Member("Qwen3ForCausalLM", "Qwen3Config", WIDE_HEADS),
    "gemma": Member("GemmaForCausalLM", "GemmaConfig", WIDE_HEADS),
    "gemma3": Member("Gemma3ForCausalLM", "Gemma3TextConfig", {**WIDE_HEADS, "sliding_window": 6}),
}
TWO_STACKS = {
    "t5": Member("T5ForConditionalGeneration", "T5Config", T5),
    "t5 gated": Member(
        "T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}
    ),
}
ALL = {**ENCODERS, **DECODERS, **TWO_STACKS}


def texts(lengths=(9, 5, 7), seed=3):
    """Token ids of a few texts, without the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, WORDS, (n,), generator=generator) for n in lengths]


def example(member):
    ids = texts((9,))[0][None]
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if member.two_stacks:
        kwargs["decoder_input_ids"] = texts((6,), 4)[0][None]
    return kwargs


def batch(model, rows, side="right"):
    """Rows padded to the longest; positions given where a left pad would move them."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, text in enumerate(rows):
        place = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[row, place], mask[row, place] = text, 1
    given = {"input_ids": ids, "attention_mask": mask}
    names = inspect.signature(model.forward).parameters
    # RoBERTa finds positions by the padding id, as generate() does for the others by the mask.
    if side == "left" and "position_ids" in names and "Roberta" not in type(model).__name__:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return given


def takes_left_padding(model):
    """T5 has relative positions; a model that takes no positions cannot be told of the padding."""
    name = type(model).__name__
    return "position_ids" in inspect.signature(model.forward).parameters or "T5" in name


def awake_task(method, host, classes=3, **options):
    task = methods.build(method, host, num_classes=classes, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in task.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return task.eval()


def close(a, b, tolerance):
    error, size = (a - b).abs().max(), b.abs().max()
    assert error <= tolerance * size, f"differ by {error} of {size}"

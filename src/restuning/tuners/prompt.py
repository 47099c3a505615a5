"""Res-Prompt: the layer's queries attend to learned tokens through the layer's own W_k and W_v."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restuning.tuners._base import tuner
from restuning.tuners.learned_tokens import AttentionTuner, Query, require_attention
from restuning.tuners.products import split_heads
from restuning.tuners.view import FrozenAttention


@tuner("res_prompt")
class ResPrompt(AttentionTuner):
    r"""Prompt tuning, unbound: `OP(x) + Attn(Q, x_pro W_k, x_pro W_v) W_o`, all W the layer's own.

    The prompt passes the branch's norm first, as every token does, which is what makes the exact
    form equal VPT-deep. It stands at no position: in layers with rotary positions at position 0.
    At cross-attention the prompt are tokens of the other sequence, which pass no norm there.

    Args:
        dim: Width d of the stream.
        length: Number r of prompt tokens. The paper uses 10 in every layer.
        query: "mha" or "stream" (then `Attn(x, x_pro, x_pro)`); see `AttentionTuner`.
        heads: Heads for `query="stream"`.
        width: Width of a prompt token at cross-attention: that of the other sequence,
            `site.projections.context`. None is d.

    Shape:
        x: `(*b, n, d) -> (*b, n, d)`.

    Cost: `r*d` parameters, `2*d*d + 4*r*d` flops a token with "mha", else `4*r*d`.
    Start: Xavier-uniform, as in the authors' code.
    Reference: arXiv 2310.19859, eq. (5), Fig. 3(a). The rows of the prompt tokens themselves
    (gate beta) are dropped as in the figure; exact for VPT-deep, which replaces them each layer.
    """

    def __init__(
        self,
        dim: int,
        *,
        length: int = 10,
        query: Query = "mha",
        heads: int = 1,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.length, self.heads, self.width = dim, length, heads, width
        self.query: Query = query
        self.prompt = nn.Parameter(torch.empty(length, width or dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start values; see the class."""
        nn.init.xavier_uniform_(self.prompt)

    def keys_values(self, view: FrozenAttention | None) -> tuple[Tensor, Tensor]:
        """The prompt through the layer's norm, W_k and W_v."""
        if self.query == "stream":
            tokens = split_heads(self.prompt, self.heads)
            return tokens, tokens
        attention = require_attention(view, self)
        tokens = attention.norm(self.prompt) if self.width is None else self.prompt
        return attention.k(tokens), attention.v(tokens)


@tuner("stem_prompt")
class StemPrompt(AttentionTuner):
    """VPT-shallow: learned tokens appended to the embedding output, carried through all layers.

    Not of the form `OP(x) + tuner(x)`: there is no identity for prompts that propagate. It sits at
    the stem (`block.0`) and the host removes its tokens after the last layer.

    Args:
        dim: Width d of the stream.
        length: Number r of tokens; 10 reproduces the paper's 0.08 M on ViT-B/16.

    Shape:
        x: `b n d -> b r d`, the tokens to append.
    """

    mixes_tokens = True

    def __init__(self, dim: int, *, length: int = 10) -> None:
        super().__init__()
        self.dim, self.length, self.appends = dim, length, length
        # Nothing is borrowed: the backbone's own layers attend to the tokens.
        self.query: Query = "stream"
        self.prompt = nn.Parameter(torch.empty(length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform."""
        nn.init.xavier_uniform_(self.prompt)

    def keys_values(self, view: FrozenAttention | None) -> tuple[Tensor, Tensor]:
        """The tokens themselves."""
        return self.prompt, self.prompt

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """The tokens, once for each sample."""
        # Under autocast the stream may be in half precision, and both go into one tensor.
        return self.prompt.to(x.dtype).expand(x.shape[0], -1, -1)

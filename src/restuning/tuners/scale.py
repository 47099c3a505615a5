"""The "Scale" box at the end of every Res-Tuner, in all its forms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from restuning._errors import UnknownNameError
from restuning.tuners._base import Tuner, trait, tuner
from restuning.tuners.context import average_real_tokens
from restuning.tuners.learned_tokens import AttentionTuner, require_attention
from restuning.tuners.products import attend
from restuning.tuners.view import FrozenAttention
from restuning.tuners.wrapper import Wrapper

Form = Literal["none", "scalar", "channel", "gate", "exact"]
FORMS = ("none", "scalar", "channel", "gate", "exact")


@tuner("scaled")
class Scaled(Wrapper):
    r"""`s * tuner(x)` with s in one of five forms.

    - "none": s = 1, the bare tuner.
    - "scalar": one learned number, start 1.
    - "channel": one learned number a channel, start 1. The paper's choice (best in the authors'
      ablation) for the dual Res-Adapter.
    - "gate": `mean over real tokens of sigmoid(W x)`, one number a sample.
    - "exact": the lambda of the paper's identity, which also takes from the frozen path:
      `OP(x) + W_o lambda (Attn(Q, K_t, V_t) - Attn(Q, K, V))`,
      `lambda = sigmoid(LSE(Q K_t) - LSE(Q K))`, per sample, head and query. With it prefix and
      prompt tuning are *equal* to their embedded originals. Only for Res-Prefix and Res-Prompt on
      MHA; it computes the layer's attention once more.

    Args:
        tuner: What is scaled.
        form: One of the five.
        start: First value of a learned number. 1 as in the authors' code; 0 starts as no change,
            also for a tuner that has no such start of its own (Res-Prompt).

    Cost: 0, 1, d, d + 1 and 0 parameters.
    Reference: arXiv 2310.19859 section 3; the four learned forms are U-Tuning's Table 7.

    Raises:
        UnknownNameError: No such form, or "exact" over a tuner that has no identity.
    """

    def __init__(self, tuner: Tuner, form: Form = "channel", start: float = 1.0) -> None:
        super().__init__(tuner)
        if form not in FORMS:
            raise UnknownNameError(
                "no such form of scale", where=form, fix=f"one of {', '.join(FORMS)}"
            )
        if form == "exact" and not (isinstance(tuner, AttentionTuner) and tuner.query == "mha"):
            raise UnknownNameError(
                'the "exact" scale is an identity of attention',
                where=tuner.kind,
                fix='use it over ResPrefix or ResPrompt with query="mha"',
            )
        self.tuner = tuner
        self.form: Form = form
        self.start = float(start)
        if form == "scalar":
            self.scale = nn.Parameter(torch.full((), self.start))
        elif form == "channel":
            self.scale = nn.Parameter(torch.full((self.dim_out,), self.start))
        elif form == "gate":
            self.gate = nn.Linear(self.dim, 1)

    @property
    def members(self) -> tuple[Tuner]:
        """The tuner that is scaled."""
        return (self.tuner,)

    @trait
    def mixes_tokens(self) -> bool:
        """A gate averages over tokens, the exact form attends to them."""
        return self.form in ("gate", "exact") or self.tuner.mixes_tokens

    @property
    def looks_ahead(self) -> bool:
        """The gate's mean does; the exact form sees what the layer sees."""
        return self.form == "gate" or self.tuner.looks_ahead

    def reset_parameters(self) -> None:
        """Scales at their start; the gate as torch draws a linear map; then the tuner's own."""
        if self.form in ("scalar", "channel"):
            nn.init.constant_(self.scale, self.start)
        elif self.form == "gate":
            self.gate.reset_parameters()
        self.tuner.reset_parameters()

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the scaled delta; see the class."""
        if self.form in ("scalar", "channel"):
            # A scalar as one number a channel: tuners fold only those into their last product.
            return self.tuner.scaled(x, view, self.scale.expand(self.dim_out))
        if self.form == "gate":
            return self.tuner(x, view) * average_real_tokens(self.gate(x).sigmoid())
        if self.form == "exact":
            return self._exact(x, view)
        return self.tuner(x, view)

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + s * tuner(x)`; a learned s goes into the tuner's own last product."""
        # Two scales at once, or one for each sample, do not fold into a weight.
        if scale is not None or self.form in ("gate", "exact"):
            return super().added(y, x, view, scale)
        own = self.scale.expand(self.dim_out) if self.form in ("scalar", "channel") else None
        return self.tuner.added(y, x, view, own)

    def _exact(self, x: Tensor, view: FrozenAttention | None) -> Tensor:
        attention = require_attention(view, self)
        assert isinstance(self.tuner, AttentionTuner)
        queries, ours, ours_lse = self.tuner.attend_to_tokens(x, view)
        keys, values = attention.keys_values(attention.norm(x))
        theirs, theirs_lse = attend(
            queries, keys, values, attention.scale, attention.mask(queries, keys)
        )
        # lambda = Z_t / (Z_t + Z), Z the softmax's denominators, whose logarithms these are.
        return attention.out((ours_lse - theirs_lse).sigmoid() * (ours - theirs))

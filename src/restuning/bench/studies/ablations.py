"""The ablations: named lists of methods with options, each one command of `bench run`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from restuning._errors import UnknownNameError
from restuning.bench.grid import Entry, parse_entry

TUNERS = ("adapter", "prefix", "prompt")
RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Ablation:
    """What is compared.

    Attributes:
        question: One sentence.
        entries: As `bench run --methods` reads them.
        published: Table of the paper to show beside, or "".
    """

    question: str
    entries: Sequence[str]
    published: str = ""


def _combinations() -> list[str]:
    """Single at each operation, every pair on MHA and FFN, and the best pair with one on block."""
    single = [f"res-tuning[{op}={t}]" for op in ("mha", "ffn", "block") for t in TUNERS]
    dual = [f"res-tuning[mha={m},ffn={f}]" for m, f in itertools.product(TUNERS, TUNERS)]
    tri = [f"res-tuning[mha=adapter,ffn=adapter,block={t}]" for t in TUNERS]
    return [*single, *dual, *tri]


ABLATIONS: dict[str, Ablation] = {
    "original-unbound": Ablation(
        "Is a tuning method as accurate unbound as in its original form?",
        [
            "prefix",
            "prefix unbound=res-tuning[mha=prefix]",
            "vpt-deep",
            "prompt unbound=res-tuning[mha=prompt]",
            "adapter",
            "adapter unbound=res-tuning[ffn=adapter]",
        ],
        "original-unbound",
    ),
    "combinations": Ablation(
        "Which tuner beside which operation?", _combinations(), "combinations"
    ),
    "layers": Ablation(
        "How many layers are tuned, and which?",
        [
            "linear",
            *[
                f"{side} {share}=res-tuning:layers={side}-{share}"
                for side in ("first", "last")
                for share in ("1/3", "2/3")
            ],
            "every second=res-tuning:layers=every-2",
            "all=res-tuning",
        ],
    ),
    "rank": Ablation(
        "How wide must a Res-Adapter be?", [f"rank {r}=res-tuning:rank={r}" for r in RANKS]
    ),
    "rank-bypass": Ablation(
        "How wide must the bypass's Res-Adapters be?",
        [f"rank {r}=res-tuning-bypass:rank={r}" for r in RANKS],
    ),
    "scale": Ablation(
        "What scales a tuner's output?",
        [f"{form}=res-tuning:scale={form}" for form in ("none", "scalar", "channel", "gate")],
    ),
    "bypass": Ablation(
        "What do horizontal and vertical tuners each give?",
        ["linear", "bypass-horizontal", "bypass-vertical", "res-tuning-bypass"],
        "bypass",
    ),
    "lambda": Ablation(
        "Must lambda be learned?",
        [
            "learned=res-tuning-bypass",
            *[f"fixed {g}=res-tuning-bypass:gate={g}" for g in (0.1, 0.5, 0.9)],
        ],
    ),
    "reads": Ablation(
        "Where does the tuner read: the stream, after the norm, or the operation's output?",
        ["stream=res-tuning", "after the norm=res-tuning-after-norm", "output=houlsby:rank=10"],
    ),
    "taps": Ablation(
        "How many taps does a bypass need?",
        [
            "linear",
            "last=res-tuning-bypass:taps=last-1",
            "last 1/2=res-tuning-bypass:taps=last-1/2",
            "every second=res-tuning-bypass:taps=every-2",
            "all=res-tuning-bypass",
        ],
    ),
}


def ablation_entries(name: str) -> list[Entry]:
    """The entries of an ablation.

    Raises:
        UnknownNameError: No such ablation.
    """
    if name not in ABLATIONS:
        raise UnknownNameError(
            "no such ablation", where=name, fix=f"one of: {', '.join(ABLATIONS)}"
        )
    return [parse_entry(text) for text in ABLATIONS[name].entries]

"""Methods of our own: a bypass that mixes tokens."""

from __future__ import annotations

from torch import nn

from restuning._errors import NoSitesError
from restuning.extractor import Extractor
from restuning.methods.method import Method, Options
from restuning.mixing import MixingBypass
from restuning.pooling import Pooling, Token
from restuning.task import Task
from restuning.tuners import ConvAdapter, LowRankAttention, ResAdapter, Tuner

WIDTH, HEADS, RANK, TAPS, DROP_PATH = 64, 4, 128, 6, 0.1
"""Chosen on the validation splits of three tasks; see `docs/mixing.md`."""


_TOKEN: dict[str, Token] = {"cls": "cls", "last": "last", "all": "all"}


def _mixing(host: Extractor, head: nn.Linear | None, options: Options) -> Task:
    if head is None:
        raise NoSitesError(
            "a mixing bypass makes a feature for a head", where="mixing-bypass",
            found="no classes", fix="give num_classes; res-tuning-bypass also runs without a head",
        )  # fmt: skip
    stack = host.sites.last_stack
    blocks = list(stack.pick("block").values())
    evenly = {max(1, round(len(blocks) * k / TAPS)) for k in range(1, TAPS + 1)}
    first = blocks[0].layer - 1
    layers = options.get("layers") or [first + number for number in sorted(evenly)]
    read = list(stack.pick("block", layers=layers).values())
    if read[-1] is not blocks[-1]:
        read.append(blocks[-1])
    width, rank = options.get("width", WIDTH), options.get("rank", RANK)

    def tuners() -> list[Tuner]:
        near: Tuner = (
            ConvAdapter(width, rank=rank, prefix=None, norm=True) if host.images
            else ResAdapter(width, rank=rank)
        )  # fmt: skip
        far = LowRankAttention(width, rank=width, heads=options.get("heads", HEADS))
        return [near, far]

    pool = options.get("pool") or host.readout_rule.pool
    bypass = MixingBypass(
        [s.name for s in read], [s.dim for s in read], [tuners() for _ in read],
        Pooling(width, token=_TOKEN.get(pool), grid=host.images),
        drop_path=options.get("drop_path", DROP_PATH),
    )  # fmt: skip
    return Task(bypass=bypass, head=bypass.widened(head))


ROWS: dict[str, Method] = {
    "mixing-bypass": Method(
        _mixing, "a narrow side network of attention and convolution on all tokens of six taps, "
        "no gradient in the backbone", "docs/mixing.md", takes=("width", "heads"), inside=False,
    ),
}  # fmt: skip

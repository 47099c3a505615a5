"""Methods of our own: a bypass that mixes tokens, a classifier on taps in closed form, and nearest neighbours."""

from __future__ import annotations

from torch import nn

from restuning._errors import NoSitesError
from restuning.bypass import (
    Ensemble,
    Finer,
    GridRidge,
    MixingBypass,
    Nearest,
    Pooling,
    Ridge,
    SideNetwork,
)
from restuning.bypass.finer import PARTS
from restuning.bypass.pooling import Token
from restuning.host import Extractor
from restuning.methods import bypasses
from restuning.methods.method import Method, Options
from restuning.sites import Site, is_hierarchy
from restuning.task import Task
from restuning.tuners import ConvAdapter, LowRankAttention, ResAdapter, Tuner

PLACES = 3
"""Layers whose rows and columns a classifier in closed form reads: they are most of what it stores."""

WIDTH, HEADS, RANK, TAPS, DROP_PATH = 64, 4, 128, 6, 0.1
"""Chosen on the validation splits of three tasks; see `docs/mixing.md`."""

NETWORKS, MEMBER_TAPS, MEMBER_WIDTH = 2, 3, 48
"""Of an ensemble: networks that are trained beside the closed form, the taps that each reads and its width. Half the
taps and less than half the rank of `mixing-bypass` are three steps in the time of one."""

FEW_CLASSES = 32
"""Up to which a classifier of patches answers 16 parts of each; of more classes 4, or it would be as large as a network."""

_TOKEN: dict[str, Token] = {"cls": "cls", "last": "last", "all": "all"}


def _pick_layers(host: Extractor, options: Options, count: int = TAPS) -> list[Site]:
    """The layers that are read: those of the options, else some evenly; the last among them."""
    stack = host.sites.last_stack
    blocks = list(stack.pick("block").values())
    # A set: of a backbone with fewer layers than taps each is read once.
    evenly = {max(1, round(len(blocks) * k / count)) for k in range(1, count + 1)}
    # Layers of a decoder are numbered on from the encoder's.
    first = blocks[0].layer - 1
    layers = options.get("layers") or [first + number for number in sorted(evenly)]
    read = list(stack.pick("block", layers=layers).values())
    # The feature begins with the backbone's own readout, which needs the last stream.
    if read[-1] is not blocks[-1]:
        read.append(blocks[-1])
    return read


def _make_classifier(
    host: Extractor, options: Options, classes: int, pool: str, head: nn.Linear
) -> Ridge:
    own = pool == "own"
    stack = host.sites.last_stack
    read = list(stack.pick("block").values())
    if options.get("layers"):
        read = _pick_layers(host, options)
    names, dims = [s.name for s in read], [s.dim for s in read]
    # A token of its own is one of a class or a text: where images are read by their mean there is none.
    token: Token | None = None if own or (host.images and pool == "mean") else "cls"
    token = "last" if pool == "last" else token
    one = "vector" if own else "token" if token else ""
    blocks = [(one, name) for name in names if one]
    parts = [(part, n) for n in names for part in ("mean", "largest", "deviation")]
    # Maps, windows and hierarchies have no grid of tokens, whatever they are asked to be read by.
    grid = host.images and host.readout_rule.pool != "own"
    if own:
        # Where the backbone pools by itself its last tap is the feature, as wide as that, and has no parts.
        parts = [block for block in parts if block[1] != names[-1]]
        dims[-1] = host.dim
    elif grid:
        parts += [("places", names[n]) for n in _pick_thirds(len(names))]
    made = Ridge(
        names,
        dims,
        classes,
        token=token,
        grid=grid,
        blocks=[*blocks, *parts],
        weighted=True,
        start=(pool, head.in_features) if options.get("given_head") else None,
    )
    if made.start is not None:
        made.start_from(head)
    return made


def _pick_thirds(count: int) -> list[int]:
    """Three of some layers evenly, the last among them; all where they are fewer."""
    return sorted({max(1, round(count * k / PLACES)) - 1 for k in range(1, PLACES + 1)})


def _no_head(name: str) -> NoSitesError:
    return NoSitesError(
        "it makes a feature for a head",
        where=name,
        found="no classes",
        fix="give num_classes; res-tuning-bypass also runs without a head",
    )


def _no_tokens(name: str, pool: str) -> NoSitesError:
    others = {"all": "linear, res-tuning-bypass or mixing-bypass"}
    return NoSitesError(
        "this method answers once an input",
        where=name,
        found=f'pool="{pool}", an answer for every {"token" if pool == "all" else "place"}',
        fix=f"use {others.get(pool, 'ensemble, mixing-bypass, ridge, linear or res-tuning-bypass')}",
    )


def _make_patch_classifier(host: Extractor, options: Options, classes: int) -> GridRidge:
    read = _pick_layers(host, options)
    parts = _count_parts(classes)
    return GridRidge([s.name for s in read], [s.dim for s in read], classes, parts)


def _count_parts(classes: int) -> int:
    """Along the side of a patch, that a classifier answers."""
    return PARTS if classes <= FEW_CLASSES else PARTS // 2


def _refuse_maps(host: Extractor, name: str) -> None:
    if is_hierarchy(host.sites.values()):
        raise NoSitesError(
            "a mixing bypass reads streams of tokens of one width",
            where=name,
            found="a backbone of maps or of several stages",
            fix="use ridge, linear or res-tuning-bypass",
        )


def _build_mixing(host: Extractor, head: nn.Linear | None, options: Options) -> Task:
    if head is None:
        raise _no_head("mixing-bypass")
    if options.get("pool") == "grid":
        _refuse_maps(host, "mixing-bypass")
    usual = {"width": WIDTH, "rank": RANK, "drop_path": DROP_PATH}
    bypass = _make_mixing(host, {**usual, **options}, TAPS)
    return Task(side=bypass, head=bypass.widen(head))


def _make_mixing(
    host: Extractor, options: Options, taps: int, *, parts: bool = False, factor: int = PARTS
) -> MixingBypass:
    """One that reads so many taps whole; or of each what its tokens say together, which stores keep of any text."""
    read = _pick_layers(host, options, taps)
    width, rank = options["width"], options["rank"]

    def tuners() -> list[Tuner]:
        near: Tuner = (
            ConvAdapter(width, rank=rank, prefix=None, norm=True)
            if host.images
            else ResAdapter(width, rank=rank)
        )
        far = LowRankAttention(width, rank=width, heads=options.get("heads", HEADS))
        return [near, far]

    pool = options.get("pool") or host.readout_rule.pool
    token = None if parts else _TOKEN.get(pool)
    dims = [s.dim for s in read]
    ends = (
        Finer(width, dims, factor)
        if pool == "grid"
        else Pooling(width, token=token, grid=host.images)
    )
    # A width of its own, narrower than the backbone's: what is trained and kept is small.
    return MixingBypass(
        [f"{s.name}/tokens" if parts else s.name for s in read],
        dims,
        [tuners() for _ in read],
        ends,
        drop_path=options["drop_path"],
        # `merge` is how method strings and results of before write it.
        pool_patches=options.get("pool_patches", options.get("merge", 1)),
    )


def _build_ensemble(host: Extractor, head: nn.Linear | None, options: Options) -> Task:
    if head is None:
        raise _no_head("ensemble")
    pool = options.get("pool") or host.readout_rule.pool
    if pool == "all":
        raise _no_tokens("ensemble", pool)
    classes = head.out_features
    given = {name: options[name] for name in ("given_head",) if name in options}
    parts: list[SideNetwork] = [
        _make_patch_classifier(host, given, classes)
        if pool == "grid"
        else _make_classifier(host, given, classes, pool, head)
    ]
    widths: list[int | None] = [None]
    for _ in range(NETWORKS):
        network, width = _make_member(host, head, options, pool)
        parts.append(network)
        widths.append(width)
    ensemble = Ensemble(parts, widths, classes)
    return Task(side=ensemble, head=ensemble.widen(head))


def _make_member(
    host: Extractor, head: nn.Linear, options: Options, pool: str
) -> tuple[SideNetwork, int]:
    """A network that is trained, and the width of its feature."""
    if pool == "own":
        # Maps and hierarchies: one vector a tap, on which the paper's bypass runs.
        side = bypasses.ROWS["res-tuning-bypass"].build(host, head, options).side
        assert side is not None
        return side, head.in_features
    width = options.get("width", MEMBER_WIDTH)
    usual = {"width": width, "rank": width, "drop_path": 0.0}
    if pool == "grid":
        _refuse_maps(host, "ensemble")
        parts = _count_parts(head.out_features)
        mixing = _make_mixing(host, {**usual, **options}, MEMBER_TAPS, factor=parts)
    elif host.images:
        mixing = _make_mixing(host, {"pool_patches": 2, **usual, **options}, MEMBER_TAPS)
    else:
        # Of texts a few rows a tap, so that twice as many cost less.
        mixing = _make_mixing(host, {**usual, **options}, TAPS, parts=True)
    # Small enough to keep what it saved: computing it again would cost a third of a step.
    mixing.recompute = False
    return mixing, mixing.widen(head).in_features


def _build_ridge(host: Extractor, head: nn.Linear | None, options: Options) -> Task:
    if head is None:
        raise _no_head("ridge")
    pool = options.get("pool") or host.readout_rule.pool
    if pool == "all":
        raise _no_tokens("ridge", pool)
    side: Ridge | GridRidge = (
        _make_patch_classifier(host, options, head.out_features)
        if pool == "grid"
        else _make_classifier(host, options, head.out_features, pool, head)
    )
    return Task(side=side, head=side.widen(head))


def _build_nearest(host: Extractor, head: nn.Linear | None, options: Options) -> Task:
    if head is None:
        raise _no_head("knn")
    pool = options.get("pool") or host.readout_rule.pool
    if pool in ("all", "grid"):
        raise _no_tokens("knn", pool)
    side = Nearest(host.sites.taps[-1], host.dim, head.out_features, pool=pool)
    return Task(side=side, head=side.widen(head))


ROWS: dict[str, Method] = {
    "mixing-bypass": Method(
        _build_mixing,
        "a narrow side network of attention and convolution on all tokens of six taps, "
        "no gradient in the backbone",
        "docs/mixing.md",
        takes=("width", "heads", "pool_patches", "merge"),
        unused=("scale", "query", "residual"),
        inside=False,
    ),
    "ridge": Method(
        _build_ridge,
        "a linear classifier on pooled features of all taps, solved in closed form",
        "docs/mixing.md",
        unused=("rank", "scale", "query", "drop_path", "residual"),
        inside=False,
        solved=True,
    ),
    "knn": Method(
        _build_nearest,
        "votes of the nearest training rows by the backbone's feature, nothing trained",
        "Wu et al. 2018; docs/search.md",
        unused=("rank", "scale", "query", "layers", "drop_path", "residual"),
        inside=False,
        takes_head=False,
        solved=True,
    ),
    "ensemble": Method(
        _build_ensemble,
        "the closed form and two small networks on pooled patches, weighed by answers to rows left out",
        "docs/mixing.md",
        takes=("width", "heads", "pool_patches"),
        unused=("scale", "query", "residual"),
        inside=False,
    ),
}

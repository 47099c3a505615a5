"""The named methods as plans: one readable table, with the paper's defaults.

`build("res-tuning", host, num_classes=100)` gives a task. A combination of the paper's 3 x 3 table
is written as `res-tuning[mha=prompt,ffn=adapter]`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from math import inf
from typing import Any

from torch import nn

from restuning._errors import RestuningError, UnknownNameError, warn
from restuning.host import Extractor, Host, cannot_tune_inside
from restuning.methods import bypasses, combined, embedded, lora, ours, weights
from restuning.methods.method import COMMON, OVER_TIME, Method, make_head
from restuning.sites import TARGETS, parse_pool
from restuning.task import Task

METHODS: dict[str, Method] = {
    name: row
    for rows in (weights.ROWS, combined.ROWS, bypasses.ROWS, ours.ROWS, embedded.ROWS, lora.ROWS)
    for name, row in rows.items()
}


def check(name: str, more: Collection[str] = (), options: Mapping[str, Any] | None = None) -> None:
    """Refuse a name that stands for nothing, before anything is loaded for it.

    Args:
        name: As `build` takes it.
        more: Names that are taken as well; their options are not looked at.
        options: As `build` takes them; what only the backbone can tell is left to it.

    Raises:
        UnknownNameError: No such method, option or value, or a combination that cannot be read.
    """
    if name in more:
        return
    base, _ = combined.parse_combination(name)
    if base not in METHODS:
        known = [*METHODS, *more]
        near = get_close_matches(base, known, n=3)
        raise UnknownNameError(
            "no such method",
            where=name,
            found=f"did you mean {' or '.join(near)}?" if near else "",
            fix=f"one of: {', '.join(known)}",
        )
    _check_options(name, base, options or {}, OVER_TIME)


def _check_options(
    name: str, base: str, options: Mapping[str, Any], over_time: Collection[str]
) -> None:
    known = COMMON.union(METHODS[base].takes, over_time)
    if options.keys() - known:
        raise UnknownNameError(
            "no such option",
            where=", ".join(sorted(options.keys() - known)),
            fix=f"{name} takes {', '.join(sorted(known))}",
        )
    check_values(options)


def runs_inside(name: str) -> bool:
    """Whether a method changes what the backbone computes; else it only reads that, from beside."""
    return METHODS[combined.parse_combination(name)[0]].inside


def is_solved(name: str) -> bool:
    """Whether a method is solved in closed form and takes no step."""
    return METHODS[combined.parse_combination(name)[0]].solved


def keep_used(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change anything of a method: a rank does nothing to `linear`, targets only to `lora`."""
    row = METHODS[combined.parse_combination(name)[0]]
    unused = {option for other in METHODS.values() for option in other.takes}.union(row.unused)
    unused -= set(row.takes)
    return {option: value for option, value in options.items() if option not in unused}


def refuse_unused(names: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse an option that none of the methods has a use for; of several, it is for those that have.

    Raises:
        UnknownNameError: There is such an option.
    """
    used = {option for name in names for option in keep_used(name, options)}
    if options.keys() - used:
        raise UnknownNameError(
            "an option changes nothing of what is built",
            where=", ".join(sorted(options.keys() - used)),
            found=f"method {', '.join(names)}",
            fix="leave it out, or name a method that takes it",
        )


def build(
    name: str,
    host: Extractor,
    num_classes: int | None = None,
    *,
    head: nn.Linear | None = None,
    **options: Any,
) -> Task:
    """Build a task by the name of its method.

    Args:
        name: A name of `names()`, or `res-tuning[mha=...,cross=...,ffn=...,block=...]` with
            adapter, prefix or prompt.
        host: The frozen backbone; an engine for methods that run beside it.
        num_classes: Width of a new linear head; None for no head.
        head: A head that is there already, e.g. of a text tower; it is copied. A bypass is then
            residual, so that training starts at exactly what this head answers; a closed form
            counts what it answers among its inputs, and adds it with a weight that rows left out decide.
        options: `residual` (of a bypass: its state is added to the backbone's own last stream;
            the default where there is no head, for generation, or one that is given), `rank`
            (bottleneck or length),
            `scale` (a form of `Scaled`), `zero` (start as no change: the default wherever it costs
            no parameter; of methods whose tuners may start otherwise), `query` ("mha"; "stream", the default at modulated norms), `layers` (a
            slice or numbers from 1),
            `drop_path` (probability), `pool` ("cls", "mean", "last", "all", "own").
            Of `lora`: `targets` (roles of linear maps, see `LinearSites.pick`: "qkv" is the default),
            `alpha` (default the rank), `rslora`, `dropout`.
            On diffusion models also: `film` (tuners of a bypass know the time step: the default),
            `time_scale` (see `FilmAdapter`), `kernel` and `form` (see `UNetBypass`).

    Raises:
        UnknownNameError: No such method, tuner, option, value or readout, or one that takes no head.
        NoSitesError: The backbone has no site of an operation the method tunes.
        EngineError: The method runs inside the backbone, and that is an engine.
        BackboneError: It trains weights of the backbone, and those are quantised, offloaded or sharded.
        TunerShapeError: The head that is given reads another width than the feature's.

    Warns:
        RestuningWarning: The rank that is given is wider than the stream, or the method has no use for
            an option.
    """
    check(name)
    base, combination = combined.parse_combination(name)
    # Options of diffusion models are refused elsewhere: they would do nothing, without a word.
    _check_options(name, base, options, OVER_TIME if host.has_time else ())
    # None says nothing, and must not count as false.
    options = {option: value for option, value in options.items() if value is not None}
    if unused := options.keys() - keep_used(name, options).keys():
        warn(
            "a method has no use for an option",
            where=name,
            found=", ".join(sorted(unused)),
            fix="leave it out",
        )
    if combination:
        options = {**options, "combination": combination}
    # Without a head the result goes on in the backbone's own forward, which an engine has none of.
    inside = METHODS[base].inside or not (num_classes or head)
    if inside and not isinstance(host, Host):
        raise cannot_tune_inside(name if num_classes or head else f"{name} without a head")
    if head is not None and not METHODS[base].takes_head:
        raise UnknownNameError(
            "this method answers with a solution of its own and cannot start from a head",
            where=name,
            found=f"a head of {head.out_features} classes",
            fix="give num_classes alone, or use linear, ridge or res-tuning-bypass",
        )
    if head is not None:
        # A head that is there answers well already: training starts at exactly its answers.
        options = {"residual": True, **options, "given_head": True}
    head = make_head(host.dim, num_classes, head)
    task = METHODS[base].build(host, head, options)
    if options.get("rank") is not None:
        _warn_of_wide(name, task)
    task.method, task.pool = name, options.get("pool")
    if head is not None:
        # A bank knows no host: what a task reads must be readable from the task.
        task.pool = task.pool or host.readout_rule.pool
    return task


def check_values(options: Mapping[str, Any]) -> None:
    """Refuse values that would build something else than their words say, or nothing.

    Raises:
        UnknownNameError: Names the option.
    """
    if options.get("pool") is not None:
        parse_pool(options["pool"])
    rank, zero, drop_path = (options.get(name) for name in ("rank", "zero", "drop_path"))
    alpha, rslora, dropout = (options.get(name) for name in ("alpha", "rslora", "dropout"))
    targets = options.get("targets")
    fitting = {
        # True is an int to Python.
        "rank": rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0),
        # A grid writes 0 and 1; any word, "False" among them, would count as true.
        "zero": zero is None or (isinstance(zero, int) and zero in (0, 1)),
        "drop_path": drop_path is None
        or (isinstance(drop_path, int | float) and 0 <= drop_path < 1),
        "alpha": alpha is None
        or (isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha < inf),
        "rslora": rslora is None or (isinstance(rslora, int) and rslora in (0, 1)),
        "dropout": dropout is None or (isinstance(dropout, int | float) and 0 <= dropout < 1),
        "targets": targets is None
        or bool(set(lora.parse_targets(targets)))
        and set(lora.parse_targets(targets)) <= set(TARGETS),
    }
    for name, fits in fitting.items():
        if not fits:
            raise UnknownNameError(
                "an option of a method cannot have this value",
                where=name,
                found=repr(options[name]),
                fix=f"give {VALUES[name]}",
            )


VALUES = {
    "rank": "a whole number from 1",
    "zero": "true (start as no change) or false (the authors' start)",
    "drop_path": "a chance: 0 or more, below 1",
    "alpha": "a number above 0",
    "rslora": "true or false",
    "dropout": "a chance: 0 or more, below 1",
    "targets": f"roles with + between them, of {', '.join(TARGETS)}",
}


def _warn_of_wide(name: str, task: Task) -> None:
    """A bottleneck that is wider than what it stands beside is none."""
    wide = set()
    for module in task.modules():
        rank, dim = getattr(module, "rank", None), getattr(module, "dim", None)
        if isinstance(rank, int) and isinstance(dim, int) and rank > dim:
            wide.add((rank, dim))
    if wide:
        warn(
            "a rank is wider than the stream",
            where=name,
            found=", ".join(f"rank {rank}, width {dim}" for rank, dim in sorted(wide)[:3]),
            fix="give a smaller --rank: a wider one costs parameters and adds nothing",
        )


def names() -> list[str]:
    """The names of all methods, in the order of the table."""
    return list(METHODS)


def table() -> list[tuple[str, str, str]]:
    """A row a method: its name, what it is, and where its defaults come from."""
    return [(name, method.what, method.source) for name, method in METHODS.items()]


def count_parameters(host: Extractor, num_classes: int) -> dict[str, dict[str, Any]]:
    """Trained parameters of every method on a backbone, by its name.

    Args:
        host: The backbone.
        num_classes: Of the head that is counted.

    Returns:
        For each method "tuner parameters" (without the head) and "with head", both None where the
        method has no place in this backbone, and "not here", why; None where it has one.
    """
    counted = {}
    for name in METHODS:
        row: dict[str, Any] = {"tuner parameters": None, "with head": None, "not here": None}
        try:
            task = build(name, host, num_classes=num_classes)
        # That a method has no place in this backbone is an answer and not a failure.
        except RestuningError as error:
            row["not here"] = error.what
        else:
            row["tuner parameters"] = task.tuner_parameters()
            row["with head"] = task.trainable_parameters()
        counted[name] = row
    return counted

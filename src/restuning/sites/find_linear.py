"""Finds linear sites in a block that was heard, and says what each map is for.

The role is said by the projections that were proved, then by how a map's width and its output fit the
others of the block, and by its name where nothing else tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning.runtime.precision import HALF_PRECISION
from restuning.sites.linear import is_linear, is_plain, read_bias, read_weight, width_in, width_out
from restuning.sites.linear_site import LinearSite, Role
from restuning.sites.projections import Projections
from restuning.sites.prove_projections import propose
from restuning.sites.site import Site
from restuning.sites.sums import ModuleCall, equal, is_attention

PRODUCT_TOLERANCE = {False: 1e-4, True: 2e-2}
"""Largest error of a product that is computed again, relative to its largest value: in fp32 sums in
another order, in half precision (True) what rounding leaves."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Of exactly these classes: a subclass may do something else to its weight first."""

_NAMES: dict[str, Role] = {
    **dict.fromkeys(("q", "q_proj", "query", "to_q", "q_lin", "wq"), "q"),
    **dict.fromkeys(("k", "k_proj", "key", "to_k", "k_lin", "wk"), "k"),
    **dict.fromkeys(("v", "v_proj", "value", "to_v", "v_lin", "wv"), "v"),
    **dict.fromkeys(("kv", "kv_proj", "to_kv"), "kv"),
    **dict.fromkeys(("qkv", "in_proj", "query_key_value", "Wqkv", "c_attn", "qkv_proj"), "qkv"),
    **dict.fromkeys(("o", "o_proj", "out_proj", "proj", "to_out.0", "out_lin", "wo"), "o"),
}
"""Inside an attention whose projections were not found otherwise."""

_BASE = "base_layer"
"""What PEFT calls the map that its adapter stands around."""


def find_linear_sites(
    model: nn.Module, sites: Iterable[Site], own: ModuleCall, calls: Iterable[ModuleCall], dim: int
) -> list[LinearSite]:
    """The linear sites of a block that was heard, without their layer, which is known later.

    Args:
        model: The backbone.
        sites: The block's sites, with proved projections.
        own: The block's call.
        calls: Those inside it.
        dim: Width of its stream.
    """
    in_order = sorted(calls, key=lambda c: c.start)
    first: dict[str, ModuleCall] = {}
    # By keyword the input is not where a hook looks for it; one such call is enough to lose it.
    by_keyword = {call.path for call in in_order if not call.positional}
    for call in in_order:
        if not _is_map(call.module) or call.path in by_keyword:
            continue
        if call.input is None or call.output is None:
            continue
        if not _is_of_adapter(model, call.path):
            first.setdefault(call.path, call)
    absent = any(p.is_meta for c in first.values() for p in c.module.parameters())
    lacks_weights = absent and _is_of_shapes_alone(model)
    roles: dict[str, tuple[Role, str, str]] = {}
    fused: dict[str, Projections] = {}

    def take(found: Projections, op: str, evidence: str) -> None:
        one = found.form == "fused"
        paths: list[tuple[str, Role]] = (
            [(found.q, "qkv")] if one else [(found.q, "q"), (found.k, "k"), (found.v, "v")]
        )
        for path, role in [*paths, (found.out, "o")]:
            roles.setdefault(path, (role, op, evidence))
        # Which rows are queries is known where that was proved; of shapes alone nothing can be, and
        # nothing is computed.
        if one and (evidence == "projections" or lacks_weights):
            fused.setdefault(found.q, found)

    for site in sites:
        if site.op in ("mha", "cross") and site.projections is not None:
            take(site.projections, site.op, "projections")
    attentions = [c for c in in_order if is_attention(c)]
    for call in attentions:
        op = "cross" if call.cross else "mha"
        if (proposal := propose(model, call.path)) is not None and proposal.form != "packed":
            take(proposal, op, "name")
        for path in first:
            inside = path.removeprefix(f"{call.path}.")
            if inside != path and (role := _role_by_name(inside)) is not None:
                roles.setdefault(path, (role, op, "name"))
    inside_attention = tuple(f"{c.path}." for c in attentions)
    rest = [
        c
        for path, c in first.items()
        if path not in roles and is_linear(c.module) and not path.startswith(inside_attention)
    ]
    roles |= {path: (role, "ffn", why) for path, role, why in _feed_forward(rest, in_order, dim)}
    rows = own.input.shape[0] if own.input is not None else -1
    return [
        site
        for path, call in first.items()
        for site in _make_sites(call, *roles.get(path, ("", "", "")), fused.get(path), rows)
    ]


def number_linear_sites(layers: Iterable[tuple[int, list[LinearSite]]]) -> list[LinearSite]:
    """Linear sites with layer and name; a map that stands in several blocks is one site.

    Args:
        layers: `(number, sites of that layer)` in order.
    """
    named: list[LinearSite] = []
    known: set[str] = set()
    for number, sites in layers:
        counts: Counter[str] = Counter()
        here = [s for s in sites if s.module not in known]
        known |= {s.module for s in here}
        for site in here:
            stem = f"cross_{site.role}" if site.op == "cross" else site.role
            counts[stem] += 1
            # The first of a kind has the plain name.
            more = f".{counts[stem]}" if counts[stem] > 1 else ""
            named.append(replace(site, layer=number, name=f"{stem}.{number}{more}"))
    return named


def _is_of_shapes_alone(model: nn.Module) -> bool:
    """Whether a backbone has no weights anywhere (a forecast), rather than keeps them elsewhere."""
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not offloaded and all(p.is_meta for p in model.parameters())


def _is_map(module: nn.Module) -> bool:
    """Whether it is a linear map, or a convolution as PEFT tunes it."""
    if type(module) in CONVOLUTIONS:
        conv: Any = module
        # PEFT gives its own maps no dilation and pads with zeros.
        return set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    return is_linear(module)


def _is_of_adapter(model: nn.Module, path: str) -> bool:
    """Whether a map belongs to an adapter that PEFT put around another, and not to the backbone."""
    parts = path.split(".")
    owner = model
    for part in parts:
        if part != _BASE and _BASE in owner._modules:
            return True
        owner = owner.get_submodule(part)
    return False


def _role_by_name(path: str) -> Role | None:
    """The role of a map of an attention, by the end of its path."""
    parts = path.removesuffix(f".{_BASE}").split(".")
    return _NAMES.get(parts[-1]) or _NAMES.get(".".join(parts[-2:]))


def _feed_forward(
    rest: list[ModuleCall], calls: list[ModuleCall], dim: int
) -> Iterator[tuple[str, Role, str]]:
    """`(path, role, evidence)` of maps that widen the stream, gate what is wide, and narrow it again."""
    wide: list[ModuleCall] = []
    for call in rest:
        reads, gives = width_in(call.module), width_out(call.module)
        # A gated pair may be one map of twice the width.
        ups = [u for u in wide if width_out(u.module) in (reads, 2 * reads)]
        if gives == dim and ups:
            gates = _find_gates(ups, calls)
            for up in ups:
                gate = up.path in gates
                yield up.path, "gate" if gate else "up", gates[up.path] if gate else "widths"
            yield call.path, "down", "widths"
            wide.clear()
        elif reads == dim:
            wide.append(call)


def _find_gates(ups: list[ModuleCall], calls: list[ModuleCall]) -> dict[str, str]:
    """Which of several maps is the gate: the one that an activation reads, else the one that is called so."""
    if len(ups) < 2:
        return {}
    bare = [c for c in calls if next(c.module.parameters(), None) is None]
    read = [u for u in ups if any(c.start > u.end and equal(c.input, u.output) for c in bare)]
    # Where weights are absent all outputs may be equal.
    if len(read) == 1:
        return {read[0].path: "widths"}
    return {u.path: "name" for u in ups if "gate" in u.path.rpartition(".")[2]}


def _make_sites(
    call: ModuleCall, role: str, op: str, evidence: str, fused: Projections | None, rows: int
) -> Iterator[LinearSite]:
    """The site of a map, and those of the parts of a fused one."""
    module: Any = call.module
    assert call.input is not None and call.output is not None
    per_row = call.input.shape[0] == call.output.shape[0] == rows
    if type(module) in CONVOLUTIONS:
        padding = module.padding
        yield LinearSite(
            "",
            "conv" if module.groups == 1 else "grouped",
            0,
            call.path,
            module.in_channels,
            module.out_channels,
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=padding if isinstance(padding, str) else tuple(padding),
            groups=module.groups,
            per_row=per_row,
        )
        return
    known: Any = role or "linear"
    site = LinearSite(
        "",
        known,
        0,
        call.path,
        width_in(module),
        width_out(module),
        op,
        per_row=per_row,
        proof="product" if _is_product(module, call.input, call.output) else "shape",
        evidence=evidence,
    )
    yield site
    if fused is not None:
        queries, keys = fused.heads * fused.head_dim, fused.key_width
        thirds: list[tuple[Role, int, int]] = [
            ("q", 0, queries),
            ("k", queries, keys),
            ("v", queries + keys, keys),
        ]
        for third, start, width in thirds:
            yield replace(site, role=third, start=start, dim=width, part=True)


def _is_product(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether the last row of what a map returned is W x + b with its own weight.

    Cost: reads the weight once.
    """
    weight: Any = module.weight
    if weight.is_meta or not is_plain(weight) or not x.numel():
        return False
    half = y.dtype in HALF_PRECISION
    with torch.no_grad():
        bias = read_bias(module)
        # One row: the whole input would cost as much as the forward.
        last, said = x.reshape(-1, x.shape[-1])[-1:], y.reshape(-1, y.shape[-1])[-1:].float()
        bias = None if bias is None else bias.float()
        again = F.linear(last.float(), read_weight(module).float(), bias)
        return bool((again - said).abs().max() <= PRODUCT_TOLERANCE[half] * said.abs().max())

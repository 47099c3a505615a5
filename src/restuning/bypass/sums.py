"""Sums over labelled rows that a classifier in closed form is solved from: in one pass, in any order, in shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from restuning._errors import FormatError, TrainingError, TunerShapeError

KEPT = 8192
"""Rows that are kept beside their products: penalty, scale and weights of blocks are chosen on them."""
MOST_KEYS = 2**63 - 1
"""The largest key: keys are spread evenly from 0 to here."""
TOGETHER = 1024
"""Rows that are brought to double precision at a time."""
AT_ONCE = 3
"""Matrices of products that a solution holds at once: the sums' own, one with a penalty, its factor."""


class KeptRows(NamedTuple):
    """Rows that are kept, by key and then label.

    Attributes:
        rows: `k f`.
        labels, keys: `k`; labels `k C` where targets are columns.
    """

    rows: Tensor
    labels: Tensor
    keys: Tensor


class Sums:
    r"""Per class `n_c` and `sum x_i`, and `sum (x_i - m) (x_i - m)^T` or the rows themselves.

    While there are no more rows than features (or than `kept`), the rows are held. Beyond, the products are, in
    double precision, and beside them the `kept` rows with the lowest keys: which these are depends on no order and no sharding. Products are about the mean of what is
    in (Chan, Golub and LeVeque 1983), so that nothing cancels where means are large; centring by the final
    mean, division by deviations and weights of blocks are diagonal scalings that follow later.

    Args:
        width: f.
        classes: C.
        kept: Rows that are kept beside products; None for `KEPT`.
        dtype: Of rows that are held.
        device: Where everything lies; rows are brought there.
        columns: Whether targets are C numbers a row in place of one class, such as 0 and 1 for each label. Rows can
            then be added and not taken out again.
        weights: How much a row of each class counts, `C`, above 0; None for all alike. Rows can be added and not taken
            out again, and are not written down: with other rows the weights of classes would be others.

    Attributes:
        counts: Rows of each class, `C`; of columns their sums and the number of rows, `C + 1` in double.
        sums: Sums of their rows, `C f`, in double; of columns those of rows times columns, and of rows. Both are as if all rows
            counted alike.
        products: `f f` in double, of rows as much as they count, or None while all rows are held.
        bound: The largest key that is kept beside products.

    Cost: of each row `f` operations while rows are held, `f^2` beyond; the larger of `max(kept, f) f` numbers
    of `dtype` and `f^2` of 8 bytes, beside the kept rows (f = 18,000: 2.6 GB). Solving holds three times that.

    Raises:
        TunerShapeError: Rows, labels or keys do not fit.
        TrainingError: The products would not fit into the memory of this machine.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        kept: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        columns: bool = False,
        weights: Tensor | None = None,
    ) -> None:
        if weights is not None and (
            columns or weights.shape != (classes,) or not (weights > 0).all()
        ):
            raise TunerShapeError(
                "rows are weighed by their class",
                found=f"weights {tuple(weights.shape)}, {classes} {'columns' if columns else 'classes'}",
                fix="give a number above 0 for each class, or none",
            )
        self.width, self.dtype, self.columns = width, dtype, columns
        self.weights = None if weights is None else weights.to(device, torch.double)
        self.kept = KEPT if kept is None else kept
        self.device = torch.device(device)
        own = classes + columns
        self.counts = torch.zeros(own, dtype=torch.double if columns else torch.long)
        self.sums = torch.zeros(own, width, dtype=torch.double, device=self.device)
        self.products: Tensor | None = None
        self.bound = MOST_KEYS
        self._pieces: list[KeptRows] = []

    @property
    def classes(self) -> int:
        """C."""
        return len(self.counts) - self.columns

    @property
    def count(self) -> int:
        """Rows that are in."""
        return self._count(self.counts)

    def _count(self, counts: Tensor) -> int:
        return int(counts[-1]) if self.columns else int(counts.sum())

    @property
    def total(self) -> float:
        """What all rows count together: their number, or the sum of their weights."""
        return self._total(self.counts)

    def _total(self, counts: Tensor) -> float:
        if self.weights is None:
            return self._count(counts)
        return float(self.weights.cpu() @ counts.double())

    @property
    def mean(self) -> Tensor:
        """Of all rows as much as they count, `f` in double."""
        return self._mean(self.sums, self.counts)

    def _mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        if self.weights is not None:
            return self.weights @ sums / (self._total(counts) or 1)
        return (sums[-1] if self.columns else sums.sum(0)) / max(1, self._count(counts))

    @property
    def totals(self) -> Tensor:
        """Sums of one-hot labels or of columns over rows, as much as they count, `C` in double."""
        plain = self.counts[: self.classes].to(self.device, torch.double)
        return plain if self.weights is None else plain * self.weights

    @property
    def with_targets(self) -> Tensor:
        """Sums over rows of one-hot labels or columns times the row, as much as they count, `C f` in double."""
        plain = self.sums[: self.classes]
        return plain if self.weights is None else plain * self.weights[:, None]

    def weigh(self, labels: Tensor) -> Tensor | None:
        """How much rows of these classes count, `n` in double; None where all count alike."""
        return None if self.weights is None else self.weights[labels]

    @property
    def most(self) -> int:
        """Rows up to which all are held."""
        return max(self.kept, self.width)

    @property
    def bytes(self) -> int:
        """Of memory that is held."""
        held = [self.sums, *(t for piece in self._pieces for t in piece)]
        held += [] if self.products is None else [self.products]
        return sum(t.numel() * t.element_size() for t in held)

    def kept_rows(self) -> KeptRows:
        """The rows that are kept, in an order of their own: all of them, or those with the lowest keys."""
        self._compact()
        return self._pieces[0]

    def add(self, rows: Tensor, labels: Tensor, keys: Tensor | None = None) -> None:
        """Take in rows.

        Args:
            rows: `b f`.
            labels: `b`, from 0 to C - 1; of columns `b C`.
            keys: `b`, from `keys_of` or `keys_of_numbers`; None for those of the rows' own bytes.
        """
        rows, labels, keys = self._check(rows, labels, keys)
        if not len(rows):
            return
        if self.products is None and self.count + len(rows) > self.most:
            self._form_products()
        if self.products is not None:
            self._add_products(rows, labels)
        self._add_counts(rows, labels, 1)
        candidates = keys <= self.bound
        self._pieces.append(KeptRows(rows[candidates], labels[candidates], keys[candidates]))
        if self.products is not None and self._held > 2 * self.kept:
            self._compact()

    def merge(self, other: Sums) -> None:
        """Take in all that another has: of a shard, a process, a machine. The other stays as it is.

        Raises:
            TunerShapeError: It is of other features or classes.
        """
        if (other.width, other.classes, other.kept) != (self.width, self.classes, self.kept):
            raise TunerShapeError(
                "sums of other rows cannot be added",
                found=f"{other.width} features, {other.classes} classes, {other.kept} rows kept; here "
                f"{self.width}, {self.classes}, {self.kept}",
                fix="add sums of one classifier",
            )
        if not _same_weights(self.weights, other.weights):
            raise TunerShapeError(
                "sums of rows that count otherwise cannot be added",
                found="other weights of classes",
                fix="weigh all rows alike, or make the sums again with the same weights",
            )
        if other.products is None:
            self.add(*other.kept_rows())
            return
        if self.products is None:
            self._form_products()
        assert self.products is not None
        apart = (other.mean - self.mean.to(other.device)).to(self.device)
        share = self.total * other.total / ((self.total + other.total) or 1)
        self.products.add_(other.products.to(self.device)).addr_(apart, apart, alpha=share)
        self.counts += other.counts
        self.sums += other.sums.to(self.device)
        self.bound = min(self.bound, other.bound)
        self._pieces.append(KeptRows(*(t.to(self.device) for t in other.kept_rows())))
        self._compact()

    def remove(self, rows: Tensor, labels: Tensor, keys: Tensor | None = None) -> None:
        """Take rows out again. Of one that is kept its own numbers are taken, which `rows` may miss by rounding.

        Beyond the rows that are held, what is kept becomes fewer: rows that were not kept are not there any more
        to take the place of one that is removed.

        Args:
            rows: `b f`.
            labels: `b`.
            keys: As they were added.

        Raises:
            TunerShapeError: One was not added, as far as the rows that are kept tell.
        """
        if self.columns:
            raise _only_classes()
        self._refuse_weighed()
        rows, labels, keys = self._check(rows, labels, keys)
        if not len(rows):
            return
        kept = self.kept_rows()
        places = _find_each(kept, labels, keys)
        found = [n for n, place in enumerate(places) if place is not None]
        # Beside products all rows of lower keys than the bound are kept, and others may be.
        lower = keys < self.bound if self.products is not None else torch.ones_like(keys).bool()
        missing = int(lower.sum()) - int(lower[found].sum())
        gone = torch.bincount(labels.cpu(), minlength=self.classes)
        if missing or bool((gone > self.counts).any()):
            raise TunerShapeError(
                "rows are taken out that are not in",
                found=f"{missing} of {len(rows)}" if missing else f"more than {self.count} rows",
                fix="give rows, labels and keys as they were added",
            )
        at = torch.tensor([place for place in places if place is not None], dtype=torch.long)
        at = at.to(self.device)
        rows = rows.clone()
        rows[found] = kept.rows[at]
        if self.products is not None:
            self._remove_products(rows)
        self._add_counts(rows, labels, -1)
        stays = torch.ones(len(kept.rows), dtype=torch.bool, device=self.device)
        stays[at] = False
        self._pieces = [KeptRows(*(t[stays] for t in kept))]
        if not self.count:
            self.sums.zero_()

    def set_classes(self, order: Sequence[int | None]) -> None:
        """Give classes other numbers, in place: class k is then what `order[k]` was, None an empty one.

        Raises:
            TunerShapeError: A class that has rows would be lost.
        """
        if self.columns:
            raise _only_classes()
        self._refuse_weighed()
        old = [n for n in order if n is not None]
        lost = set(self.counts.nonzero().flatten().tolist()) - set(old)
        if lost or len(set(old)) < len(old):
            raise TunerShapeError(
                "a class with rows cannot be left out",
                found=f"classes {sorted(lost)[:6]}",
                fix="remove its rows first",
            )
        counts = self.counts.new_zeros(len(order))
        sums = self.sums.new_zeros(len(order), self.width)
        number = torch.zeros(self.classes, dtype=torch.long, device=self.device)
        for new, before in enumerate(order):
            if before is not None:
                counts[new], sums[new] = self.counts[before], self.sums[before]
                number[before] = new
        self.counts, self.sums = counts, sums
        self._pieces = [KeptRows(p.rows, number[p.labels], p.keys) for p in self._pieces]

    def add_over_processes(self) -> None:
        """Let every process of `torch.distributed` have the sums of all; they call this together.

        Cost: the products once over the network, and `kept` rows of each process.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        counts = sum_over_processes(self.counts.to(self.device, copy=True)).cpu()
        total = self._count(counts)
        formed = torch.tensor(float(self.products is not None), device=self.device)
        if total > self.most or bool(sum_over_processes(formed) > 0):
            if self.products is None:
                self._form_products()
            assert self.products is not None
            sums = sum_over_processes(self.sums.clone())
            # All about one centre first.
            apart = self.mean - self._mean(sums, counts)
            self.products.addr_(apart, apart, alpha=self.total)
            self.products = sum_over_processes(self.products)
            self.sums = sums
            self._compact()
            bounds = gather(torch.tensor([self.bound], device=self.device))
            self.bound = min(int(bound) for bound in bounds)
        else:
            self.sums = sum_over_processes(self.sums)
        self.counts = counts
        kept = self.kept_rows()
        self._pieces = [KeptRows(*each) for each in zip(*(gather(t) for t in kept), strict=True)]
        self._compact()

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name, on the CPU: what `from_tensors` takes.

        Raises:
            TunerShapeError: Rows are weighed.
        """
        self._refuse_weighed()
        kept = self.kept_rows()
        named = {
            "counts": self.counts,
            "sums": self.sums,
            "rows": kept.rows,
            "labels": kept.labels,
            "keys": kept.keys,
            "bound": torch.tensor([self.bound]),
            "kept": torch.tensor([self.kept]),
        }
        if self.products is not None:
            named["products"] = self.products
        return {name: tensor.cpu().contiguous() for name, tensor in named.items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> Sums:
        """What `tensors` gave.

        Raises:
            FormatError: They are not what it gives.
        """
        try:
            classes, width = tensors["sums"].shape
            rows, labels, keys = (tensors[name] for name in ("rows", "labels", "keys"))
            products = tensors.get("products")
            kept, bound = int(tensors["kept"]), int(tensors["bound"])
            whole = (
                tensors["counts"].shape == (classes,)
                and rows.shape == (len(keys), width)
                and labels.shape == keys.shape
                and (products is None or products.shape == (width, width))
                and (products is not None or len(rows) == int(tensors["counts"].sum()))
                and (not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < classes)
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _malformed(f"{type(error).__name__}: {error}") from None
        if not whole or not all(t.isfinite().all() for t in tensors.values()):
            raise _malformed("shapes or numbers that do not belong together")
        made = cls(width, classes, kept=kept, dtype=rows.dtype, device=device)
        made.counts = tensors["counts"].clone()
        made.sums = tensors["sums"].to(made.device, copy=True)
        made.products = None if products is None else products.to(made.device, copy=True)
        made.bound = bound
        made._pieces = [KeptRows(*(t.to(made.device) for t in (rows, labels, keys)))]
        return made

    # Of the parts.

    def _refuse_weighed(self) -> None:
        if self.weights is not None:
            raise TunerShapeError(
                "sums of rows that are weighed by their class are neither changed nor written down",
                found="with other rows the weights of classes would be others",
                fix="solve again with the rows that are to be in",
            )

    @property
    def _held(self) -> int:
        return sum(len(piece.keys) for piece in self._pieces)

    def _check(
        self, rows: Tensor, labels: Tensor, keys: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = (len(rows), self.classes) if self.columns else (len(rows),)
        if rows.dim() != 2 or rows.shape[1] != self.width or labels.shape != wanted:
            raise TunerShapeError(
                "rows do not fit these sums",
                found=f"rows {tuple(rows.shape)}, labels {tuple(labels.shape)}",
                fix=f"give `b {self.width}` and `b{f' {self.classes}' if self.columns else ''}`",
            )
        if self.columns:
            if not bool(labels.isfinite().all()):
                raise TunerShapeError(
                    "a linear map in closed form cannot be solved",
                    found="targets that are not finite",
                    fix="give numbers",
                )
        elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise TunerShapeError(
                "a closed-form classifier cannot be solved",
                found=f"labels {labels.unique().tolist()[:6]}, {self.classes} classes",
                fix="give labels from 0 to classes - 1",
            )
        rows = rows.detach().to(self.device, self.dtype)
        keys = keys_of_rows(rows) if keys is None else keys
        if keys.shape != labels.shape[:1]:
            raise TunerShapeError(
                "each row has a key", found=f"{len(labels)} rows, {len(keys)} keys"
            )
        kind = torch.double if self.columns else torch.long
        return rows, labels.to(self.device, kind), keys.to(self.device, torch.long)

    def _add_counts(self, rows: Tensor, labels: Tensor, sign: int) -> None:
        if self.columns:
            # A column of ones counts rows, and its product with them is their sum.
            columns = torch.cat([labels, labels.new_ones(len(labels), 1)], 1)
            self.counts += sign * columns.sum(0).cpu()
            for part, own in zip(rows.split(TOGETHER), columns.split(TOGETHER), strict=True):
                self.sums.addmm_(own.T, part.double(), alpha=sign)
            return
        self.counts += sign * torch.bincount(labels.cpu(), minlength=self.classes)
        for part, names in zip(rows.split(TOGETHER), labels.split(TOGETHER), strict=True):
            self.sums.index_add_(0, names, part.double(), alpha=sign)

    def _form_products(self) -> None:
        """From rows that are held, all of them so far."""
        refuse_too_wide(self.width, self.device)
        centre = self.mean
        self.products = torch.zeros(self.width, self.width, dtype=torch.double, device=self.device)
        for piece in self._pieces:
            parts = zip(piece.rows.split(TOGETHER), piece.labels.split(TOGETHER), strict=True)
            for part, labels in parts:
                z = part.double() - centre
                self.products.addmm_(_weighed(z, self.weigh(labels)).T, z)
        self._compact()

    def _add_products(self, rows: Tensor, labels: Tensor) -> None:
        """Of new rows, about the mean that is then; called before they are counted."""
        assert self.products is not None
        total, mean = self.total, self.mean
        for part, names in zip(rows.split(TOGETHER), labels.split(TOGETHER), strict=True):
            weights = self.weigh(names)
            size = len(part) if weights is None else float(weights.sum())
            own = part.double().mean(0) if weights is None else weights @ part.double() / size
            # A new tensor: the rows are the caller's.
            z = part.double() - own
            self.products.addmm_(_weighed(z, weights).T, z)
            apart, both = own - mean, total + size
            self.products.addr_(apart, apart, alpha=total * size / both)
            mean, total = mean + apart * (size / both), both

    def _remove_products(self, rows: Tensor) -> None:
        assert self.products is not None
        count, mean = self.count, self.mean
        for part in rows.split(TOGETHER):
            own, left = part.double().mean(0), count - len(part)
            if left == 0:
                self.products.zero_()
                return
            z = part.double() - own
            # The mean of what stays.
            mean = mean + (mean - own) * (len(z) / left)
            apart = own - mean
            self.products.addmm_(z.T, z, alpha=-1)
            self.products.addr_(apart, apart, alpha=-left * len(z) / count)
            count = left

    def _compact(self) -> None:
        """One piece, in order; beside products no more than `kept`."""
        if (
            len(self._pieces) == 1
            and (self.products is None or self._held <= self.kept)
            and _in_order(self._pieces[0])
        ):
            return
        empty = torch.zeros(0, dtype=torch.long, device=self.device)
        rows = torch.zeros(0, self.width, dtype=self.dtype, device=self.device)
        none = rows.new_zeros(0, self.classes, dtype=torch.double) if self.columns else empty
        pieces = self._pieces or [KeptRows(rows, none, empty)]
        labels, keys = (torch.cat([p[n] for p in pieces]) for n in (1, 2))
        # Rows of one key and other numbers have the same input: their order changes nothing.
        order = torch.arange(len(keys), device=self.device)
        if not self.columns:
            order = labels.argsort(stable=True)
        order = order[keys[order].argsort(stable=True)]
        if self.products is not None:
            order = order[keys[order] <= self.bound]
            if len(order) > self.kept:
                order = order[: self.kept]
                # Those beyond are gone: a later row with a larger key would stand for all of them.
                self.bound = int(keys[order[-1]])
        whole = pieces[0].rows if len(pieces) == 1 else torch.cat([p.rows for p in pieces])
        self._pieces = [KeptRows(whole[order], labels[order], keys[order])]


def keys_of(digests: Iterable[bytes]) -> Tensor:
    """Keys of inputs by the digests of their contents, `n`: the same wherever and in whatever order they are met.

    Args:
        digests: Of 8 bytes or more, spread as those of a hash are.
    """
    return torch.tensor([int.from_bytes(d[:8], "big") >> 1 for d in digests], dtype=torch.long)


def keys_of_numbers(numbers: Iterable[int]) -> Tensor:
    """Keys of rows by their numbers, `n`, of a data set whose inputs have no digests."""
    return keys_of(hashlib.sha256(b"row %d" % number).digest() for number in numbers)


def keys_of_rows(rows: Tensor) -> Tensor:
    """Keys of rows by their own bytes, `n`."""
    plain = rows.detach().cpu().contiguous()
    if not plain.numel():
        return torch.zeros(len(plain), dtype=torch.long)
    return keys_of(
        hashlib.sha256(row.view(torch.uint8).numpy().tobytes()).digest() for row in plain
    )


def refuse_too_wide(width: int, device: torch.device) -> None:
    """Refuse products of a width that this machine has no room for.

    Assumed: `AT_ONCE` such matrices must fit into the memory of the device, all of it.

    Raises:
        TrainingError: They do not.
    """
    room = _memory_of(device)
    needed = AT_ONCE * 8 * width**2
    if room is None or needed <= room:
        return
    raise TrainingError(
        "the products of a closed-form classifier do not fit into memory",
        where=f"{width:,} features of an input, more rows than that",
        found=f"{AT_ONCE} matrices of {8 * width**2 / 2**30:.1f} GiB (double precision) are held at once, "
        f"and {device} has {room / 2**30:.1f} GiB in all",
        fix="read fewer layers (layers=...), give at most as many rows as features, take a narrower "
        "backbone, or another method",
    )


def _memory_of(device: torch.device) -> int | None:
    """Bytes of memory, in use or not; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _find_each(kept: KeptRows, labels: Tensor, keys: Tensor) -> list[int | None]:
    """The places of rows among those kept, each place once; None of one that is not kept."""
    places: dict[tuple[int, int], list[int]] = {}
    for n, name in enumerate(zip(kept.keys.tolist(), kept.labels.tolist(), strict=True)):
        places.setdefault(name, []).append(n)
    found: list[int | None] = []
    for name in zip(keys.tolist(), labels.tolist(), strict=True):
        free = places.get(name)
        found.append(free.pop() if free else None)
    return found


def _in_order(piece: KeptRows) -> bool:
    if len(piece.keys) < 2:
        return True
    step = piece.keys.diff()
    if piece.labels.ndim == 2:
        return not bool((step < 0).any())
    same = (step == 0) & (piece.labels.diff() < 0)
    return not bool((step < 0).any() or same.any())


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    torch.distributed.all_reduce(tensor)
    return tensor


def gather(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor of every process; their lengths may differ."""
    world = torch.distributed.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(world)]
    torch.distributed.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    most = max(int(n) for n in lengths)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.zeros_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return (part[: int(n)] for part, n in zip(parts, lengths, strict=True))


def _weighed(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else rows * weights[:, None]


def _same_weights(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())


def _only_classes() -> TunerShapeError:
    return TunerShapeError(
        "rows are taken out of sums of classes only",
        found="targets of several columns",
        fix="solve again without them",
    )


def _malformed(found: str) -> FormatError:
    return FormatError(
        "the sums of a closed-form classifier are malformed",
        found=found[:300],
        fix="train its task again",
    )

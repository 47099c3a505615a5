"""How feature values are kept on disk: fp32, bf16, fp16, or int8 with one scale a channel."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restuning._errors import StoreError
from restuning._files import open_plain

DTYPES = ("fp32", "bf16", "fp16", "int8")
PRECISIONS = ("fp32", "bf16")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
_ON_DISK = {"fp32": np.float32, "bf16": np.uint16, "fp16": np.float16, "int8": np.int8}


def check_dtype(dtype: str) -> str:
    """The name itself.

    Raises:
        StoreError: Not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise StoreError(
            "features cannot be stored in this form", found=dtype, fix=f"one of {', '.join(DTYPES)}"
        )
    return dtype


def check_precision(precision: str) -> str:
    """The name itself.

    Raises:
        StoreError: Not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise StoreError(
            "features cannot be computed in this precision",
            found=str(precision),
            fix=f"one of {', '.join(PRECISIONS)}",
        )
    return precision


def encode(rows: Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows `n r` in fp32 to what is written, and the scales of int8 (`r`, largest value / 127).

    Scales are per value of a row, that is per tap, token and channel: vision backbones have
    channels and tokens a hundred times larger than the rest, which one scale for all would lose.

    Raises:
        StoreError: A value is not finite, or too large for fp16.
    """
    if not bool(rows.isfinite().all()):
        raise StoreError(
            "the backbone gave features that are not finite",
            found=f"{int((~rows.isfinite()).sum())} NaN or infinite values",
            fix="check its weights and precision; nothing of this shard was written",
        )
    if dtype == "fp32":
        return rows.numpy(), None
    if dtype == "bf16":
        # NumPy has no bfloat16; its bits travel as integers.
        return rows.bfloat16().view(torch.int16).numpy().view(np.uint16), None
    if dtype == "fp16":
        half = rows.half()
        if not bool(half.isfinite().all()):
            raise StoreError(
                "features are too large for fp16",
                found=f"{float(rows.abs().max()):.3g}",
                fix="use --dtype bf16 or fp32",
            )
        return half.numpy(), None
    # A channel that is zero throughout must not divide by zero.
    scales = rows.abs().amax(0).clamp(min=1e-12) / 127
    return (rows / scales).round().clamp(-127, 127).to(torch.int8).numpy(), scales.numpy()


def decode(raw: np.ndarray, dtype: str, scales: np.ndarray | None = None) -> Tensor:
    """What was written, back to fp32."""
    raw = np.ascontiguousarray(raw)
    if dtype == "fp32":
        return torch.from_numpy(raw)
    if dtype == "bf16":
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).float()
    if dtype == "fp16":
        return torch.from_numpy(raw).float()
    assert scales is not None
    return torch.from_numpy(raw).float() * torch.from_numpy(np.ascontiguousarray(scales))


_HEADER = re.compile(
    rb"{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \((\d+), ?(\d*)\), } *\n"
)


def read_array(
    file: Path, dtype: Any, shape: tuple[int, ...], *, mapped: bool = False
) -> np.ndarray:
    """A NumPy file that is to hold an array of this type and shape, and is compared before it is read.

    Args:
        file: As `np.save` writes it.
        dtype: Of NumPy.
        shape: Of one or two dimensions.
        mapped: As a map of the file, read when it is used, in place of a copy.

    Raises:
        ValueError: It is no such file.
        OSError: It cannot be read.
    """
    kind = np.dtype(dtype)
    with open_plain(file) as stream:
        front = stream.read(10)
        length = int.from_bytes(front[8:], "little")
        # Read by ourselves: NumPy would take a pickle for an array, and any size for a size.
        header = _HEADER.fullmatch(stream.read(length))
        if front[:8] != b"\x93NUMPY\x01\x00" or header is None:
            raise ValueError("no array of NumPy as it is written here")
        there = tuple(int(n) for n in header.groups()[1:] if n)
        if header[1].decode() != kind.str or there != shape:
            raise ValueError(f"an array {there} of {header[1].decode()}, wanted {shape} of {kind}")
        size = os.fstat(stream.fileno()).st_size - 10 - length
        if size != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{size} bytes of values for an array {shape} of {kind}")
        if mapped and size:
            array = np.memmap(stream, kind, "r", 10 + length, shape)
            # A plain view: indexing the memory map itself makes an object of its kind each time.
            return array.view(np.ndarray)
        return np.frombuffer(bytearray(stream.read(size)), kind).reshape(shape)


def disk_type(dtype: str) -> Any:
    """The NumPy type of the file."""
    return _ON_DISK[dtype]


def error_report(rows: Tensor, dtype: str, slices: dict[str, slice]) -> dict[str, dict[str, float]]:
    """Per tap, what storing in a dtype loses.

    Returns:
        `largest`: largest absolute difference; `relative`: root mean square of the difference over
        that of the values.
    """
    raw, scales = encode(rows, dtype)
    again = decode(raw, dtype, scales)
    report = {}
    for tap, part in slices.items():
        difference, values = (again - rows)[:, part], rows[:, part]
        size = values.square().mean().sqrt().clamp(min=1e-30)
        report[tap] = {
            "largest": float(difference.abs().max()),
            "relative": float(difference.square().mean().sqrt() / size),
        }
    return report

"""How fast a machine multiplies, moves memory and starts operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """A machine, as three numbers.

    Attributes:
        flops_per_second: Of matrix products.
        bytes_per_second: Read and written by operations between large tensors.
        seconds_per_call: Of an operation between small ones, from Python.
    """

    flops_per_second: float
    bytes_per_second: float
    seconds_per_call: float


def measure_rates(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Rates:
    """Time three operations on this machine.

    Cost: about half a second, 100 MB.
    """
    with torch.no_grad():
        # The form of a transformer's products: many tokens, a width of some hundred.
        x = torch.randn(2048, 768, device=device, dtype=dtype)
        w = torch.randn(768, 3072, device=device, dtype=dtype)
        products = _median(lambda: x @ w, 5, device)
        # Larger than any cache.
        large = torch.randn(8 * 2**20, device=device, dtype=dtype)
        moves = _median(lambda: large + large, 5, device)
        small = torch.randn(16, device=device, dtype=dtype)

        def calls() -> None:
            for _ in range(100):
                torch.add(small, small)

        started = _median(calls, 5, device) / 100
    flops = 2 * x.shape[0] * x.shape[1] * w.shape[1]
    moved = 3 * large.numel() * large.element_size()
    return Rates(flops / products, moved / moves, started)


def _median(run: Callable[[], object], times: int, device: str) -> float:
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    # The first also sets things up.
    return statistics.median(seconds[1:])

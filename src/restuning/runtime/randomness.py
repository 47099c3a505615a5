"""Seeds that are functions of what they are for, and generators left as they were found."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix_seed(*parts: int | str) -> int:
    """One 63-bit seed from several numbers."""
    # Not `hash`, which Python salts anew in every process.
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    # Below 2**63, which every generator takes for a seed.
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*parts: int | str, devices: bool = True) -> None:
    """Seed Python, NumPy and torch; without `devices`, torch's CPU generator only."""
    seed_all(mix_seed(*parts), devices=devices)


def seed_all(seed: int, *, devices: bool = True) -> None:
    """As `seed_everything`, by a number below 2^63."""
    random.seed(seed)
    # NumPy's global generator takes 32 bits.
    np.random.seed(seed % 2**32)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def preserve_randomness(*, devices: bool = True) -> Iterator[None]:
    """The caller's generators are afterwards as they were before.

    Args:
        devices: That of this process's GPU as well; not in workers, which must not touch it.
    """
    python, numbers = random.getstate(), np.random.get_state()
    # Of this process's GPU: `fork_rng` would save the state of every one there is.
    ours = [torch.cuda.current_device()] if devices and torch.cuda.is_available() else []
    with torch.random.fork_rng(ours):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)

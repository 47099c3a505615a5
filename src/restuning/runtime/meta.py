"""Models of which only shapes are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_contents() -> Iterator[None]:
    """Tensors that are made here are on `meta`: they have shapes and take no memory."""
    # This imports torch's compiler. Libraries do so with their models, and torch 2.8 fails to under `meta`.
    torch.compiler.list_backends()
    with torch.device("meta"):
        yield

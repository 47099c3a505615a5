"""Latents and text states of captioned images, computed once and kept under a content key.

A text's states are larger than an image's latents, so they are kept once a caption. Latents are
kept as mean and standard deviation, so that a cached run draws them anew as a live one would.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from restuning._errors import DataError, FormatError, StoreError
from restuning._files import read_json, replacing, seal, sha256_of_file
from restuning.data.digests import digest_value
from restuning.diffusion.pairs import Pairs

SCHEMA = 2
"""Raised where the same images give other latents: since 2 they are turned upright and lie on white."""


class Encoder(Protocol):
    """Turns images into latents and captions into conditions."""

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`b 3 h w` in -1 to 1 to mean and standard deviation of latents, `b c h w` each."""
        ...

    def texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions to the denoiser's conditions by name, of b rows and one length."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything the numbers depend on: digests of weights and tokenizer, as JSON."""
        ...


@dataclass(frozen=True)
class EncodedPairs:
    """Encoded pairs.

    Attributes:
        mean, std: Mean and standard deviation of the latents, `n c h w`.
        texts: Conditions by name, one row a caption.
        caption_of: Row of `texts` for every image, `n`.
        empty: Conditions of the empty caption, of one row.
        captions: One an image.
        key: Content key, 16 hexadecimal digits.
    """

    mean: Tensor
    std: Tensor
    texts: Mapping[str, Tensor]
    caption_of: Tensor
    empty: Mapping[str, Tensor]
    captions: tuple[str, ...]
    key: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.caption_of)

    def digest(self) -> str:
        """sha256 over all numbers and captions, 16 hexadecimal digits; about 1 s a gigabyte."""
        parts = [self.mean, self.std, dict(self.texts), self.caption_of, dict(self.empty)]
        return digest_value([*parts, list(self.captions)]).hex()[:16]

    def latents(self, rows: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Latents drawn from their distribution; their mean without a generator."""
        index = torch.as_tensor(rows)
        mean = self.mean[index]
        if generator is None:
            return mean
        return mean + self.std[index] * torch.randn(mean.shape, generator=generator)

    def conditions(self, rows: Sequence[int], dropped: Tensor | None = None) -> dict[str, Tensor]:
        """Conditions of some images, those of the empty caption where `dropped` (`b`) says so."""
        index = self.caption_of[torch.as_tensor(rows)]
        encoded = {}
        for name, states in self.texts.items():
            chosen = states[index]
            if dropped is not None:
                # `b 1 ...`: the one row of the empty caption stands in wherever it is dropped.
                wide = dropped.view(-1, *[1] * (chosen.dim() - 1))
                chosen = torch.where(wide, self.empty[name].to(chosen.dtype), chosen)
            encoded[name] = chosen
        return encoded


def encode(
    pairs: Pairs,
    encoder: Encoder,
    size: int,
    folder: str | Path | None = None,
    *,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> EncodedPairs:
    """Encode pairs, or read what was encoded before under the same key.

    Args:
        pairs: Images and captions.
        encoder: The encoder of the denoiser's pipeline.
        size: Side of the square that images are cut to, in pixels.
        folder: Where stores lie, one folder a key; None keeps nothing.
        batch: Images at once.
        progress: Called with images done and images in all.

    Raises:
        StoreError: A store is damaged, or cannot be written.
        DataError: An image cannot be read.
    """
    # All that the numbers depend on is in the key, so a store cannot be out of date.
    contents = pairs.digest()
    facts = {"schema": SCHEMA, "pairs": contents, "size": size, **encoder.identity()}
    key = _key(facts)
    home = None if folder is None else Path(folder) / key
    if home is not None and (home / "manifest.json").is_file():
        return _read(home, pairs, key)
    means, stds = [], []
    with torch.no_grad():
        for start in range(0, len(pairs), batch):
            rows = range(start, min(start + batch, len(pairs)))
            mean, std = encoder.images(torch.stack([pairs.image(i, size) for i in rows]))
            means.append(mean.float().cpu())
            stds.append(std.float().cpu())
            if progress is not None:
                progress(rows[-1] + 1, len(pairs))
        # In the order they appear: a set's order changes from process to process.
        unique = list(dict.fromkeys(pairs.captions))
        parts = [encoder.texts(unique[i : i + batch]) for i in range(0, len(unique), batch)]
        texts = {n: torch.cat([p[n].cpu() for p in parts]) for n in parts[0]}
        empty = {n: t.cpu() for n, t in encoder.texts([""]).items()}
    if pairs.digest() != contents:
        raise DataError(
            "the data changed while they were read",
            where=pairs.names[0],
            found="other images or captions than at the start",
            fix="let nothing write to them, and run the same command again: nothing was kept",
        )
    row = {caption: i for i, caption in enumerate(unique)}
    encoded = EncodedPairs(
        torch.cat(means),
        torch.cat(stds),
        texts,
        torch.tensor([row[c] for c in pairs.captions]),
        empty,
        pairs.captions,
        key,
    )
    if home is not None:
        _write(home, encoded, facts)
    return encoded


def _key(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _write(home: Path, encoded: EncodedPairs, facts: Mapping[str, Any]) -> None:
    tensors = {"mean": encoded.mean, "std": encoded.std, "caption_of": encoded.caption_of}
    tensors |= {f"text.{n}": t for n, t in encoded.texts.items()}
    tensors |= {f"empty.{n}": t for n, t in encoded.empty.items()}
    try:
        with replacing(home) as aside:
            aside.mkdir()
            sums = {}
            for name, tensor in tensors.items():
                np.save(aside / f"{name}.npy", tensor.numpy())
                sums[name] = _file_digest(aside / f"{name}.npy")
            text = json.dumps(seal({"facts": dict(facts), "files": sums}), indent=1)
            (aside / "manifest.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        # Another process may have written the same numbers meanwhile.
        if (home / "manifest.json").is_file():
            return
        raise StoreError(
            "latents and texts could not be kept",
            where=str(home),
            found=str(error),
            fix="free space or give another --store",
        ) from None


def _read(home: Path, pairs: Pairs, key: str) -> EncodedPairs:
    try:
        manifest = read_json(home / "manifest.json", what="a store of latents")
        files = manifest["files"]
        if _key(manifest["facts"]) != key:
            raise ValueError("another store, put in its place")
        for name, digest in files.items():
            # A name that is no plain one could lead out of the folder, and so could a link.
            if not re.fullmatch(r"\w[\w.-]*", name) or (home / f"{name}.npy").is_symlink():
                raise ValueError(f"{name!a} is no file of this store")
            if _file_digest(home / f"{name}.npy") != digest:
                raise ValueError(f"{name}.npy is not what was written")
        # Copy-on-write: read where it is needed, and torch gets memory that may be written to.
        tensors = {n: torch.from_numpy(np.load(home / f"{n}.npy", mmap_mode="c")) for n in files}
        texts = {n[5:]: t for n, t in tensors.items() if n.startswith("text.")}
        empty = {n[6:]: t for n, t in tensors.items() if n.startswith("empty.")}
        _check_rows(tensors, texts, empty, len(pairs))
        return EncodedPairs(
            tensors["mean"],
            tensors["std"],
            texts,
            tensors["caption_of"],
            empty,
            pairs.captions,
            key,
        )
    except (
        FormatError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,
        SyntaxError,
        EOFError,
    ) as error:
        raise StoreError(
            "a store of latents is damaged",
            where=str(home),
            found=(getattr(error, "found", "") or str(error))[:200],
            fix="remove this folder; it is made again",
        ) from None


def _check_rows(
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
    count: int,
) -> None:
    """Refuse rows that do not belong together, and numbers that are none."""
    of = tensors["caption_of"]
    if of.dtype != torch.int64 or of.shape != (count,):
        raise ValueError(f"captions of {tuple(of.shape)} images, there are {count}")
    if tensors["mean"].shape != tensors["std"].shape or len(tensors["mean"]) != count:
        raise ValueError(f"latents of {tuple(tensors['mean'].shape)}, for {count} images")
    for name, text in texts.items():
        if len(empty[name]) != 1 or (count and not 0 <= int(of.min()) <= int(of.max()) < len(text)):
            raise ValueError(f"{len(text)} rows of {name}")
    for name, tensor in tensors.items():
        if (
            tensor.is_floating_point()
            and not tensor.sum().isfinite()
            and not tensor.isfinite().all()
        ):
            raise ValueError(f"{name} holds NaN or infinite values")


def _file_digest(file: Path) -> str:
    return sha256_of_file(file)[:16]

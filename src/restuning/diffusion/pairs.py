"""Images with captions: a folder, or parquet files."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import DataError, FormatError
from restuning._files import lies_inside, parse_json
from restuning.data import read_image
from restuning.data.parquet import open_parquet

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_COLUMNS = ("caption", "text", "prompt")
IMAGE_COLUMNS = ("image", "jpg", "png")


@dataclass(frozen=True)
class Pairs:
    """Captions, and where their images are.

    Attributes:
        names: What errors call the images.
        captions: One an image.
        sources: Paths, or the bytes of a file.
    """

    names: tuple[str, ...]
    captions: tuple[str, ...]
    sources: tuple[Path | bytes, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def image(self, index: int, size: int) -> Tensor:
        """One image, its middle square, `3 size size` in -1 to 1.

        Raises:
            DataError: It cannot be read.
        """
        image = read_image(self.sources[index], self.names[index])
        scale = size / min(image.size)
        # Rounding must not leave a side a pixel short of the square.
        width, height = (max(size, round(s * scale)) for s in image.size)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def digest(self) -> str:
        """sha256 over captions and images in their order, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, caption, source in zip(self.names, self.captions, self.sources, strict=True):
            data = source if isinstance(source, bytes) else source.read_bytes()
            for part in (name.encode(), caption.encode(), data):
                # With its length in front, or `ab` + `c` would be `a` + `bc`.
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:16]


def load_pairs(path: str | Path) -> Pairs:
    """Read a folder of images with captions, a parquet file, or a folder of parquet files.

    Captions of a folder stand in `metadata.jsonl` (`{"file_name": ..., "caption": ...}`),
    `captions.csv` (columns `file_name` and `caption`), or beside each image in a `.txt` of its
    name. A column may be named caption, text or prompt.

    Raises:
        DataError: Nothing there, no captions, or a malformed file.
        MissingExtraError: pyarrow is not installed and the data are parquet.
    """
    root = Path(path)
    if root.is_file() and root.suffix == ".parquet":
        return _read_parquet([root])
    if not root.is_dir():
        raise DataError(
            "no images with captions here",
            where=str(root),
            found="no folder and no .parquet file",
            fix="give a folder of images with captions, or parquet",
        )
    tables = sorted(root.rglob("*.parquet"))
    if tables:
        return _read_parquet(tables)
    images = list(_read_captions(root))
    if not images:
        raise DataError(
            "no images with captions here",
            where=str(root),
            found="neither metadata.jsonl nor captions.csv, and no image with a .txt beside it",
            fix='write metadata.jsonl: {"file_name": "a.png", "caption": "..."} a line',
        )
    for file, _ in images:
        if not file.is_file():
            raise DataError(
                "a captioned image is missing",
                where=str(file),
                fix="restore it or take its line out",
            )
    names = tuple(str(f.relative_to(root)) for f, _ in images)
    return Pairs(names, tuple(c for _, c in images), tuple(f for f, _ in images))


_WRITE = "write UTF-8, one JSON object a line or a csv with a head"


def _read_captions(root: Path) -> Iterator[tuple[Path, str]]:
    lines, table = root / "metadata.jsonl", root / "captions.csv"
    try:
        if lines.is_file():
            text = lines.read_text(encoding="utf-8-sig")
            # Lines end at line ends: U+2028 may stand in a caption.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    row = parse_json(line, f"{lines}:{number}", what="a caption", fix=_WRITE)
                    yield _parse_row(root, row, f"{lines}:{number}")
        elif table.is_file():
            with table.open(encoding="utf-8", newline="") as file:
                # Line 1 is the head.
                for number, row in enumerate(csv.DictReader(file), 2):
                    yield _parse_row(root, row, f"{table}:{number}")
        else:
            for image in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
                beside = image.with_suffix(".txt")
                if beside.is_file():
                    yield image, beside.read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError, csv.Error, FormatError) as error:
        raise DataError(
            "captions cannot be read",
            where=str(root),
            found=str(error)[:200],
            fix=_WRITE,
        ) from None


def _parse_row(root: Path, row: Any, where: str) -> tuple[Path, str]:
    name = row.get("file_name") if isinstance(row, dict) else None
    caption = next((row[c] for c in CAPTION_COLUMNS if isinstance(row, dict) and c in row), None)
    if not isinstance(name, str) or not isinstance(caption, str):
        raise DataError(
            "a line names no image or no caption",
            where=where,
            found=str(row)[:120],
            fix=f"give file_name and one of {', '.join(CAPTION_COLUMNS)}",
        )
    try:
        inside = lies_inside(root / name, root)
    except ValueError:
        inside = False
    # A metadata file from elsewhere could name any file of this machine.
    if not inside:
        raise DataError(
            "a caption's image lies outside the folder",
            where=where,
            found=name,
            fix="give names relative to the folder",
        )
    return root / name, caption.strip()


def _read_parquet(files: list[Path]) -> Pairs:
    names, captions, sources = [], [], []
    for file in files:
        table = open_parquet(file, "diffusion", "reading parquet")
        text = next((c for c in CAPTION_COLUMNS if c in table.column_names), None)
        image = next((c for c in IMAGE_COLUMNS if c in table.column_names), None)
        if text is None or image is None:
            raise DataError(
                "a parquet file lacks images or captions",
                where=str(file),
                found=f"columns {', '.join(table.column_names[:8])}",
                fix=f"name them {IMAGE_COLUMNS[0]} and one of {', '.join(CAPTION_COLUMNS)}",
            )
        pictures, texts = table[image].to_pylist(), table[text].to_pylist()
        for number, (picture, caption) in enumerate(zip(pictures, texts, strict=True)):
            data = picture.get("bytes") if isinstance(picture, dict) else picture
            where = f"{file.name}:{number}"
            if not isinstance(data, bytes) or not isinstance(caption, str):
                raise DataError(
                    "a row holds no image or no caption",
                    where=where,
                    found=f"{type(data).__name__} and {type(caption).__name__}",
                    fix="store the bytes of image files, and a string",
                )
            names.append(where)
            captions.append(caption.strip())
            sources.append(data)
    if not names:
        raise DataError("no images with captions here", where=str(files[0]), found="no rows")
    return Pairs(tuple(names), tuple(captions), tuple(sources))

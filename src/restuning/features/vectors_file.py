"""Vectors and ids as files: NumPy with the ids beside it, or Parquet; and matches as JSON lines or a page of pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from restuning._errors import StoreError, require
from restuning._files import expand_home, replacing, try_writing, write_json, write_text
from restuning.data import read_image
from restuning.data.thumbnails import make_data_uri
from restuning.features.embeddings import Embeddings, Match
from restuning.features.writing import explain_write_errors

FORMS = (".npy", ".parquet")
"""Suffixes of files of vectors."""
SHOWN = (".html", ".jsonl")
"""Suffixes of files of matches."""
THUMBNAIL = 200
"""Longest side of a picture of a page, in pixels."""


def check_place(out: str | Path, forms: Sequence[str]) -> Path:
    """A file that could be written, before anything takes time.

    Raises:
        StoreError: Its suffix is none of these, a file is there already, or it cannot be written.
        MissingExtraError: It needs a library that is not installed.
    """
    out = expand_home(out)
    if out.suffix not in forms:
        raise StoreError(
            "no such form of file", where=str(out), fix=f"end its name in {' or '.join(forms)}"
        )
    if out.suffix == ".parquet":
        require("pyarrow.parquet", "parquet", "a file of Parquet")
    for file in (out, *([ids_beside(out)] if out.suffix == ".npy" else [])):
        if file.exists() or file.is_symlink():
            raise StoreError("a file is there already", where=str(file), fix="give another --out")
        with explain_write_errors(file.parent):
            try_writing(file)
    return out


def ids_beside(out: Path) -> Path:
    """The file of ids beside a NumPy file."""
    return out.with_name(f"{out.stem}.ids.json")


def write_vectors(found: Embeddings, out: str | Path, about: Mapping[str, Any]) -> list[Path]:
    """Write vectors with their ids.

    `.npy` is an array `n d` of float32, beside it `NAME.ids.json` with `ids` in the same order and what the vectors are;
    `.parquet` has the columns `id` and `embedding`, and says the same in its schema.

    Args:
        found: Vectors and ids.
        out: The file.
        about: What they are.

    Returns:
        The files.

    Raises:
        StoreError: As `check_place`.
    """
    out = check_place(out, FORMS)
    # As they are written: a name may hold what no UTF-8 does.
    ids = [each.encode("utf-8", "backslashreplace").decode() for each in found.ids]
    with explain_write_errors(out.parent):
        if out.suffix == ".parquet":
            _write_parquet(found.vectors, ids, out, about)
            return [out]
        # The ids first: whoever finds vectors finds what they are of.
        write_json(ids_beside(out), {**about, "ids": ids})
        with replacing(out, suffix=".npy") as partial:
            np.save(partial, found.vectors)
    return [out, ids_beside(out)]


def _write_parquet(
    vectors: np.ndarray, ids: list[str], out: Path, about: Mapping[str, Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = vectors.shape[1]
    fields = [("id", pa.string()), ("embedding", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata={"restuning": json.dumps(dict(about), default=str)})
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    columns = [pa.array(ids, pa.string()), pa.FixedSizeListArray.from_arrays(flat, width)]
    with replacing(out) as partial:
        pq.write_table(pa.table(columns, schema=schema), partial)


def write_matches(
    matches: Sequence[Match], out: str | Path, query: str, folder: Path | None
) -> Path:
    """Write what a search found: `.jsonl` with a line each, or `.html`, a page with the pictures in it.

    Args:
        matches: In order.
        out: The file.
        query: What was asked, for the title.
        folder: Where ids are paths of images; None where they are not.

    Raises:
        StoreError: As `check_place`.
    """
    out = check_place(out, SHOWN)
    if out.suffix == ".jsonl":
        lines = [json.dumps(match_to_json(match)) for match in matches]
        content = "".join(f"{line}\n" for line in lines)
    else:
        content = _make_page(matches, query, folder)
    with explain_write_errors(out.parent):
        write_text(out, content)
    return out


def match_to_json(match: Match) -> dict[str, Any]:
    """A match as an object; `text` only of texts."""
    told = {"id": match.id, "score": match.score}
    return told if match.text is None else {**told, "text": match.text}


def _make_page(matches: Sequence[Match], query: str, folder: Path | None) -> str:
    def say(text: str) -> str:
        return html.escape(text.encode("utf-8", "backslashreplace").decode())

    figures = []
    for match in matches:
        shown = ""
        # The number of a text may be the name of some file.
        if folder is not None and match.text is None:
            uri = make_data_uri(read_image(folder / match.id), THUMBNAIL)
            shown = f'<img src="{uri}" alt="">'
        told = f"<br>{say(match.text)}" if match.text is not None else ""
        caption = f"<figcaption>{match.score:.3f} {say(match.id)}{told}</figcaption>"
        figures.append(f"<figure>{shown}{caption}</figure>")
    style = (
        "body{font-family:sans-serif;margin:2em}main{display:flex;flex-wrap:wrap;gap:1em}"
        f"figure{{margin:0;width:{THUMBNAIL}px;overflow-wrap:anywhere;font-size:small}}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{say(query)}</title><style>{style}</style></head>\n"
        f"<body><h1>{say(query)}</h1>\n<main>\n" + "\n".join(figures) + "\n</main></body></html>\n"
    )

"""A store as Parquet or Arrow, for whatever else reads tables: one file a split, one column a tap."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from restuning._errors import DataError, StoreError, require
from restuning._files import expand_home, replacing
from restuning.backbones import Backbone, Preprocessing, preprocessing_from_dict
from restuning.data import DataOptions, load_columns
from restuning.data.collection import relative
from restuning.data.folders import from_folder
from restuning.data.identity import digest_names, list_files, list_ids
from restuning.data.media import media_of
from restuning.data.parquet import find_parquets
from restuning.data.remote import show_url
from restuning.data.shards import find_shards
from restuning.data.targets import for_store
from restuning.data.tars import from_tars
from restuning.features.away import mirror_of
from restuning.features.manifest import MANIFEST
from restuning.features.store import Store, default_root, find_store, is_store, list_of_data
from restuning.features.writing import explain_write_errors

ROWS = 1024
"""Of a group of rows, which a reader takes at once."""

FORMS = ("parquet", "arrow")
"""Of files, as they end: Arrow's is the IPC file format, which readers map into memory."""


def export_store(
    name: str | Path,
    out: str | Path | None = None,
    *,
    to: str | None = None,
    label: str = "label",
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Write a store as tables: `OUT/train.parquet` and so on, or `OUT/train.arrow`.

    Columns are `id`, `label` (a whole number; null where answers are no single class, which a store does
    not hold), `view` ("plain", "flip", ...) and one a tap, a list of
    fixed length of float32 (float16 of a store in fp16; int8 and bf16 are decoded): a tap of several
    tokens is flat, and its field says its shape. The schema says the store's key, and class names
    where they are known.

    An id is the path of an image inside its folder where `name` is that folder (its images must be
    those of the store), `SHARD/KEY` of tars, `FILE#ROW` of
    images in parquet files, else `SPLIT/ROW`, in the order of the data.

    Args:
        name: A folder of images, or data by name, whose one finished store is taken; or a store.
        out: Folder, made; None for `STORE.parquet` or `STORE.arrow` here.
        to: "parquet" or "arrow"; None for what `out` ends in, else "parquet".
        label: Of tars and parquet files, as for `load_data`.
        root: Where stores lie, a folder or a URL; None for the usual place.

    Returns:
        `path`, rows by split, columns and bytes.

    Raises:
        MissingExtraError: pyarrow is not installed.
        StoreError: No store, several, one of other images, or a file that is there already.

    Cost: a pass over the bytes of the store; memory for the rows of one split at most, 2 GiB.
    """
    ending = "" if out is None else Path(out).suffix.lower().removeprefix(".")
    to = to or (ending if ending in FORMS else FORMS[0])
    if to not in FORMS:
        raise StoreError("no such form of export", found=str(to), fix=f"one of {', '.join(FORMS)}")
    require("pyarrow.parquet", "parquet", f"an export to {to.capitalize()}")
    here = mirror_of(name, root, lambda folder: list_of_data(name, folder))
    store = _find(name, here or (default_root() if root is None else Path(root)))
    ids, classes = _read_ids(name, store, label)
    out = Path(f"{store.path.name}.{to}") if out is None else expand_home(out)
    files = {split: out / f"{split}.{to}" for split in store.key.splits}
    there = next((file for file in files.values() if file.exists()), None)
    if there is not None:
        raise StoreError("a file is there already", where=str(there), fix="give another --out")
    for split, file in files.items():
        with explain_write_errors(out):
            _write(store, split, ids.get(split), classes, file)
    return {
        "path": str(out),
        "store": str(store.path),
        "rows": {
            split: n * (len(store.key.views) if split == "train" else 1)
            for split, n in store.key.splits.items()
        },
        "columns": ["id", "label", "view", *store.key.columns],
        "ids": "paths of images" if ids else "rows of splits",
        "bytes": sum(file.stat().st_size for file in files.values()),
    }


def _find(name: str | Path, root: Path) -> Store:
    given = expand_home(name)
    if is_store(given):
        return Store(given)
    found = [path for path in list_of_data(name, root) if (path / MANIFEST).exists()]
    if len(found) > 1:
        raise StoreError(
            "several feature stores fit",
            where=str(root),
            found=", ".join(path.name for path in found[:4]),
            fix="give the folder of one (`restuning cache ls` lists them)",
        )
    return Store(found[0] if found else find_store(name, root))


def _read_ids(name: str | Path, store: Store, label: str) -> tuple[dict[str, list[str]], list[str]]:
    """By split the images' paths in their folder, and the names of classes; nothing of other data."""
    described = store.key.preprocessing
    folder = expand_home(name)
    if is_store(folder) or not {"mean", "extractor"} & described.keys():
        return {}, []
    shards = find_shards(name)
    if shards is None and find_parquets(name) is not None:
        return _read_ids_of_rows(name, store, label), []
    if not folder.is_dir() and shards is None:
        return {}, []
    preprocessing = preprocessing_from_dict(described)
    identity = store.key.data["identity"]
    for skip_bad in (False, True):
        options = DataOptions(skip_bad=skip_bad, label=label)
        if shards and isinstance(preprocessing, Preprocessing):
            data = from_tars(shards, preprocessing, options)
        else:
            data = from_folder(folder, preprocessing, options)
        if data.contents() == identity:
            break
    else:
        raise _of_other_data(name, store, media_of(preprocessing).nouns)
    ids = {}
    for split in store.key.splits:
        rows = getattr(data, split)
        files = list_files(rows) or []
        ids[split] = list_ids(rows) or [relative(file, folder) for file in files]
    return ids, data.labels


def _read_ids_of_rows(name: str | Path, store: Store, label: str) -> dict[str, list[str]]:
    """By split `FILE#ROW` of the images of parquet files; nothing where they are not in the rows, or nobody says which column."""
    preprocessing = preprocessing_from_dict(store.key.preprocessing)
    # Whatever computed them, they are read in this way.
    reader = Backbone(str(store.key.backbone), nn.Identity(), (), preprocessing=preprocessing)
    read = False
    for skip_bad in (False, True):
        with suppress(DataError):
            columns = load_columns(name, reader, DataOptions(skip_bad=skip_bad, label=label))
            data = next(iter(columns.values()))
            read = True
            if for_store(data).contents() == store.key.data["identity"]:
                named = {split: list_ids(getattr(data, split)) for split in store.key.splits}
                return {split: ids for split, ids in named.items() if ids is not None}
    if read:
        raise _of_other_data(name, store, media_of(preprocessing).nouns)
    return {}


def _of_other_data(name: str | Path, store: Store, nouns: str) -> StoreError:
    return StoreError(
        f"the store is of other {nouns}",
        where=show_url(str(name)),
        found=f"{store.path} is of data that had other contents, splits or classes",
        fix="`restuning cache` builds one of these; or give the store's folder, for ids by row",
    )


def _write(
    store: Store, split: str, ids: Sequence[str] | None, classes: Sequence[str], file: Path
) -> None:
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet

    value = pa.float16() if store.key.dtype == "fp16" else pa.float32()
    fields = [pa.field("id", pa.string()), pa.field("label", pa.int64())]
    fields.append(pa.field("view", pa.string()))
    for name, column in store.key.columns.items():
        shape = {"shape": json.dumps(list(column.shape))}
        fields.append(pa.field(name, pa.list_(value, column.numel), metadata=shape))
    known = {"restuning": json.dumps({"key": store.key.to_dict(), "classes": list(classes)})}
    schema = pa.schema(fields, metadata=known)
    count = store.key.splits[split]
    labels = (
        pa.array(store.labels(split).numpy()) if _has_labels(store) else pa.nulls(count, pa.int64())
    )
    # By its name in the end: the partial file is called otherwise.
    arrow = file.suffix == ".arrow"
    write = pyarrow.ipc.new_file if arrow else pyarrow.parquet.ParquetWriter
    with replacing(file) as partial, write(str(partial), schema) as writer:
        for view, at, rows in _groups(store, split):
            names = [f"{split}/{n}" for n in at] if ids is None else ids[at.start : at.stop]
            columns = [pa.array(names, pa.string()), labels[at.start : at.stop]]
            columns.append(pa.array([view] * len(at)))
            for column in store.key.columns.values():
                part = rows[:, column.start : column.start + column.numel].contiguous().view(-1)
                flat = part.half() if store.key.dtype == "fp16" else part
                columns.append(pa.FixedSizeListArray.from_arrays(flat.numpy(), column.numel))
            writer.write_table(pa.table(columns, schema=schema))


def _has_labels(store: Store) -> bool:
    """Whether there are any: of several labels, numbers and words a store keeps none."""
    identity = store.key.data["identity"]
    return not isinstance(identity, Mapping) or identity.get("classes") != digest_names([])


def _groups(store: Store, split: str) -> Iterator[tuple[str, range, Tensor]]:
    count = store.key.splits[split]
    for number, view in enumerate(store.key.views if split == "train" else ("plain",)):
        for start in range(0, count, ROWS):
            at = range(start, min(start + ROWS, count))
            yield view, at, store.rows(split, number, at)

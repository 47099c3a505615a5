"""Parquet files with images in their rows, of procedural images."""

import json

import pytest

from tars import encode


def rows(numbers, nested=True, side=8):
    """Columns of images whose class is the parity of their number."""
    numbers = list(numbers)
    images = [encode(n, side=side) for n in numbers]
    if nested:
        images = [
            {"bytes": each, "path": f"{n}.png"} for n, each in zip(numbers, images, strict=True)
        ]
    return {"image": images, "label": [("cat", "dog")[n % 2] for n in numbers], "n": numbers}


def write(file, columns, group=7, features=None):
    """A file of these columns; `features` is what `datasets` says of them in the schema."""
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if features:
        said = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(said)})
    parquet.write_table(table, file, row_group_size=group)
    return file


def parts(folder, files, each, **how):
    """`part-000.parquet` and so on, with so many rows each."""
    for number in range(files):
        write(
            folder / f"part-{number:03d}.parquet",
            rows(range(number * each, (number + 1) * each), **how),
        )
    return folder

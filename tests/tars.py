"""Tars as webdataset writes them, of procedural images."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def encode(number, kind="png", side=8):
    rng = np.random.default_rng(number)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def write_tar(file, members):
    """Members in their order: names and bytes (or a `TarInfo` for what is no file)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return file


def samples(numbers, label="cls", kind="png", side=8):
    """Members of samples whose class is the parity of their number."""
    for n in numbers:
        key = f"{n:05d}"
        yield f"{key}.{kind}", encode(n, kind, side)
        if label == "cls":
            yield f"{key}.cls", str(n % 2).encode()
        elif label == "json":
            yield f"{key}.json", json.dumps({"kind": ("cat", "dog")[n % 2], "n": n}).encode()
        elif label == "txt":
            yield f"{key}.txt", ("cat", "dog")[n % 2].encode()


def shots(folder, tars, each, **how):
    """`shots-000.tar` and so on, with so many samples each."""
    for number in range(tars):
        write_tar(
            folder / f"shots-{number:03d}.tar",
            samples(range(number * each, (number + 1) * each), **how),
        )
    return folder

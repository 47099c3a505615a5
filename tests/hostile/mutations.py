"""What may happen to a folder of files: seeded changes of one file or of what lies in its place."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

POSIX = os.name == "posix"
WORDS = ["../../etc/passwd", "\ud800", "\x00", "a" * 3000, "[bold]", "nan", "", "é", "-1", "1e9"]
NUMBERS = [0, -1, 1, 2**31, 2**62, 2**63, 10**30, -(10**18), 1.5, 1e-300, 1e308, 0.1]


def mutate(folder: Path, other: Path, rng: random.Random) -> list[str]:
    """Change a folder; `other` is a valid one of the same kind. What was done, in words."""
    return [_change(folder, other, rng) for _ in range(rng.choice((1, 1, 1, 1, 2, 3)))]


def _files(folder: Path) -> list[Path]:
    # Neither into links nor through pipes that an earlier change left.
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _change(folder: Path, other: Path, rng: random.Random) -> str:
    files = _files(folder)
    if not files:
        return "nothing is left"
    file = rng.choice(files)
    of_file = [flip, flip, truncate, cut_out, insert, repeat, zeros, replace_bytes]
    if file.suffix in (".json", ".jsonl") or file.read_bytes()[:1] == b"{":
        of_file += [of_json] * 14
    elif file.suffix == ".safetensors":
        of_file += [of_header] * 6
    elif file.suffix in (".csv", ".txt", ".conll", ".iob2"):
        of_file += [of_lines] * 6
    of_place = [delete, empty, as_folder, as_link, as_pipe, swap, swap]
    # Contents more often than places: there are more ways to be wrong.
    operation = rng.choice(of_file) if rng.random() < 0.8 else rng.choice(of_place)
    name = file.relative_to(folder)
    return f"{operation.__name__} {name}: {operation(file, other / name, rng)}"


# ------------------------------------------------------------------ bytes


def flip(file: Path, other: Path, rng: random.Random) -> str:
    raw = bytearray(file.read_bytes())
    places = [rng.randrange(len(raw)) for _ in range(rng.choice((1, 1, 1, 8)))] if raw else []
    for place in places:
        raw[place] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)
    return f"bytes {places}"


def truncate(file: Path, other: Path, rng: random.Random) -> str:
    size = rng.randrange(file.stat().st_size + 1)
    os.truncate(file, size)
    return f"to {size} bytes"


def cut_out(file: Path, other: Path, rng: random.Random) -> str:
    raw = file.read_bytes()
    start, stop = _range(raw, rng)
    file.write_bytes(raw[:start] + raw[stop:])
    return f"{start}:{stop}"


def insert(file: Path, other: Path, rng: random.Random) -> str:
    raw, place = file.read_bytes(), rng.randrange(file.stat().st_size + 1)
    more = rng.choice(
        (rng.randbytes(rng.randrange(1, 40)), b"\0" * 64, b"\xff\xfe", b'"', b"\n,\n")
    )
    file.write_bytes(raw[:place] + more + raw[place:])
    return f"{len(more)} bytes at {place}"


def repeat(file: Path, other: Path, rng: random.Random) -> str:
    raw = file.read_bytes()
    start, stop = _range(raw, rng)
    file.write_bytes(raw[:stop] + raw[start:])
    return f"{start}:{stop}"


def zeros(file: Path, other: Path, rng: random.Random) -> str:
    raw = file.read_bytes()
    start, stop = _range(raw, rng)
    file.write_bytes(raw[:start] + bytes(stop - start) + raw[stop:])
    return f"{start}:{stop}"


def replace_bytes(file: Path, other: Path, rng: random.Random) -> str:
    raw = file.read_bytes()
    start, stop = _range(raw, rng)
    file.write_bytes(raw[:start] + rng.randbytes(stop - start) + raw[stop:])
    return f"{start}:{stop}"


def _range(raw: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(raw) + 1)
    return start, min(len(raw), start + rng.choice((1, 4, 64, len(raw))))


# ------------------------------------------------------------------ what the bytes mean


def of_json(file: Path, other: Path, rng: random.Random) -> str:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return flip(file, other, rng)
    content, said = change_json(content, rng)
    text = json.dumps(content, indent=rng.choice((None, 1)))
    if rng.random() < 0.05:
        text, said = text.replace(":", f": {'[' * 10**5}", 1), "a hundred thousand brackets"
    file.write_text(text)
    return said


def change_json(content, rng: random.Random):
    """One value or name anywhere in it changed."""
    places = list(_places(content))
    if not places:
        return rng.choice(NUMBERS), "another value"
    owner, key = rng.choice(places)
    old = owner[key]
    kind = rng.randrange(6)
    if kind == 0 and isinstance(owner, dict):
        new = rng.choice((f"{key}s", key.upper(), "", rng.choice(WORDS)))
        renamed = [(new if k == key else k, v) for k, v in owner.items()]
        owner.clear()
        owner.update(renamed)
        return content, f"{key!r} renamed {new!r:.20}"
    if kind == 1:
        del owner[key]
        return content, f"{key!r} left out"
    if kind == 2:
        there, at = rng.choice(places)
        if not _holds(old, there) and not _holds(there[at], owner):
            owner[key], there[at] = there[at], old
        return content, f"{key!r} and {at!r} swapped"
    owner[key] = rng.choice(
        (
            rng.choice(NUMBERS),
            rng.choice(NUMBERS),
            rng.choice(WORDS),
            None,
            True,
            [],
            {},
            [old],
            {"a": old},
            float("nan"),
            old * -1 if isinstance(old, int | float) else [1] * 5000,
            old + 1 if isinstance(old, int) else "x",
        )
    )
    return content, f"{key!r}: {old!r:.40} -> {owner[key]!r:.40}"


def _places(content):
    if isinstance(content, dict):
        keys = list(content)
    else:
        keys = range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from _places(content[key])


def _holds(value, owner) -> bool:
    """Whether a value would come to lie in itself."""
    return value is owner or any(_holds(inner[key], owner) for inner, key in _places(value))


def of_header(file: Path, other: Path, rng: random.Random) -> str:
    """The JSON in front of a safetensors file, its length put right."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError):
        return flip(file, other, rng)
    header, said = change_json(header, rng)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if rng.random() < 0.1:
        length, said = rng.choice((2**63, 2**40, 0)), "another length"
    else:
        length = len(text)
    file.write_bytes(length.to_bytes(8, "little") + text + raw[8 + length :])
    return said


def of_lines(file: Path, other: Path, rng: random.Random) -> str:
    lines = file.read_bytes().split(b"\n")
    number = rng.randrange(len(lines))
    line = lines[number]
    lines[number] = rng.choice(
        (
            line + b",more",
            line.replace(b",", b"", 1),
            line.replace(b" ", b"", 1),
            b'"' + line,
            line + b"\r",
            b"\xef\xbb\xbf" + line,
            line.replace(b" ", "\u2028".encode()),
            line + b"\0",
            b"x" * 200_000 + line,
            b"../../" + line,
            line.upper(),
            line + b" ",
            b"",
            line + b"\n" + line,
            line.decode("utf-8", "replace").encode("utf-16"),
            line + b"9" * 50,
        )
    )
    file.write_bytes(b"\n".join(lines))
    return f"line {number}: {line[:40]!r} -> {lines[number][:40]!r}"


# ------------------------------------------------------------------ what lies in its place


def delete(file: Path, other: Path, rng: random.Random) -> str:
    file.unlink()
    return "gone"


def empty(file: Path, other: Path, rng: random.Random) -> str:
    file.write_bytes(b"")
    return "empty"


def as_folder(file: Path, other: Path, rng: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "a folder"


def as_link(file: Path, other: Path, rng: random.Random) -> str:
    if not POSIX:
        return flip(file, other, rng)
    targets = (other, file.name, "nowhere", "/dev/zero", "/dev/tty", "/etc/passwd", "..")
    target = rng.choice(targets)
    file.unlink()
    file.symlink_to(target)
    return f"a link to {target}"


def as_pipe(file: Path, other: Path, rng: random.Random) -> str:
    if not POSIX:
        return flip(file, other, rng)
    file.unlink()
    os.mkfifo(file)
    return "a pipe"


def swap(file: Path, other: Path, rng: random.Random) -> str:
    if not other.is_file():
        return delete(file, other, rng)
    shutil.copyfile(other, file)
    return "that of another valid folder"

"""Files that hold many images each, of every kind: how they are written, and what their samples are called."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parquets import parts
from tars import shots


@dataclass(frozen=True)
class Packed:
    """One kind.

    Attributes:
        write: Files in a folder, `(folder, files, samples of each)`; classes are parities of numbers.
        first, ending: Of their names: `FIRST-000.ENDING`.
        name: Of a sample in its file, by its number of all and how many a file holds.
    """

    write: Callable[..., Path]
    first: str
    ending: str
    name: Callable[[int, int], str]

    def id(self, number: int, each: int) -> str:
        return f"{self.first}-{number // each:03d}{self.name(number, each)}"

    def number(self, id: str, each: int) -> int:
        file, _, own = id.removeprefix(f"{self.first}-").replace("#", "/").partition("/")
        return int(own) if self.ending == "tar" else int(file) * each + int(own)


PACKED = {
    "tar": Packed(shots, "shots", "tar", lambda number, each: f"/{number:05d}"),
    "parquet": Packed(parts, "part", "parquet", lambda number, each: f"#{number % each}"),
}

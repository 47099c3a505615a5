"""Changed files of every kind give exactly the answer they gave, or an error of ours: nothing else.

    python tests/hostile/test_fuzz.py                      # all of it, without pytest
    python tests/hostile/test_fuzz.py KIND SEED [COUNT]    # one changed folder, and what became of it

Each is read in a process of its own, which is ended after `PATIENCE` and whose memory is measured.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pytest
from kinds import AGAIN, KINDS, VARIANTS
from mutations import mutate

import children

PATIENCE = 20
"""Seconds after which reading counts as hanging."""
STARTING = 120
"""Seconds that a process may take to import, and to make what it needs."""
SPARE = 48 * 2**20
"""Bytes beyond twice the files: what the interpreter and torch take here and there."""
UNTOUCHED = 2 * 2**30
"""Bytes of addresses beyond those: memory that is asked for and not written to."""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes, links and limits of POSIX")

SAME, OURS = "the same answer", "an error of ours"


class Reader:
    """A process that changes and reads one folder after the other; a new one where it hangs or dies.

    Args:
        root: Where valid and changed folders lie.
        variants: Valid folders of each kind.
    """

    def __init__(self, root: Path, variants: int) -> None:
        self.root, self.variants = root, variants
        self._process = None
        self._ready: set[str] = set()

    def read(self, kind: str, seed: int) -> tuple[str, str]:
        """What became of a seed, and more words about it."""
        if self._process is None:
            self._start()
        if kind not in self._ready:
            said = self._ask(kind, None, STARTING)
            assert said is not None, f"{kind}: no valid one could be made and read"
            assert said[0] == "ready", said[1]
            self._ready.add(kind)
        said = self._ask(kind, seed, PATIENCE)
        if said is not None:
            return said
        # What it was at is gone with it; the seed makes it again.
        code = self._process.exitcode
        self.stop()
        return ("hangs", f"{PATIENCE} s") if code is None else ("died", f"exit code {code}")

    def _start(self) -> None:
        context = multiprocessing.get_context(children.START)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=work, args=(self.root, self.variants, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def _ask(self, kind: str, seed: int | None, seconds: float):
        try:
            self._pipe.send((kind, seed))
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE)
        self._process.join(0)
        return None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process, self._ready = None, set()


def work(root: Path, variants: int, pipe) -> None:
    """The process: makes valid folders of a kind and reads them, then changed ones until nobody asks."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What a library prints about a damaged file is not for this terminal.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    answers: dict[str, list] = {}
    while True:
        try:
            kind, seed = pipe.recv()
        except EOFError:
            return
        try:
            if seed is None:
                (root / kind).mkdir(exist_ok=True)
                answers[kind] = [_valid(kind, root / kind, n) for n in range(variants)]
                said = "ready", ""
            else:
                said = _try(kind, root / kind, seed, answers[kind])
        except BaseException:
            said = "the fuzz itself failed", traceback.format_exc()
        pipe.send(said)


def _valid(kind: str, root: Path, variant: int):
    folder = root / f"valid-{variant}"
    if not folder.exists():
        KINDS[kind].make(folder, variant)
    copy = Path(shutil.copytree(folder, root / "copy", symlinks=True))
    try:
        answer = KINDS[kind].read(copy, variant)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return answer


def _try(kind: str, root: Path, seed: int, answers) -> tuple[str, str]:
    rng = random.Random(f"{kind} {seed}")
    variant = rng.randrange(len(answers))
    other = (variant + rng.randrange(1, len(answers))) % len(answers)
    folder = root / f"changed-{os.getpid()}"
    shutil.copytree(root / f"valid-{variant}", folder)
    try:
        done = "; ".join(mutate(folder, root / f"valid-{other}", rng))
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        became, more = _read(kind, folder, variant, answers[variant], size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return became, f"{done}: {more}"


def _read(kind: str, folder: Path, variant: int, wanted, size: int) -> tuple[str, str]:
    from restuning import RestuningError

    allowed = 2 * size + SPARE
    before = _begin(allowed)
    try:
        answer = KINDS[kind].read(folder, variant)
        became, more = SAME, ""
        if KINDS[kind].identified:
            (identity, answer), (before_it, wanted) = answer, wanted
            if answer != wanted:
                became = "silent" if identity == before_it else "another input"
        elif not _same(answer, wanted):
            became, more = "silent", f"{answer!r:.200}"
    except RestuningError as error:
        str(error).encode()
        became, more = OURS, f"{type(error).__name__}: {error.what}; {error.found}"[:300]
        if not error.what:
            became = "no words"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[::-1])
        became, more = f"foreign {type(error).__name__}", f"{error!s:.200} at {places[:300]}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    grown = _peak() - before
    if grown > allowed:
        return "memory", f"{grown / 2**20:.0f} MiB for {size / 2**20:.2f} MiB of files ({became})"
    return became, more


def _same(answer, wanted) -> bool:
    if not isinstance(answer, dict) or AGAIN not in answer.values():
        return answer == wanted
    # What is not there is made anew and is what it was.
    return all(value in (AGAIN, wanted[name]) for name, value in answer.items())


def _begin(allowed: int) -> int:
    """Forget the peak so far and limit what may be added; bytes that are there."""
    Path("/proc/self/clear_refs").write_text("5")
    status = _status()
    limit = status["VmSize"] + allowed + UNTOUCHED
    resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
    return status["VmRSS"]


def _peak() -> int:
    return _status()["VmHWM"]


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith("Vm"))
    return {name: int(rest.split()[0]) * 1024 for name, rest in pairs}


def fuzz(reader: Reader, kind: str, seeds, say: bool = False) -> dict[str, list[str]]:
    """What became of each seed that gave neither the same answer nor an error of ours."""
    wrong, counts = {}, {}
    for seed in seeds:
        became, more = reader.read(kind, seed)
        counts[became] = counts.get(became, 0) + 1
        if say:
            print(became, more, sep="\n  ")
        if became not in (SAME, OURS, "another input"):
            wrong.setdefault(became, []).append(f"{kind} {seed}: {more}")
    print(kind, counts)
    return wrong


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A reader by the number of valid folders of each kind."""
    made = {n: Reader(tmp_path_factory.mktemp(f"of-{n}"), n) for n in (2, VARIANTS)}
    yield made
    for each in made.values():
        each.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_changed_files_of_each_kind_answer_as_before_or_are_refused(kind, readers):
    assert not fuzz(readers[2], kind, range(KINDS[kind].quick))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_answer_as_before_or_are_refused_in_words(kind, readers):
    assert not fuzz(readers[VARIANTS], kind, range(1000, 1000 + KINDS[kind].count))


def main(kind: str = "", first: str = "", count: str = "1") -> None:
    with tempfile.TemporaryDirectory() as root:
        reader = Reader(Path(root), VARIANTS)
        for each in [kind] if kind else KINDS:
            seeds = range(1000, 1000 + KINDS[each].count)
            if first:
                seeds = range(int(first), int(first) + int(count))
            started = time.monotonic()
            found = fuzz(reader, each, seeds, say=len(seeds) == 1)
            short = {name: [line[:400] for line in lines[:6]] for name, lines in found.items()}
            print(json.dumps(short, indent=1), f"{time.monotonic() - started:.0f} s", flush=True)
        reader.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""All tasks of a server, on one backbone or several: opened, asked, exchanged and taken out while it answers."""

from __future__ import annotations

import atexit
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, TypeVar
from weakref import WeakSet

from restuning._errors import (
    AnswerError,
    BusyError,
    DataError,
    FormatError,
    RestuningError,
    UnknownNameError,
)
from restuning._files import digest_of_json
from restuning.problems import Problem
from restuning.serve.batcher import AT_EXIT, Batcher, Live, Pace, Reply
from restuning.serve.limits import Limits
from restuning.serve.predictor import Predictor, find_folders
from restuning.task import SHA256, WEIGHTS, Identified, WeightsFile, describe, find_task, load

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a task that is served: it stands in addresses, in metrics and in logs."""

MOST_BANKS = 8
"""Tasks that were added one by one have banks of their own until there are so many."""

TRIES = 3
"""Of reading a task that somebody saves meanwhile."""

T = TypeVar("T")

_OPEN: WeakSet[Any] = WeakSet()


@dataclass(frozen=True)
class Entry:
    """A task that is served.

    Attributes:
        name: Of the task.
        folder: Where it was read.
        version: The sha256 of its description, in which that of its weights stands.
        description: `task.json`.
        batcher: Of its backbone.
        since: When it began to answer, in seconds since 1970.
        problem: What kind of answer it gives.
        labels: Its classes, or what its numbers are called.
        error: Why it could not be replaced by what lies in its folder now; "" where it could.
    """

    name: str
    folder: Path
    version: str
    description: Mapping[str, Any] = field(repr=False)
    batcher: Batcher = field(repr=False)
    since: float
    problem: Problem
    labels: Sequence[str] = field(repr=False)
    error: str = ""


class Service:
    """Tasks that are asked by many: `service.ask("image", [bytes])`.

    Tasks of one backbone that prepare their inputs alike share a `Batcher`, and with it forwards; the
    backbone itself is loaded once however they prepare them.

    Args:
        tasks: As `Predictor.load` takes them; of several backbones, or none where they come later.
        device: Where backbones run; None for a GPU if there is one.
        any_backbone: Accept other weights of the same shape, or another engine of a backbone.
        backbone: A name or a loaded backbone for all tasks, in place of the one that they name.
        weights: The weights file of a backbone that is named.
        pace: How questions are gathered.
        limits: The largest of everything.

    Attributes:
        entries: Tasks by name; replaced as a whole, never changed.
        failed: Why folders that hold no task yet were refused, by name; replaced as a whole.
        upkeep: The thread that looks after it, if there is one: it is waited for at the end.

    Raises:
        RestuningError: As `Predictor.load`, or a name is none that can stand in an address.
    """

    def __init__(
        self,
        tasks: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = (),
        *,
        device: str | None = None,
        any_backbone: bool = False,
        backbone: Any = None,
        weights: str | Path | None = None,
        pace: Pace | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._open: dict[str, Any] = {
            "device": device,
            "any_backbone": any_backbone,
            "backbone": backbone,
            "weights": weights,
        }
        self.pace, self.limits = pace or Pace(), limits or Limits()
        self.entries: Mapping[str, Entry] = {}
        self.failed: dict[str, str] = {}
        self.started = time.time()
        self.upkeep: Thread | None = None
        self._ended = Event()
        self._batchers: dict[str, Batcher] = {}
        self._leaving: list[Batcher] = []
        self._identified: dict[str, Identified] = {}
        self._change = Lock()
        _OPEN.add(self)
        folders = find_folders(tasks)
        for name in folders:
            check_name(name)
        described = {name: _describe_version(folder) for name, folder in folders.items()}
        groups: dict[str, list[str]] = {}
        for name, (description, _) in described.items():
            groups.setdefault(self._group(description), []).append(name)
        try:
            for key, names in groups.items():
                if not self._open_group(key, {n: folders[n] for n in names}, described):
                    for name in names:
                        self.put(name, folders[name])
        except BaseException:
            # Nobody has it to drain it, and the thread of a backbone that was opened would hold that for ever.
            self.drain(0)
            raise

    @property
    def batchers(self) -> list[Batcher]:
        """One for each backbone and way of preparing inputs."""
        return list(dict.fromkeys(self._batchers.values()))

    @property
    def named_batchers(self) -> dict[str, Batcher]:
        """The same by backbone and kind; with the start of a digest where several would have one name."""
        named = [
            (f"{b.live.predictor.backbone.name} {b.kind}", k, b) for k, b in self._batchers.items()
        ]
        count = Counter(name for name, _, _ in named)
        return {
            name if count[name] == 1 else f"{name} {digest_of_json({'group': key})[:8]}": batcher
            for name, key, batcher in named
        }

    def ask(
        self,
        kind: str,
        inputs: Sequence[Any],
        tasks: Sequence[str] | None = None,
        *,
        seconds: float | None = None,
    ) -> list[list[Future[Reply]]]:
        """Ask every task of a kind of input, or some; for each input the replies of all backbones.

        Args:
            kind: "image", "audio", or "text", which tasks on tagged words answer as well.
            inputs: Bytes of images or sounds (or arrays), texts, or lists of words.
            tasks: Names; None for all of the kind.
            seconds: After which nobody waits any more; None for the limit.

        A task that is exchanged meanwhile answers as it was or as it is, also where it moves to another backbone.

        Raises:
            BusyError: There is no room for so many.
            UnknownNameError: No such task, or no such kind.
            DataError: No task, or one that was named, answers such inputs.
            TooLargeError: There are too many; one that is too large is the error of its future.
        """
        return self.ask_several({kind: inputs}, tasks, seconds=seconds)

    def ask_several(
        self,
        questions: Mapping[str, Sequence[Any]],
        tasks: Sequence[str] | None = None,
        *,
        seconds: float | None = None,
    ) -> list[list[Future[Reply]]]:
        """Ask about inputs of several kinds in one: all of them are taken, or none.

        Args:
            questions: Inputs by kind. Of several kinds each is asked of those tasks that answer it.
            tasks: Names; None for all. One that answers none of these inputs is refused.
            seconds: As for `ask`.

        Returns:
            For each input, in their order, the replies of all backbones.

        Raises:
            RestuningError: As `ask`; nobody is asked then.
        """
        for kind in questions:
            if kind not in _KINDS:
                raise UnknownNameError(
                    "no such kind of input",
                    where=kind,
                    found=_tell_kinds(self.entries.values()),
                    fix=f"give one of {', '.join(_KINDS)}; tasks on tagged words answer a text",
                )
        self.limits.check_count(sum(len(inputs) for inputs in questions.values()))
        seconds = self.limits.seconds if seconds is None else seconds
        return self.ask_settled(lambda: self._ask_now(questions, tasks, seconds))

    def ask_settled(self, ask: Callable[[], T]) -> T:
        """What `ask` gives; asked again where a task moved to another batcher, or was taken out, meanwhile.

        Args:
            ask: Looks tasks or batchers up and asks them; leaves nothing behind where it raises.

        Raises:
            BusyError: The server is about to end.
            RestuningError: As `ask`, of tasks that stay where they are.
        """
        while True:
            self._refuse_closing()
            entries = self.entries
            try:
                return ask()
            except (UnknownNameError, BusyError):
                # Whoever moves a task puts its new place into the entries first.
                if self.closing or self.entries is entries:
                    raise

    def _ask_now(
        self,
        questions: Mapping[str, Sequence[Any]],
        tasks: Sequence[str] | None,
        seconds: float,
    ) -> list[list[Future[Reply]]]:
        entries = self.entries
        # Before anybody is asked: what is refused for one kind costs nothing of the other.
        chosen = _choose([*questions], entries, tasks)
        found: list[list[Future[Reply]]] = []
        try:
            for kind, inputs in questions.items():
                mine: list[list[Future[Reply]]] = [[] for _ in inputs]
                found += mine
                for batcher, names in chosen[kind].items():
                    given = [_as_kind(each, batcher.kind) for each in inputs]
                    for futures, future in zip(
                        mine, batcher.ask(given, names, seconds=seconds), strict=True
                    ):
                        futures.append(future)
        except BaseException:
            for futures in found:
                for future in futures:
                    future.cancel()
            raise
        return found

    def list_asked(self, kind: str, tasks: Sequence[str] | None = None) -> list[Entry]:
        """The tasks that would be asked about inputs of a kind; see `ask`.

        Raises:
            UnknownNameError: No such task.
            DataError: No task, or one that was named, answers such inputs.
        """
        entries = self.entries
        (chosen,) = _choose([kind], entries, tasks).values()
        return [_find(name, entries) for names in chosen.values() for name in names]

    def entry(self, name: str) -> Entry:
        """A task by its name.

        Raises:
            UnknownNameError: There is none.
        """
        return _find(name, self.entries)

    def put(self, name: str, folder: str | Path, *, known_backbone: bool = False) -> Entry:
        """Add a task, or replace the one of this name, at once for everybody who asks from now on.

        Args:
            name: Of the task.
            folder: Its folder; it is read now and not again.
            known_backbone: Whether it must be of a backbone that is loaded.

        Raises:
            RestuningError: As `Predictor.load`; what answered goes on answering.

        Cost: reads the task. Those that are served are not built again, and the backbone's weights are
            compared by what was known of them when they were loaded.
        """
        check_name(name)
        folder = find_task(folder)
        with self._change:
            self._refuse_closing()
            for _ in range(TRIES):
                description, version = _describe_version(folder)
                key = self._group(description)
                if key not in self._batchers:
                    if known_backbone:
                        served = self._backbone_key(description) in self._identified
                        raise DataError(
                            "the task prepares its inputs as none that is served here"
                            if served
                            else "the task is of a backbone that is not served here",
                            where=name,
                            found=str(description["backbone"]["name"])[:200],
                            fix="start the server with a task that prepares them so"
                            if served
                            else "start the server with a task of this backbone",
                        )
                    if self._open_group(key, {name: folder}, {name: (description, version)}):
                        return self.entries[name]
                    continue
                batcher = self._batchers[key]
                task = load(
                    folder, self._identify(batcher), any_backbone=self._open["any_backbone"]
                )
                if _describe_version(folder)[1] == version:
                    break
            else:
                raise FormatError(
                    "a task is replaced again and again while it is read",
                    where=str(folder),
                    fix="put it in when nobody saves it",
                )
            old = self.entries.get(name)
            live = batcher.live
            several = len(live.predictor.multi.banks) >= MOST_BANKS
            tasks = {**live.predictor.tasks, name: task}
            exchanged = live.predictor.exchange(tasks, afresh=several)
            # One reference: whoever asked before is answered by what answered then.
            batcher.live = Live(exchanged, {**live.versions, name: version})
            now = time.time()
            labels = exchanged.labels[name]
            entry = Entry(name, folder, version, description, batcher, now, task.problem, labels)
            self.entries = {**self.entries, name: entry}
            self._forget_refused([name])
            if old is not None and old.batcher is not batcher:
                self._take_out(old)
            return entry

    def remove(self, name: str) -> None:
        """Take a task out; who asked before is still answered.

        Raises:
            UnknownNameError: There is none.
        """
        with self._change:
            entry = self.entry(name)
            self.entries = {n: e for n, e in self.entries.items() if n != name}
            self._take_out(entry)

    def note_refused(self, name: str, error: RestuningError) -> None:
        """Remember why a folder was refused, to be told in the listing."""
        with self._change:
            if name in self.entries:
                changed = replace(self.entries[name], error=str(error))
                self.entries = {**self.entries, name: changed}
            else:
                self.failed = {**self.failed, name: str(error)}

    def forget_refused(self, name: str) -> None:
        """A folder that was refused is gone."""
        with self._change:
            self._forget_refused([name])

    def gather(self) -> None:
        """Put all tasks that were added one by one into one bank again, which is the fastest to ask."""
        for batcher in self.batchers:
            with self._change:
                live = batcher.live
                if len(live.predictor.multi.banks) > 1:
                    fresh = live.predictor.exchange(live.predictor.tasks, afresh=True)
                    batcher.live = replace(live, predictor=fresh)

    def warm_up(self) -> None:
        """One answer of every backbone, so that the first who asks does not wait for what is prepared once."""
        for batcher in self.batchers:
            # Whose last task was taken out meanwhile, or which others ask as much as it takes, needs none.
            with suppress(BusyError):
                (future,) = batcher.ask([_EXAMPLES[batcher.kind](self.limits)])
                # Forwards were made by then; what a task says of an example is nobody's answer.
                with suppress(AnswerError):
                    future.result(timeout=600)
            batcher.cache.clear()

    @property
    def closing(self) -> bool:
        """Whether no more questions are taken."""
        return self._ended.is_set()

    def close(self) -> None:
        """Take no more questions, from now on; those that are here are still answered."""
        self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Wait a time, or until it closes; whether it did."""
        return self._ended.wait(seconds)

    def drain(self, seconds: float = 30.0) -> bool:
        """Take no more questions and wait for the answers to those that are here.

        Args:
            seconds: To wait at most.

        Returns:
            Whether all were answered.
        """
        self.close()
        end = time.monotonic() + seconds
        # Also those whose last task was taken out: whoever asked before is still answered.
        several = [*self.batchers, *self._leaving]
        done = [b.drain(max(0.0, end - time.monotonic())) for b in several]
        if self.upkeep is not None and self.upkeep.is_alive():
            self.upkeep.join(max(0.0, end - time.monotonic()))
        return all(done)

    def _forget_refused(self, names: Container[str]) -> None:
        # Another one and not changed: a listing may be reading it.
        self.failed = {n: told for n, told in self.failed.items() if n not in names}

    def _refuse_closing(self) -> None:
        if self.closing:
            raise BusyError("the server is about to end", fix="ask another, or again later")

    def _identify(self, batcher: Batcher) -> Identified:
        host = batcher.live.predictor.host
        return next(i for i in self._identified.values() if i.host is host)

    def _open_group(
        self, key: str, folders: Mapping[str, Path], described: Mapping[str, tuple[Any, str]]
    ) -> bool:
        """Tasks on a backbone, or a way of preparing inputs, that nothing here has yet.

        Returns:
            Whether they are there now: nothing is changed where one was saved again while it was read.
        """
        description = described[next(iter(folders))][0]
        backbone = self._backbone_key(description)
        known = self._identified.get(backbone)
        if known is None:
            predictor = Predictor.load(folders, **self._open)
            # After the first: it compares the weights, and each after it compares with what was read.
            known = Identified(predictor.host)
        else:
            beside = next(b for b in self.batchers if b.live.predictor.host is known.host)
            accept = self._open["any_backbone"]
            predictor = Predictor(
                beside.live.predictor.backbone,
                {n: load(f, known, any_backbone=accept) for n, f in folders.items()},
                host=beside.live.predictor.host,
                preprocessing=description["preprocessing"],
                device=str(known.device),
            )
        if any(_describe_version(folder)[1] != described[n][1] for n, folder in folders.items()):
            return False
        self._identified = {**self._identified, backbone: known}
        versions = {name: described[name][1] for name in folders}
        batcher = Batcher(
            Live(predictor, versions), self.pace, self.limits.waiting, self.limits.check
        )
        self._batchers = {**self._batchers, key: batcher}
        now = time.time()
        replaced = [self.entries[n] for n in folders if n in self.entries]
        self.entries = {
            **self.entries,
            **{
                n: Entry(
                    n,
                    f,
                    described[n][1],
                    described[n][0],
                    batcher,
                    now,
                    predictor.tasks[n].problem,
                    predictor.labels[n],
                )
                for n, f in folders.items()
            },
        }
        self._forget_refused(folders)
        for entry in replaced:
            self._take_out(entry)
        return True

    def _backbone_key(self, description: Mapping[str, Any]) -> str:
        """What is opened once: the backbone that was chosen for all tasks, else the one that a task names."""
        chosen, said = self._open["backbone"], description["backbone"]["name"]
        name = said if chosen is None else chosen if isinstance(chosen, str) else "that was loaded"
        if self._open["weights"] is not None:
            return f"{name} with the chosen weights"
        # Another backbone than a task names has weights of its own.
        weights = WeightsFile.from_description(description) if name == said else None
        return f"{name} {weights and weights.sha256}"

    def _group(self, description: Mapping[str, Any]) -> str:
        """Tasks of one key share forwards: a backbone, its weights, how inputs are prepared and what is read."""
        pooled = description["task"].get("pool") == "own"
        prepared = json.dumps(description["preprocessing"], sort_keys=True)
        return f"{self._backbone_key(description)} {prepared} {pooled}"

    def _take_out(self, entry: Entry) -> None:
        """A task out of its batcher, and the batcher with its last task."""
        batcher, live = entry.batcher, entry.batcher.live
        tasks = {n: t for n, t in live.predictor.tasks.items() if n != entry.name}
        if tasks:
            versions = {n: v for n, v in live.versions.items() if n != entry.name}
            batcher.live = Live(live.predictor.exchange(tasks), versions)
            return
        # First, so that whoever drains finds it among these or those.
        self._leaving = [*(b for b in self._leaving if b.held), batcher]
        self._batchers = {k: b for k, b in self._batchers.items() if b is not batcher}
        host = live.predictor.host
        if all(b.live.predictor.host is not host for b in self.batchers):
            self._identified = {k: i for k, i in self._identified.items() if i.host is not host}
        batcher.drain(0)


@atexit.register
def _end_all() -> None:
    # As for a batcher: what warms it up, or looks after it, runs the backbone as well.
    end = time.monotonic() + AT_EXIT
    for service in list(_OPEN):
        service.drain(max(0.0, end - time.monotonic()))


def check_name(name: str) -> None:
    """Refuse a name that cannot stand in an address.

    Raises:
        DataError: It is none of letters, digits, `.`, `_` and `-`.
    """
    if not NAME.fullmatch(name):
        raise DataError(
            "a task with such a name cannot be served",
            where=name[:80],
            fix="rename its folder: up to 64 letters, digits, dots, - and _, a letter or digit first",
        )


def _describe_version(folder: Path) -> tuple[dict[str, Any], str]:
    description = describe(folder)
    told: Any = description
    if SHA256 not in description:
        # Files of before do not say which weights are theirs.
        told = [description, WeightsFile.of(folder / WEIGHTS).sha256]
    return description, digest_of_json(told)


_KINDS = {"image": ("image",), "audio": ("audio",), "text": ("text", "words")}
"""Kinds of tasks that answer a kind of input."""


def asked_as(kind: str) -> str:
    """The kind of input under which tasks of a kind are asked: words are asked as texts."""
    return next(name for name, kinds in _KINDS.items() if kind in kinds)


def _find(name: str, entries: Mapping[str, Entry]) -> Entry:
    if name in entries:
        return entries[name]
    raise UnknownNameError(
        "no such task",
        where=name[:80],
        found=f"{len(entries)} tasks: {', '.join([*entries][:8])}",
        fix="give one of these names, or GET /v1/tasks for all",
    )


def _choose(
    kinds: Sequence[str], entries: Mapping[str, Entry], tasks: Sequence[str] | None
) -> dict[str, dict[Batcher, list[str]]]:
    """The tasks that are asked about inputs of each kind, by their batcher: of those that answer it."""
    named = entries.values() if tasks is None else [_find(n, entries) for n in dict.fromkeys(tasks)]
    answered = {kind for each in kinds for kind in _KINDS[each]}
    other = next((e for e in named if e.batcher.kind not in answered), None)
    if tasks is not None and other is not None:
        raise DataError(
            "a task answers inputs of another kind",
            where=other.name,
            found=f"inputs of the kind {' and '.join(kinds)}",
            fix=f"send it inputs of the kind {asked_as(other.batcher.kind)}, or leave it out",
        )
    chosen: dict[str, dict[Batcher, list[str]]] = {}
    for kind in kinds:
        wanted = [e for e in named if e.batcher.kind in _KINDS[kind]]
        if not wanted:
            raise DataError(
                f"no task {'here' if tasks is None else 'that is named'} answers an input of the kind {kind}",
                found=_tell_kinds(named),
                fix="send what these answer"
                if tasks is None
                else "name one that does, or leave these inputs out",
            )
        chosen[kind] = {}
        for each in wanted:
            chosen[kind].setdefault(each.batcher, []).append(each.name)
    return chosen


def _tell_kinds(entries: Iterable[Entry]) -> str:
    return ", ".join(f"{e.name}: {e.batcher.kind}" for e in entries)[:200]


def _as_kind(given: Any, kind: str) -> Any:
    """A text as words where words are answered, and words as a text where the whole is."""
    if kind == "words":
        return given.split() if isinstance(given, str) else list(given)
    return " ".join(given) if kind == "text" and not isinstance(given, str) else given


def _grey(limits: Limits) -> Any:
    import numpy as np

    side = max(1, min(64, isqrt(limits.pixels)))
    return np.full((side, side, 3), 128, np.uint8)


def _noise(limits: Limits) -> Any:
    import numpy as np

    count = max(1, round(min(1.0, limits.sound) * 16_000))
    return np.random.default_rng(0).standard_normal(count).astype(np.float32) / 8, 16_000


_EXAMPLES: dict[str, Callable[[Limits], Any]] = {
    "image": _grey,
    "audio": _noise,
    "text": lambda _: "a",
    "words": lambda _: ["a"],
}

"""Questions of many callers gathered into batches: one forward for all tasks and all that ask at once."""

from __future__ import annotations

import atexit
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from threading import Condition, Thread, current_thread
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from restuning._errors import AnswerError, BusyError, EngineError, UnknownNameError
from restuning.host import Engine
from restuning.serve.counts import Counts
from restuning.serve.feature_cache import FeatureCache, Row, digest_input, join_rows, split_rows
from restuning.serve.inputs import AudioInputs, FileInputs, Place
from restuning.serve.predictor import Answer, Predictor
from restuning.sites import FEATURE, Needs


@dataclass(frozen=True)
class Pace:
    """How questions are gathered.

    Attributes:
        batch: Inputs of one forward at most.
        delay: Seconds that a batch waits, if it must, for inputs that are being decoded and for callers who were
            answered just before and may ask again: one forward for all of them costs less than two. Where the forward
            takes long, a twentieth of it (`SHARE`). For nobody else who has not come.
        cache: Bytes of features that are kept.
        decoders: Threads that decode images and sounds.
    """

    batch: int = 32
    delay: float = 0.005
    cache: int = 256 * 2**20
    decoders: int = 2


SHARE = 1 / 20
"""Of the seconds of the last batch, for which the next one waits at most, if that is more than `Pace.delay`: what may
be lost where nobody comes, beside what a forward of twice as many saves where they do."""


@dataclass(frozen=True)
class Live:
    """The tasks that answer now; exchanged as a whole, so that one answer is of one state.

    Attributes:
        predictor: Them.
        versions: A digest of each.
    """

    predictor: Predictor
    versions: Mapping[str, str]

    @cached_property
    def keep(self) -> Needs:
        """What the shared forward keeps: what tasks read, and the backbone's own feature where it is given."""
        host, needs = self.predictor.host, self.predictor.multi.keep
        rule = host.readout_rule
        if rule.pool == "own":
            # Its own vector is there only where all is pooled; `embedding` refuses other.
            return needs or Needs(("last",), "pool")
        feature = f"{FEATURE}/{rule.pool}"
        if needs is None:
            return Needs((feature,), "cls")
        both = Needs(tuple(dict.fromkeys((*needs.taps, feature))), needs.tokens)
        try:
            return host.resolve_needs(both)
        except EngineError:
            # Its file does not give all that the feature is made of: who asks for it is told.
            return needs

    @cached_property
    def engine(self) -> Mapping[str, str] | None:
        """Runtime, precision and digest of the file, of a backbone that is an engine."""
        # Of a network that lives in PyTorch a fingerprint reads its structure.
        host = self.predictor.host
        return host.fingerprint().get("engine") if isinstance(host, Engine) else None

    def tell(self, tasks: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Versions and problems of some tasks."""
        kinds = {task: self.predictor.tasks[task].problem.kind for task in tasks}
        return {task: self.versions[task] for task in tasks}, kinds


@dataclass(frozen=True)
class Reply:
    """An answer, and how it came about.

    Attributes:
        answer: Of the tasks that were asked.
        versions: Of these.
        problems: Of these, by kind.
        cached: Whether no forward was made for this input.
        seconds: Of decoding and waiting, and of its whole batch in the forward and in tasks.
        tokens: Of a text that were read; 0 for images.
        embedding: The backbone's own feature, `d` on the CPU, where it was asked for.
        places: Of tagged words the numbers of those that have an answer.
    """

    answer: Answer
    versions: Mapping[str, str]
    problems: Mapping[str, str] = field(default_factory=dict)
    cached: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    embedding: Tensor | None = None
    places: tuple[int, ...] = ()


@dataclass(eq=False)
class _Asked:
    given: Any
    live: Live
    tasks: tuple[str, ...]
    embed: bool
    future: Future[Reply]
    deadline: float
    digest: str = ""
    row: Row | None = None
    ready: Any = None
    place: Place | None = None
    decoded: float = 0.0
    waited: float = 0.0
    came: float = 0.0

    def shares(self) -> bool:
        """Whether it asks anything of the shared forward."""
        alone = self.live.predictor.multi.alone_names
        return self.embed or any(task not in alone for task in self.tasks)

    def alone(self) -> list[str]:
        """The tasks with a forward of their own that it asks."""
        return [t for t in self.tasks if t in self.live.predictor.multi.alone_names]

    def is_known(self) -> bool:
        """Whether it can be answered without a forward."""
        row, live = self.row, self.live
        if row is None or (self.shares() and not row.holds(live.keep)):
            return False
        return all((task, live.versions[task]) in row.alone for task in self.alone())


AT_EXIT = 10.0
"""Seconds that a process which ends waits for the answer that is being made."""

_RUNNING: WeakSet[Any] = WeakSet()


class Batcher:
    """The tasks of one backbone, asked by many threads: `ask(image).result().answer`.

    A question is decoded by one of a few threads, waits in a bounded queue, and is answered with all others
    that wait, by one thread that runs the backbone: inputs that are the same are one, those whose features
    are kept need no forward, and all tasks that share a forward are one bank.

    Args:
        live: What answers first.
        pace: How questions are gathered.
        waiting: Inputs that are decoded or wait at most.
        check: Refuses an input by raising, before anything is made of it.

    Attributes:
        live: What answers now; to be set to what answers from now on. A question is answered by what
            answered when it was asked.
        counts: What was done.
    """

    def __init__(
        self,
        live: Live,
        pace: Pace | None = None,
        waiting: int = 256,
        check: Callable[[Any, str], None] | None = None,
    ) -> None:
        self.live, self.pace, self.waiting = live, pace or Pace(), waiting
        self._check = check
        self.inputs = live.predictor.inputs
        self.cache = FeatureCache(self.pace.cache)
        self.counts = Counts()
        self._queue: deque[_Asked] = deque()
        self._changed = Condition()
        self._decoding = 0
        self._answering = 0
        # Of the last batch: how many asked then, when it ended, and for how long they are waited for.
        self._expected, self._ended, self._patience = 0, 0.0, self.pace.delay
        self._others: int | None = None
        self._closed = False
        self._decoders = ThreadPoolExecutor(self.pace.decoders, "restuning-decode")
        self._thread = Thread(target=self._run, name="restuning-answer", daemon=True)
        self._thread.start()
        _RUNNING.add(self)

    @property
    def kind(self) -> str:
        """Of inputs: "image", "audio", "text" or "words"."""
        return self.inputs.kind

    @property
    def _decodes(self) -> bool:
        """Whether inputs are files that are decoded, by threads of their own."""
        return isinstance(self.inputs, FileInputs)

    @property
    def held(self) -> int:
        """Inputs that are decoded, wait or are answered."""
        return self._decoding + len(self._queue) + self._answering

    def ask(
        self,
        inputs: Sequence[Any],
        tasks: Sequence[str] | None = None,
        *,
        embed: bool = False,
        seconds: float = math.inf,
    ) -> list[Future[Reply]]:
        """Ask; all of the inputs are taken, or none.

        Args:
            inputs: Images as the bytes of their files or as arrays, sounds as bytes or as samples with their rate (what a path names may change, and features
                are kept), texts, or lists of words.
            tasks: Names; None for all.
            embed: Give the backbone's own feature as well.
            seconds: After which nobody waits for it: what was not begun by then is dropped.

        Raises:
            BusyError: There is no room for so many, or the server ends.
            UnknownNameError: No such task.
        """
        live = self.live
        names = tuple(live.versions if tasks is None else dict.fromkeys(tasks))
        if unknown := [name for name in names if name not in live.versions]:
            raise UnknownNameError(
                "no such task",
                where=", ".join(unknown[:4]),
                fix=f"one of: {', '.join([*live.versions][:8])}",
            )
        end = time.monotonic() + seconds
        asked = [_Asked(each, live, names, embed, Future(), end) for each in inputs]
        with self._changed:
            self._refuse_more(len(asked))
            self._decoding += len(asked)
            if self._decodes:
                # Before the lock is given back: whoever drains ends these threads.
                self._hand_over(asked)
        for each in asked:
            if self.kind == "words" and not each.given:
                # Nothing to ask the backbone: an empty sentence has no word to answer for.
                self._leave(each, Reply(Answer([], {}), *live.tell(names)))
            elif not self._decodes:
                self._prepare(each)
        return [each.future for each in asked]

    def _hand_over(self, asked: Sequence[_Asked]) -> None:
        for place, each in enumerate(asked):
            try:
                self._decoders.submit(self._prepare, each)
            except RuntimeError:
                # The interpreter ends; whoever drains must not wait for what no thread takes any more.
                self._decoding -= len(asked) - place
                for other in asked[:place]:
                    other.future.cancel()
                raise BusyError("the process is about to end", fix="ask another") from None

    def _leave(self, asked: _Asked, reply: Reply) -> None:
        self._end_decoding()
        asked.future.set_result(reply)

    def _end_decoding(self) -> None:
        with self._changed:
            self._decoding -= 1
            self._changed.notify_all()

    def _drop_given_up(self) -> None:
        """Questions that were cancelled give their places to others."""
        left = [each for each in self._queue if not each.future.cancelled()]
        self.counts.add(expired=len(self._queue) - len(left))
        self._queue = deque(left)

    def _refuse_more(self, count: int) -> None:
        if self.held + count > self.waiting:
            self._drop_given_up()
        if not self._closed and self.held + count <= self.waiting:
            return
        self.counts.add(refused=count)
        error = BusyError(
            "the server is about to end" if self._closed else "the server has too much to do",
            found="" if self._closed else f"{self.held} inputs wait, {self.waiting} may",
            fix="ask again later",
        )
        done, spent = self.counts.inputs, sum(self.counts.seconds[n] for n in ("forward", "tasks"))
        error.seconds = min(60, max(1, round(self.held * spent / max(done, 1))))
        raise error

    def _prepare(self, asked: _Asked) -> None:
        """Digest an input, and decode it unless it is known."""
        if asked.future.cancelled():
            self._end_decoding()
            self.counts.add(expired=1)
            return
        start = time.perf_counter()
        try:
            if self._check is not None:
                self._check(asked.given, self.kind)
            asked.digest = digest_input(asked.given, self.kind)
            asked.row = self.cache.get(asked.digest)
            if self._decodes and not asked.is_known():
                self._decode(asked)
            asked.decoded = time.perf_counter() - start
        except BaseException as error:  # noqa: BLE001 (whoever asked is told, and others go on)
            self._end_decoding()
            self.counts.add(failed=1)
            _set_error(asked, error)
            return
        with self._changed:
            self._decoding -= 1
            asked.came = time.perf_counter()
            self._queue.append(asked)
            self._changed.notify_all()

    def _decode(self, asked: _Asked) -> None:
        if isinstance(self.inputs, AudioInputs):
            asked.ready = self.inputs.prepare(asked.given)
            return
        batch = self.inputs.batch([asked.given])
        asked.ready = batch.args[0][0]
        asked.place = batch.places[0] if batch.places else None

    def _run(self) -> None:
        while batch := self._take():
            start = time.monotonic()
            self._others = None
            for live in {id(each.live): each.live for each in batch}.values():
                self._answer_safely([each for each in batch if each.live is live], live)
            with self._changed:
                self._answering = 0
                self._ended = time.monotonic()
                self._patience = self._patience_after(self._ended - start)
                self._expected = len(batch) + (self._others or 0)
                self._changed.notify_all()

    def _take(self) -> list[_Asked]:
        """The next batch: waits for a first question, then a moment for those that come back or are being decoded."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or (self._closed and not self._decoding))
                if not self._queue:
                    return []
                self._changed.wait_for(
                    lambda: self._is_enough(self._expected - self._decoding),
                    max(0.0, self._ended + self._patience - time.monotonic()),
                )
                self._changed.wait_for(
                    lambda: not self._decoding or self._is_enough(self.pace.batch), self._patience
                )
                taken = [
                    self._queue.popleft() for _ in range(min(len(self._queue), self.pace.batch))
                ]
                now, clock = time.monotonic(), time.perf_counter()
                batch = [each for each in taken if self._still_wanted(each, now)]
                for each in batch:
                    each.waited = clock - each.came
                if batch:
                    self._answering = len(batch)
                    return batch
                # All of them were given up, and whoever drains waits for nobody any more.
                self._changed.notify_all()

    def _count_others(self) -> None:
        """Who asks beside a batch, before any of it is told: whoever comes back at once is of it, and one."""
        with self._changed:
            if self._others is None:
                self._others = len(self._queue) + self._decoding

    def _patience_after(self, seconds: float) -> float:
        # Zero where somebody said that nobody is waited for.
        return self.pace.delay and max(self.pace.delay, SHARE * seconds)

    def _is_enough(self, count: int) -> bool:
        return len(self._queue) >= min(count, self.pace.batch) or self._closed

    def _still_wanted(self, asked: _Asked, now: float) -> bool:
        wanted = asked.future.set_running_or_notify_cancel()
        if wanted and asked.deadline > now:
            return True
        self.counts.add(expired=1)
        if wanted:
            late = BusyError("nobody came to answer in time", fix="ask again later")
            asked.future.set_exception(late)
        return False

    def _answer_safely(self, batch: list[_Asked], live: Live) -> None:
        """Answer a batch; where it fails, each of its inputs alone, so that one fails for no other."""
        try:
            self._answer(batch, live)
        except Exception as error:  # noqa: BLE001 (whoever asked is told, and the thread goes on)
            if len(batch) == 1:
                self._count_others()
                self.counts.add(failed=1)
                _set_error(batch[0], error)
                return
            for each in batch:
                self._answer_safely([each], live)

    def _answer(self, batch: list[_Asked], live: Live) -> None:
        predictor = live.predictor
        unique = {each.digest: each for each in batch}
        rows = {d: self.cache.get(d) or each.row or Row() for d, each in unique.items()}
        for each in batch:
            each.row = rows[each.digest]
        # By question and not by input: of one input one task may be known and another not.
        known = {each for each in batch if each.is_known()}
        asked = dict.fromkeys(task for each in batch for task in each.tasks)
        alone = [task for task in asked if task in predictor.multi.alone_names]
        shared = [task for task in asked if task not in alone]
        sharing = {e.digest for e in batch if e.shares()}
        with torch.inference_mode():
            start = time.perf_counter()
            self._run_shared(live, unique, {d: rows[d] for d in rows if d in sharing})
            for task in alone:
                wanted = {e.digest for e in batch if task in e.tasks}
                self._run_alone(live, task, unique, {d: rows[d] for d in rows if d in wanted})
            middle = time.perf_counter()
            self.cache.put(rows)
            places: dict[str, dict[str, int]] = {}
            logits: dict[str, Tensor] = {}
            if sharing:
                order = [d for d in rows if d in sharing]
                features = join_rows(
                    [rows[d] for d in order], live.keep.taps, predictor.host.readout
                )
                logits = predictor.multi.read(features, shared)
                places = {task: {d: i for i, d in enumerate(order)} for task in shared}
            for task in alone:
                order = [d for d in rows if (task, live.versions[task]) in rows[d].alone]
                each = [rows[d].alone[task, live.versions[task]] for d in order]
                logits[task] = torch.nn.utils.rnn.pad_sequence(each, True)
                places[task] = {d: i for i, d in enumerate(order)}
            chances = predictor.chances(logits)
            end = time.perf_counter()
        seconds = {"forward": middle - start, "tasks": end - middle}

        def reply(each: _Asked) -> Reply:
            row = rows[each.digest]
            mine = {task: _row_of(chances[task], places[task][each.digest]) for task in each.tasks}
            return Reply(
                predictor.answer(each.given, mine, 0, row.words, row.place),
                *live.tell(each.tasks),
                each in known,
                {"decode": each.decoded, "wait": each.waited, **seconds},
                row.tokens,
                self._embedding(live, row) if each.embed else None,
                tuple(row.words or ()),
            )

        said: list[Reply | Exception] = []
        for each in batch:
            try:
                said.append(reply(each))
            except Exception as error:  # noqa: BLE001 (whoever asked is told, and others are answered)
                said.append(error)
        right = [each for each, what in zip(batch, said, strict=True) if isinstance(what, Reply)]
        no_number = [what.where for what in said if isinstance(what, AnswerError)]
        # Before anybody is told: who reads the counts after an answer finds it there.
        self.counts.add(
            inputs=len(right),
            failed=len(batch) - len(right),
            no_number=no_number,
            batches={len(unique): 1},
            hits=sum(each in known for each in right),
            misses=sum(each not in known for each in right),
            answers=_count(right),
            seconds={
                "decode": sum(each.decoded for each in batch),
                "wait": sum(each.waited for each in batch),
                **seconds,
            },
        )
        self._count_others()
        for each, what in zip(batch, said, strict=True):
            if isinstance(what, Reply):
                each.future.set_result(what)
            else:
                _set_error(each, what)

    def _run_shared(
        self, live: Live, unique: Mapping[str, _Asked], rows: Mapping[str, Row]
    ) -> None:
        """The forward that most tasks share, for inputs whose features are not here."""
        keep = live.keep
        missing = [digest for digest, row in rows.items() if not row.holds(keep)]
        if not missing:
            return
        args, kwargs, words, tokens = self._make_batch([unique[digest] for digest in missing])
        features = live.predictor.host.features(*args, keep=keep, **kwargs)
        self.counts.add(forwards=1)
        for number, (digest, made) in enumerate(
            zip(missing, split_rows(features, keep), strict=True)
        ):
            row = rows[digest]
            for name, value in made.items():
                setattr(row, name, value)
            row.words, row.tokens = words[number], tokens[number]
            row.place = unique[digest].place

    def _run_alone(
        self, live: Live, task: str, unique: Mapping[str, _Asked], rows: Mapping[str, Row]
    ) -> None:
        """The forward of a task with tuners inside the backbone, for inputs that it was not asked about."""
        key = task, live.versions[task]
        missing = [digest for digest, row in rows.items() if key not in row.alone]
        if not missing:
            return
        args, kwargs, words, tokens = self._make_batch([unique[digest] for digest in missing])
        logits = live.predictor.multi.run_alone(task, *args, **kwargs)
        self.counts.add(forwards=1)
        for number, digest in enumerate(missing):
            row = rows[digest]
            row.words, row.tokens = words[number], tokens[number]
            row.place = unique[digest].place
            # `n c` of words: without padding, so that other batches can be made of it.
            real = logits[number] if logits.dim() != 3 else logits[number, : tokens[number]]
            # Of a task that was replaced nobody asks again.
            row.alone = {k: v for k, v in row.alone.items() if k[0] != task}
            row.alone[key] = real.clone()

    def _make_batch(self, asked: Sequence[_Asked]) -> tuple[Any, Any, list[Any], list[int]]:
        """Inputs as the backbone takes them, with the places of words and the number of tokens of each."""
        if self._decodes:
            for each in asked:
                if each.ready is None:
                    # It was known when it came, and is no more.
                    self._decode(each)
            batch = self.inputs.batch([each.ready for each in asked])
        else:
            batch = self.inputs.batch([each.given for each in asked])
        device = self.live.predictor.host.device
        kwargs = {name: value.to(device) for name, value in batch.kwargs.items()}
        # Of sounds it counts samples.
        mask = None if self._decodes else kwargs.get("attention_mask")
        tokens = [0] * len(asked) if mask is None else [int(n) for n in mask.sum(1).tolist()]
        words = batch.words if batch.words is not None else [None] * len(asked)
        return tuple(x.to(device) for x in batch.args), kwargs, list(words), tokens

    def _embedding(self, live: Live, row: Row) -> Tensor:
        feature = row.taps[self._feature_name(live, row)][0].float().cpu()
        if not feature.isfinite().all():
            raise AnswerError(
                "the backbone's own feature is no number",
                where=live.predictor.backbone.name,
                found="NaN or infinite: what it computes of this input overflows",
                fix="ask about another input, or serve the backbone in single precision",
            )
        return feature

    def _feature_name(self, live: Live, row: Row) -> str:
        pool = live.predictor.host.readout_rule.pool
        name = f"{FEATURE}/{pool}"
        if pool == "own":
            if live.keep.tokens != "pool":
                raise EngineError(
                    "the backbone's own feature is not kept beside these tasks",
                    found="they read tokens of it",
                    fix="ask a server whose tasks read pooled vectors",
                )
            last = ("last", live.predictor.host.sites.taps[-1])
            name = next((n for n in last if n in row.taps), "")
            if not name:
                raise EngineError(
                    "the backbone's own feature is not kept beside these tasks",
                    found=f"they read {', '.join(row.taps)}"[:200],
                    fix="ask a server of a task that reads the last tap as well",
                )
        elif name not in live.keep.taps:
            raise EngineError(
                "the engine does not give all that the backbone's own feature is made of",
                where=live.predictor.backbone.name,
                found=f"no {name} can be made of its taps",
                fix="export it again with --tokens all",
            )
        return name

    def drain(self, seconds: float) -> bool:
        """Take no more questions, and wait for the answers to those that are here.

        Args:
            seconds: To wait at most.

        Returns:
            Whether all were answered.
        """
        end = time.monotonic() + seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self.held, seconds)
        self._decoders.shutdown(wait=False)
        if done and current_thread() is not self._thread:
            # It has nothing to do any more, but what it held last is freed by it.
            self._thread.join(max(0.0, end - time.monotonic()))
        return done


@atexit.register
def _end_threads() -> None:
    # A thread that runs the backbone while the interpreter ends is stopped inside of it, and the whole process
    # aborts: whoever never drained is drained here.
    end = time.monotonic() + AT_EXIT
    for batcher in list(_RUNNING):
        batcher.drain(max(0.0, end - time.monotonic()))


def _row_of(chances: tuple[Tensor, Tensor], row: int) -> tuple[Tensor, Tensor]:
    values, best = chances
    return values[row : row + 1], best[row : row + 1]


def _set_error(asked: _Asked, error: BaseException) -> None:
    # Whoever asked may have given up a moment before.
    with suppress(InvalidStateError):
        asked.future.set_exception(error)


def _count(batch: Sequence[_Asked]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for each in batch:
        for task in each.tasks:
            counted[task] = counted.get(task, 0) + 1
    return counted

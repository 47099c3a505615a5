"""`restuning.update`: examples added to a task that is solved in closed form, or taken out, without its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from restuning._errors import DataError, FormatError, TrainingError
from restuning._files import differences, hold_folder
from restuning.backbones import Backbone, preprocessing_from_dict
from restuning.bypass import Ridge, from_spec
from restuning.bypass.sums import keys_of
from restuning.data import Data, DataOptions, say_left_out
from restuning.data.labelled import Labelled, load_labelled
from restuning.data.labels import warn_of_look_alikes
from restuning.problems import SingleLabel
from restuning.serve import Predictor
from restuning.serve.inputs import TextInputs
from restuning.task import Task, Tuned, describe, find_task, save
from restuning.training.batch import move
from restuning.training.prepare import refuse_changing
from restuning.training.run import Log, silent
from restuning.training.sums_file import (
    KeptSums,
    describe_sums,
    read_sums,
    remove_other_sums,
    write_sums,
)
from restuning.training.together import alone

NAMED = 3
"""Of several examples, named in a message."""


@dataclass(frozen=True)
class Update:
    """What an update changed.

    Attributes:
        folder: Of the task.
        task: As it is now, in eval mode.
        rows: Examples that it is solved from, before and now.
        classes: Their number, before and now.
        accuracy: Share of right answers to kept rows that are left out, before and now.
        skipped: Examples that were given and in already.
        new_classes, gone_classes: Names of classes that came, and of those whose last example went.
    """

    folder: Path
    task: Task = field(repr=False)
    rows: tuple[int, int]
    classes: tuple[int, int]
    accuracy: tuple[float, float]
    skipped: int = 0
    new_classes: tuple[str, ...] = ()
    gone_classes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows, classes, accuracy = self.rows, self.classes, self.accuracy
        return {
            "task": str(self.folder),
            "rows": {"before": rows[0], "now": rows[1]},
            "classes": {"before": classes[0], "now": classes[1]},
            "left-out accuracy": {"before": accuracy[0], "now": accuracy[1]},
            "skipped": self.skipped,
            "new classes": list(self.new_classes),
            "gone classes": list(self.gone_classes),
        }


@alone()
def update(
    task: str | Path,
    data: str | Path | Data,
    *,
    remove: bool = False,
    backbone: str | Backbone | None = None,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 256,
    text: str = "text",
    image: str | None = None,
    audio: str | None = None,
    label: str = "label",
    skip_bad: bool = False,
    log: Log = silent,
) -> Update:
    """Add labelled examples to a task of method `ridge`, or take examples out, by one pass over these alone.

    The task is then what solving anew on all that is in would give, with penalty, scale and weights of blocks chosen
    again: of features that are equal the same to rounding. A class that has no example yet is appended; one whose
    last example goes, goes. Beyond the rows that are held (`bypass.sums.Sums`) an update that takes out leaves fewer kept
    rows to choose on than solving anew would have.

    The task and its sums are exchanged together: killed at any moment, the old ones are whole or the new ones.

    Args:
        task: Its folder, or that of its run, with the sums that `train` left beside it.
        data: What is added or taken out: a folder with a folder for each class (one is enough), a csv file; of data with
            splits the training split. Examples are known by their contents: files by their bytes.
        remove: Take them out.
        backbone, weights, device: As for `Predictor.load`; by default those that the task names.
        batch_size: Inputs of one forward.
        text, image, audio, label: Columns of a csv or a table.
        skip_bad: Leave corrupt images out.
        log: Receives a line for what is left out or skipped.

    Raises:
        FormatError: No task, one of another method, or its sums are not there, damaged or not its own.
        WrongBackboneError: The backbone is another.
        DataError: An example is in under another class, or is to be taken out and not in; a class is not known; inputs are
            prepared in another way; fewer than two classes would be left.
        TrainingError: The sums cannot be written, or another process works in the folder.

    Cost: a backbone forward of each new example (none where rows that are held are taken out), and the solution.
    """
    folder = find_task(task)
    _refuse_other_methods(folder)
    with hold_folder(folder.parent):
        opened = Predictor.load(folder, backbone=backbone, weights=weights, device=device)
        (before,) = opened.tasks.values()
        said = describe(folder)["preprocessing"]
        kept = read_sums(folder, before)
        _refuse_other_rows(kept, before, opened, said, folder)
        if (stored := kept.about.get("stored")) not in (None, ["fp32", "fp32"]):
            log(
                f"rows of before were stored as {' from '.join(stored)}; these are computed in fp32"
            )
        given = _load(
            data,
            opened,
            said,
            DataOptions(skip_bad=skip_bad, text=text, label=label, image=image, audio=audio),
        )
        if given.left_out:
            log(f"left out: {say_left_out(given.left_out)}")
        change = _Change(kept, before, given, log)
        result = change.remove(opened, batch_size) if remove else change.add(opened, batch_size)
        if result is None:
            rows, classes = kept.sums.count, len(change.names)
            accuracy = float(kept.about["accuracy"])
            same = (rows, rows), (classes, classes), (accuracy, accuracy)
            return Update(folder, before, *same, change.skipped)
        now, new = result
        # Under its own name first: until the task is exchanged, the old one has its own.
        write_sums(folder, now, new)
        save(
            now,
            opened.host,
            folder,
            backbone=opened.backbone.name,
            weights=opened.backbone.weights_file,
            preprocessing=said,
            results={
                "left-out accuracy": new.about["accuracy"],
                "examples": new.sums.count,
                "updates": new.about["updates"],
            },
        )
        remove_other_sums(folder, now)
        old_names, names = list(before.labels or ()), list(now.labels or ())
        return Update(
            folder,
            now,
            (len(kept.inputs), new.sums.count),
            (len(old_names), len(names)),
            (float(kept.about["accuracy"]), float(new.about["accuracy"])),
            change.skipped,
            tuple(n for n in names if n not in old_names),
            tuple(n for n in old_names if n not in names),
        )


class _Change:
    """Examples that are given for a task, compared with those that are in.

    Args:
        kept: The sums of the task; they are changed in place.
        task: The task before.
        given: The examples.
        log: Receives what is skipped.
    """

    def __init__(self, kept: KeptSums, task: Task, given: Labelled, log: Log) -> None:
        self.kept, self.task, self.given, self.log = kept, task, given, log
        self.names = list(task.labels or ())
        self.skipped = 0

    def add(self, opened: Predictor, batch_size: int) -> tuple[Task, KeptSums] | None:
        """The task and its sums with the examples; None where all of them are in already."""
        given = self.given
        new = [name for name in given.names if name not in self.names]
        names = self.names + new
        there = dict(zip(self.kept.inputs, self.kept.labels, strict=True))
        before = set(there)
        take: list[int] = []
        skipped: list[int] = []
        other: list[str] = []
        twice: list[str] = []
        for n, (digest, label) in enumerate(zip(given.inputs, given.labels, strict=True)):
            number = names.index(given.names[label])
            if digest not in there:
                there[digest] = number
                take.append(n)
            elif there[digest] == number:
                skipped.append(n)
            elif digest not in before:
                twice.append(f"{given.shown(n)} as {names[number]} and as {names[there[digest]]}")
            else:
                other.append(f"{given.shown(n)} as {names[number]}, in as {names[there[digest]]}")
        if other:
            raise DataError(
                "examples are in already under another class",
                found=f"{len(other)}: {'; '.join(other[:NAMED])}",
                fix="take them out first, as what they are in as: `restuning update TASK DATA --remove`",
            )
        if twice:
            raise DataError(
                "examples are given twice, under two classes",
                found=f"{len(twice)}: {'; '.join(twice[:NAMED])}",
                fix="leave each in the class that it is of",
            )
        self._tell_skipped(skipped)
        if not take:
            return None
        used = {given.names[given.labels[n]] for n in take}
        names = self.names + [name for name in new if name in used]
        warn_of_look_alikes(names, "the classes of the task and of the new examples")
        if new:
            self.log(f"new classes: {', '.join(n for n in new if n in used)}")
        sums = self.kept.sums
        sums.set_classes([*range(sums.classes), *[None] * (len(names) - sums.classes)])
        labels = [names.index(given.names[given.labels[n]]) for n in take]
        digests = [given.inputs[n] for n in take]
        for rows, at in _read(opened, self.task, given, take, batch_size):
            sums.add(rows, torch.tensor(labels[at]), keys_of(digests[at]))
        return self._solve(names, [*self.kept.inputs, *digests], [*self.kept.labels, *labels])

    def remove(self, opened: Predictor, batch_size: int) -> tuple[Task, KeptSums] | None:
        """The task and its sums without the examples."""
        given, sums = self.given, self.kept.sums
        unknown = [name for name in given.names if name not in self.names]
        if unknown:
            raise DataError(
                "examples of a class that the task does not have cannot be taken out",
                found=", ".join(unknown[:NAMED]),
                fix=f"its classes are {', '.join(self.names[:10])}",
            )
        places: dict[tuple[bytes, int], list[int]] = {}
        for n, entry in enumerate(zip(self.kept.inputs, self.kept.labels, strict=True)):
            places.setdefault(entry, []).append(n)
        labels = [self.names.index(given.names[label]) for label in given.labels]
        gone: set[int] = set()
        missing = []
        for n, entry in enumerate(zip(given.inputs, labels, strict=True)):
            free = places.get(entry)
            if free:
                gone.add(free.pop())
            else:
                missing.append(f"{given.shown(n)} as {self.names[labels[n]]}")
        if missing:
            raise DataError(
                "examples that are to be taken out are not in",
                found=f"{len(missing)} of {len(labels)}: {'; '.join(missing[:NAMED])}",
                fix="give what was trained on or added, unchanged and in its class; of a folder without splits "
                "`train` read seven tenths",
            )
        if not gone:
            return None
        everyone = list(range(len(labels)))
        if sums.products is None:
            # They are held: nothing has to be computed again.
            rows = torch.zeros(len(labels), sums.width, dtype=sums.dtype)
            sums.remove(rows, torch.tensor(labels), keys_of(given.inputs))
        else:
            for rows, at in _read(opened, self.task, given, everyone, batch_size):
                sums.remove(rows, torch.tensor(labels[at]), keys_of(given.inputs[at]))
        empty = {n for n in set(labels) if not int(sums.counts[n])}
        order = [n for n in range(sums.classes) if n not in empty]
        if len(order) < 2:
            raise DataError(
                "a classification needs two classes",
                found=f"{len(order)} would be left",
                fix="take fewer examples out, or add others first",
            )
        if empty:
            self.log(f"classes without examples now: {', '.join(self.names[n] for n in empty)}")
        sums.set_classes(order)
        stays = [n for n in range(len(self.kept.inputs)) if n not in gone]
        return self._solve(
            [self.names[n] for n in order],
            [self.kept.inputs[n] for n in stays],
            [order.index(self.kept.labels[n]) for n in stays],
        )

    def _tell_skipped(self, skipped: Sequence[int]) -> None:
        self.skipped = len(skipped)
        if skipped:
            named = ", ".join(self.given.shown(n) for n in skipped[:NAMED])
            more = " ..." if len(skipped) > NAMED else ""
            self.log(f"skipped, in already or given twice: {len(skipped)} examples ({named}{more})")

    def _solve(
        self, names: list[str], inputs: Sequence[bytes], labels: Sequence[int]
    ) -> tuple[Task, KeptSums]:
        old = self.task
        assert isinstance(old.side, Ridge)
        side = from_spec({**old.side.spec(), "classes": len(names)})
        assert isinstance(side, Ridge)
        solution = side.to(old.side.weight.device).solve_sums(self.kept.sums)
        head = side.widen(nn.Linear(1, len(names)))
        now = Task(side=side, head=head, pool=old.pool, method=old.method, labels=names)
        about = {
            **describe_sums(now, self.kept.about["backbone"], self.kept.about["preprocessing"]),
            "accuracy": solution.accuracy,
            "updates": int(self.kept.about["updates"]) + 1,
            "stored": self.kept.about.get("stored"),
        }
        now = now.to(old.side.weight.device).eval()
        return now, KeptSums(self.kept.sums, inputs, labels, about)


@torch.no_grad()
def _read(
    opened: Predictor, task: Task, given: Labelled, take: Sequence[int], batch_size: int
) -> Any:
    """Rows of some examples, `b f`, and the slice of `take` that they are of."""
    side, tuned = task.side, Tuned(opened.host, task).eval()
    assert isinstance(side, Ridge)
    collate = given.collate or default_collate
    for start in range(0, len(take), batch_size):
        at = slice(start, min(start + batch_size, len(take)))
        inputs, labels = collate([given.examples[n] for n in take[at]])
        inputs, _ = move(inputs, labels, opened.host.device)
        taps = tuned.taps(**inputs) if isinstance(inputs, dict) else tuned.taps(inputs)
        yield side.inputs(taps), at


def _refuse_other_methods(folder: Path) -> None:
    """Refuse a task that no sums say anything about, before its backbone is opened."""
    described = describe(folder)["task"]
    side = described.get("side") or {}
    if side.get("kind") != Ridge.kind:
        raise FormatError(
            "only a task that is solved in closed form, with one class an input, can be updated",
            where=str(folder),
            found=f"method {described.get('method')}, problem "
            f"{(described.get('problem') or {}).get('kind', 'single-label')}",
            fix="train one with --method ridge, or train this one anew on all its data",
        )


def _refuse_other_rows(
    kept: KeptSums, task: Task, opened: Predictor, said: dict[str, Any], folder: Path
) -> None:
    """Refuse sums of rows that this task, backbone and preprocessing would not make."""
    ours = describe_sums(task, opened.host.digest(), said)
    told = differences({name: kept.about.get(name) for name in ours}, ours)
    if told:
        raise FormatError(
            "the sums beside a task are of other rows",
            where=str(folder),
            found="; ".join(told)[:1000],
            fix="train the task again",
        )
    if not task.solved:
        raise TrainingError(
            "a task whose head was trained on its answers cannot be updated",
            where=str(folder),
            fix="train it again: its head is left as it is now",
        )


def _load(
    data: str | Path | Data, opened: Predictor, said: dict[str, Any], options: DataOptions
) -> Labelled:
    """The examples, prepared as those of the task were."""
    backbone, inputs = opened.backbone, opened.inputs
    if isinstance(inputs, TextInputs):
        # As many tokens as the task was trained on.
        options = replace(options, max_tokens=inputs.collate.longest)
        if inputs.collate.table:
            # Read as it was then.
            options = replace(options, problem=SingleLabel.kind)
    elif said:
        backbone = replace(backbone, preprocessing=preprocessing_from_dict(said))
    given = load_labelled(data if isinstance(data, Data) else str(data), backbone, options)
    theirs = given.notes.get("preprocessing")
    if theirs is not None and dict(theirs) != dict(said):
        raise DataError(
            "these examples are prepared in another way than the task's",
            found="; ".join(differences(said, theirs))[:500],
            fix="give the name or path of the data",
        )
    if isinstance(data, Data) and data.kind in ("image", "audio"):
        # A path is read plainly; of images that are loaded only looking twice tells.
        refuse_changing(given.examples, Ridge.kind)
    if not len(given.labels):
        raise DataError("there is nothing to update with", found="no examples", fix="give some")
    return given

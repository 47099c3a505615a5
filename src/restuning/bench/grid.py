"""What a grid consists of: entries, settings to choose from, runs, and one protocol for all."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from restuning._errors import TrainingError
from restuning.bench.suites import SuiteTask
from restuning.search import AUTO
from restuning.search.sweep import RATES, parse_grid
from restuning.training import FitSettings

Setting = tuple[tuple[str, Any], ...]
Stage = Literal["search", "final"]

EVERY = ""
"""Key in `Choices` of the settings for methods that have none of their own."""

Choices = Mapping[str, Mapping[str, Sequence[Any]]]
"""Values to choose from by key, by label of the entry; see `EVERY`."""


@dataclass(frozen=True)
class Entry:
    """A method with options, as it stands in tables.

    Attributes:
        label: In tables and paths.
        method: A name of `methods` or of `bench.rivals`.
        options: Of the method.
    """

    label: str
    method: str
    options: Setting = ()


@dataclass(frozen=True)
class GridRun:
    """One training and its test.

    Attributes:
        task: Trained on.
        entry: How.
        stage: "search": trained on the training split, tested on validation. "final": trained on
            both with the setting chosen, tested once on test.
        setting: Of a search; a final run's follows from the searches before it.
        seed: Start weights, order of examples.
    """

    task: SuiteTask
    entry: Entry
    stage: Stage
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """The run's own part of a path below the grid's folder."""
        parts = [self.stage, *(f"{k}={v}" for k, v in self.setting), f"seed={self.seed}"]
        return f"{self.task.name}/{slug(self.entry.label)}/{slug('.'.join(parts))}"

    def __str__(self) -> str:
        """The run in words, as progress shows it."""
        words = ", ".join(f"{k}={v}" for k, v in self.setting)
        what = f"seed {self.seed}" if self.stage == "final" else f"choosing: {words}"
        return f"{self.task.name}  {self.entry.label}  {what}"


@dataclass(frozen=True)
class GridProtocol:
    """What all runs of one folder share, so that its numbers may stand in one table.

    Attributes:
        backbone: By name, with a size where that is not its own: `timm:vit_tiny_patch16_224@160`.
        weights: File of weights, or None.
        settings: Of training, but for what is chosen; the seed is each run's own.
        choices: What is chosen on validation.
        cache: Train from stored features where that is exact.
        dtype: Of stored features.
        named_in: The file that names the backbone, where the user does not: such a name fetches
            nothing and executes nothing.
    """

    backbone: str
    weights: str | None = None
    settings: FitSettings = field(default_factory=FitSettings)
    choices: Choices = field(default_factory=dict)
    cache: bool = True
    dtype: str = "fp32"
    named_in: str | None = None

    def settings_for(self, setting: Setting, seed: int) -> FitSettings:
        """The training settings of one run: the grid's, with its setting and seed put in."""
        # Short names of the command line (`lr`) to names of `FitSettings`.
        rates = {RATES[k]: v for k, v in setting if k in RATES}
        return replace(self.settings, **rates, seed=seed)

    def options_for(self, entry: Entry, setting: Setting) -> dict[str, Any]:
        """The options of an entry's method under a setting."""
        return {**dict(entry.options), **{k: v for k, v in setting if k not in RATES}}

    def candidates(self, entry: Entry) -> list[Setting]:
        """All settings an entry may choose from; a single one where there is nothing to choose."""
        if entry.method == AUTO:
            return [self._refuse_choices(entry)]
        # Those of its own go before those of all; an option that is fixed is no choice.
        values = {**self.choices.get(EVERY, {}), **self.choices.get(entry.label, {})}
        open_values = {k: v for k, v in values.items() if k not in dict(entry.options)}
        return [
            tuple(zip(open_values, v, strict=True))
            for v in itertools.product(*open_values.values())
        ]

    def _refuse_choices(self, entry: Entry) -> Setting:
        """The empty setting of `auto`, which makes its choice inside every run."""
        if own := self.choices.get(entry.label):
            raise TrainingError(
                "auto chooses its settings itself",
                where=f"--set {entry.label}:{', '.join(own)}=...",
                fix="leave it out; values that are for all methods do not reach auto",
            )
        return ()

    def identity(self) -> dict[str, Any]:
        """What must agree between all runs of a folder, as JSON."""
        settings = self.settings.identity()
        # A grid has many; each result tells its own.
        del settings["seed"]
        # A grid may be moved to a machine where the file lies elsewhere.
        weights = Path(self.weights).name if self.weights else None
        said = {**asdict(self), "weights": weights, "settings": settings, "choices": None}
        del said["named_in"]
        return said


def search_runs(protocol: GridProtocol, task: SuiteTask, entry: Entry) -> list[GridRun]:
    """The runs that choose a setting: none where there is nothing to choose, else one seed each."""
    settings = protocol.candidates(entry)
    if len(settings) == 1:
        return []
    # One seed: a search tells good settings from bad ones, a final run how good.
    return [GridRun(task, entry, "search", setting, protocol.settings.seed) for setting in settings]


def list_runs(
    protocol: GridProtocol, tasks: Sequence[SuiteTask], entries: Sequence[Entry], seeds: int
) -> list[GridRun]:
    """All runs in the order they are taken up: a task's together, its searches before its finals.

    Within a task seeds go round the entries, so that a grid stopped early compares all of them.

    Args:
        protocol: Of the grid.
        tasks: Rows.
        entries: Columns.
        seeds: 0, 1, ... of the final runs.
    """
    labels = [entry.label for entry in entries]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice or seeds < 1:
        raise TrainingError(
            "a grid needs a seed, and every entry once",
            found=", ".join(twice) or f"{seeds} seeds",
            fix="give each method once, and --seeds 1 or more",
        )
    runs: list[GridRun] = []
    for task in tasks:
        for entry in entries:
            runs += search_runs(protocol, task, entry)
        # The loop over entries is the inner one: what there is of seed 0 can be compared soon.
        runs += [
            GridRun(task, entry, "final", (), seed) for seed in range(seeds) for entry in entries
        ]
    return runs


def parse_entry(text: str) -> Entry:
    """`lora`, `res-tuning:rank=4:layers=1-6`, or `LABEL=...` before it: `half=res-tuning:layers=1-6`.

    Raises:
        TrainingError: It does not read so.
    """
    head, *pairs = text.strip().split(":")
    named = re.fullmatch(r"([^=\[\]]+)=(.+)", head)
    method = named[2] if named else head
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value or key in options:
            raise TrainingError(
                "not a method with options",
                where=text,
                found=pair or "nothing after a colon",
                fix="write METHOD:option=value:option=value, e.g. res-tuning:rank=4",
            )
        # `layers=3` is a list of one layer, as `layers=1-6` is one of six.
        parsed = _value(value)
        options[key] = [parsed] if key == "layers" and isinstance(parsed, int) else parsed
    if not method:
        raise TrainingError("a method has no name", where=text, fix="write e.g. res-tuning")
    return Entry(named[1] if named else text.strip(), method, tuple(options.items()))


def parse_entries(text: str) -> list[Entry]:
    """Entries with commas between them; commas in brackets belong to a method's name."""
    # `res-tuning[mha=prompt,ffn=adapter]` is one entry.
    return [parse_entry(part) for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def parse_choices(texts: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """`lr=1e-3,5e-3` for all entries, `full:lr=1e-4,3e-4` for one.

    Raises:
        TrainingError: It does not read so.
    """
    choices: dict[str, dict[str, list[Any]]] = {}
    for text in texts:
        label, colon, values = text.rpartition(":")
        before, _, _ = text.partition("=")
        # A colon behind the first `=` belongs to a value.
        if not colon or ":" not in before:
            label, values = EVERY, text
        choices.setdefault(label, {}).update(parse_grid(values))
    return choices


def _value(text: str) -> Any:
    """Numbers, true and false, layers as `1-6` or `1+3+5` (or in words, see `layer_numbers`), else words."""
    if re.fullmatch(r"\d+-\d+", text):
        first, last = map(int, text.split("-"))
        return list(range(first, last + 1))
    if re.fullmatch(r"\d+(\+\d+)+", text):
        return [int(n) for n in text.split("+")]
    try:
        # Python writes them with a capital.
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def layer_numbers(words: Any, layers: int) -> Any:
    """`first-3`, `last-1/2` (a share of them) and `every-2` as numbers of layers from 1.

    Args:
        words: As they were written; what is not of this form is returned as it is.
        layers: Of the backbone.
    """
    match = re.fullmatch(r"(first|last|every)-(\d+)(?:/(\d+))?", str(words))
    if match is None:
        return words
    number, share = int(match[2]), match[3]
    if share:
        number = max(1, round(layers * number / int(share)))
    if number < 1 or number > layers:
        raise TrainingError(
            "no such layers",
            where=str(words),
            found=f"{layers} layers",
            fix="give first-3, last-1/2 or every-2",
        )
    numbers = list(range(1, layers + 1))
    if match[1] == "first":
        return numbers[:number]
    return numbers[-number:] if match[1] == "last" else numbers[number - 1 :: number]


def slug(text: str) -> str:
    """A name that may stand in a path; a digest keeps apart what characters no longer do."""
    clean = re.sub(r"[^\w.=+-]+", "-", text).strip("-.") or "x"
    if clean == text and len(clean) <= 80:
        return clean
    return f"{clean[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"

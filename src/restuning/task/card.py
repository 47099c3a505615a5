"""The card of a task, `README.md`: a head of YAML that hubs index, what it is, and the lines that open it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from restuning._files import expand_home
from restuning.problems import Problem
from restuning.task.hub import LIBRARY
from restuning.task.task import Task

LARGEST_HEAD = 2**18
"""Characters of YAML that are read."""

PICTURE = "curves.png"
"""The curves of a run, beside a task that is pushed."""

SPLITS = ("test", "validation")
"""First words of figures that were measured on a split."""

OF_TASK = (
    "pipeline_tag",
    "tags",
    "base_model",
    "base_model_relation",
    "datasets",
    "model-index",
)
"""What a head says of its task: true of that one, and of no other that takes its place."""

_HEAD = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|$)", re.DOTALL)
_INDEX = "<!-- a line for each task, written by `restuning push` -->"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+|[\w-][\w.-]*", re.ASCII)
_LOCAL = re.compile(r'(restuning\.(?:Predictor\.)?load\()"(?:[^"\\\n]|\\.)*"')


def write_card(
    name: str,
    task: Task,
    backbone: str,
    preprocessing: Mapping[str, Any],
    results: Mapping[str, Any],
    data: str = "",
) -> str:
    """The card of a task as it is saved.

    Args:
        name: Of its folder.
        task: The task.
        backbone: Its name for `load_backbone`; "" where that is not known.
        preprocessing: As stored in `task.json`; it tells images from texts.
        results: Figures by name; a share whose name ends in "accuracy" is written as percent, and None is left
            out. Those that begin with `test` or `validation` go into the hub's `model-index`, where data are named.
        data: What it was trained on: `hf:NAME`, or a word.
    """
    # What was not measured (an accuracy without a test split) has no line.
    known = {figure: value for figure, value in results.items() if value is not None}
    figures = "".join(f"| {n} | {_write_figure(n, v)} |\n" for n, v in known.items())
    drawn = backbone.startswith("diffusers:")
    use = (_IMAGE_USE if drawn else _USE).format(
        backbone=backbone.removeprefix("diffusers:"),
        name=name,
        prints="[(word.input, word.label) for word in answer.words]"
        if preprocessing.get("kind") == "tags"
        else task.problem.prints,
    )
    tag = "text-to-image" if drawn else _pipeline_tag(task.problem, preprocessing)
    head = _write_head(name, task, _base_model(backbone), tag, known, data)
    return f"""{head}# {name}

A task of method `{task.method}` for the backbone `{backbone or "unknown"}`:
{task.tuner_parameters():,} parameters without the head, {task.trainable_parameters():,} with it.

```python
{use}```
{f"{chr(10)}| figure | value |{chr(10)}|---|---|{chr(10)}{figures}" if figures else ""}"""


def card_for_hub(
    card: str,
    name: str,
    *,
    before: str = "",
    license: str | None = None,  # noqa: A002 (the hub's word)
    picture: bool = False,
) -> str:
    """A card as it stands on a hub: its lines open the task from there.

    Args:
        card: The card of the folder.
        name: `user/repository[/task]`.
        before: The card that is there; what its head says and this one does not (a licence) stays, but for what it says of
            the task that was there (`OF_TASK`).
        license: By the hub's identifier, `apache-2.0`.
        picture: Whether the curves of the run lie beside it.
    """
    head, text = split_card(card)
    there, _ = split_card(before)
    head = {**{key: value for key, value in there.items() if key not in OF_TASK}, **head}
    head |= {"library_name": LIBRARY, **({"license": license} if license else {})}
    # The first, which is ours: what its author wrote below it may open other tasks.
    text = _LOCAL.sub(lambda found: f'{found[1]}"{name}"', text, count=1)
    link = f"![loss and figure, by epoch]({PICTURE})"
    if picture and link not in text:
        text = f"{text.rstrip()}\n\n{link}\n"
    return join_card(head, text)


def index_card(
    repository: str,
    tasks: Sequence[str],
    card: str,
    before: str,
    license: str | None,  # noqa: A002
) -> str:
    """The card of a repository that holds several tasks; "" where one is there that somebody wrote.

    Args:
        repository: `user/name`.
        tasks: All that it holds now.
        card: That of the task that is pushed, whose base model is named here as well.
        before: The card that is there.
        license: As for `card_for_hub`.
    """
    there, text = split_card(before)
    if text.strip() and _INDEX not in text:
        return ""
    head, _ = split_card(card)
    bases = [base for said in (there, head) for base in _as_list(said.get("base_model"))]
    made = {
        **there,
        "library_name": LIBRARY,
        "tags": list(dict.fromkeys([*_as_list(there.get("tags")), *_as_list(head.get("tags"))])),
        **({"license": license} if license else {}),
        **({"base_model": list(dict.fromkeys(bases))} if bases else {}),
        **({"base_model_relation": "adapter"} if bases else {}),
    }
    lines = "".join(f"| [{task}]({task}/README.md) | `{repository}/{task}` |\n" for task in tasks)
    names = ", ".join(f'"{repository}/{task}"' for task in tasks)
    return join_card(
        made,
        f"""# {repository.partition("/")[2]}

{_INDEX}

| task | name |
|---|---|
{lines}
```python
import restuning

# Tasks of one backbone answer from one forward.
predictor = restuning.Predictor.load([{names}])
```
""",
    )


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """The head of a card as values, and its text; a head that is none, or far too long, is empty."""
    found = _HEAD.match(card[:LARGEST_HEAD])
    if found is None:
        return {}, card
    try:
        head = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, card[found.end() :]
    return head if isinstance(head, dict) else {}, card[found.end() :]


def join_card(head: Mapping[str, Any], text: str) -> str:
    """A card of a head and a text."""
    said = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)
    return f"---\n{said}---\n{text}"


def _as_list(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [each for each in values if isinstance(each, str)]


def _write_head(
    name: str,
    task: Task,
    base: str,
    tag: str | None,
    results: Mapping[str, Any],
    data: str,
) -> str:
    title = name.removesuffix(".task")
    scheme, _, rest = data.partition(":")
    # A folder that is called like a data set of the hub is none.
    on_hub = scheme == "hf" and _HUB_ID.fullmatch(rest) and not expand_home(rest).exists()
    source = rest if on_hub else data if re.fullmatch(r"[\w.-]+", data) else ""
    metrics = [
        {"type": figure.replace(" ", "_"), "value": value, "name": f"{split} {figure}"}
        for split, figure, value in _measured(results)
    ]
    split = next((split for split, _, _ in _measured(results)), None)
    head: dict[str, Any] = {
        "library_name": LIBRARY,
        **({"pipeline_tag": tag} if tag else {}),
        "tags": ["res-tuning", "bypass" if task.side is not None else "inline", task.problem.kind],
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        **({"datasets": [source]} if on_hub else {}),
    }
    if metrics and source:
        result = {
            "task": {"type": tag or task.problem.kind},
            "dataset": {"name": source, "type": source, "split": split},
            "metrics": metrics,
        }
        head["model-index"] = [{"name": title, "results": [result]}]
    return join_card(head, "")


def _measured(results: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Figures of a split: the split, what was measured, and the value."""
    found = []
    for name, value in results.items():
        split, _, figure = name.partition(" ")
        if split in SPLITS and figure and type(value) in (int, float):
            found.append((split, figure, value))
    return found


def _pipeline_tag(problem: Problem, preprocessing: Mapping[str, Any]) -> str | None:
    """The hub's word for what is asked of what; None where it has none, or nothing says what inputs are."""
    if not preprocessing:
        return None
    # Texts and sounds say their kind; what images are made of has sizes.
    kinds = {"text": "text", "tags": "words", "audio": "audio"}
    kind = kinds.get(str(preprocessing.get("kind")), "image")
    return problem.pipeline_tags.get(kind)


def _write_figure(name: str, value: Any) -> str:
    """A figure as a reader takes it in: shares as percent, few digits, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name.endswith("accuracy"):
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


_USE = """import restuning

predictor = restuning.Predictor.load("{name}")
for answer in predictor(inputs):  # paths or images, or texts for a task on texts
    print({prints})
"""

_IMAGE_USE = """import restuning
from restuning.backbones.diffusion import load_text_to_image

parts = load_text_to_image("{backbone}")
args, kwargs = parts.example
host = restuning.Host(parts.denoiser, *args, **kwargs)
task = restuning.load("{name}", host)
with host.using(task):
    images = parts.pipeline("a prompt").images
"""


def _base_model(backbone: str) -> str:
    """The backbone's name on the hub; empty where it has none, for the hub refuses other names."""
    source, _, name = backbone.partition(":")
    if source in ("hf", "clip", "diffusers") and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return name
    # timm's repositories are named after architecture and weights.
    return f"timm/{name}" if source == "timm" and re.fullmatch(r"\w+\.\w+", name) else ""

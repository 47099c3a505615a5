"""What tasks and their answers are in JSON; the only place where one becomes the other."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from restuning._errors import DataError
from restuning.problems import (
    Choice,
    DepthAnswer,
    MaskAnswer,
    Number,
    NumbersAnswer,
    Prediction,
    TagsAnswer,
    VectorAnswer,
)
from restuning.serve.batcher import Reply
from restuning.serve.depths import Packed, pack, unpack
from restuning.serve.depths import to_png as depth_to_png
from restuning.serve.masks import find_colours, from_png, to_png
from restuning.serve.predictor import Answer
from restuning.serve.service import Entry
from restuning.task import find_origin

T = TypeVar("T")


def prediction_to_json(prediction: Any, top: int, every: bool = False) -> dict[str, Any]:
    """One answer of one task.

    Args:
        prediction: The answer: a class, several labels (`tags`), numbers, a vector, a mask as PNG in base64 (`mask`) with the
            share of each class (`shares`) and its colour there (`colours`), or a depth as PNG in base64 with its scale and a picture (`depth`); of a kind that another package defines what all answers have, a `label` and
            its own JSON as `answer`.
        top: Classes to tell, the most probable first.
        every: Tell the probabilities of all classes as well, in the order of the task's labels.
    """
    if isinstance(prediction, NumbersAnswer):
        return {"label": prediction.label, "numbers": prediction.to_json()}
    if isinstance(prediction, VectorAnswer):
        return {"label": prediction.label, "vector": prediction.vector.tolist()}
    if isinstance(prediction, MaskAnswer):
        png = base64.b64encode(to_png(prediction)).decode()
        return {
            "label": prediction.label,
            "shares": prediction.to_json(),
            "colours": find_colours(prediction),
            "mask": png,
        }
    if isinstance(prediction, DepthAnswer):
        pictures = {"png": pack(prediction).png, "picture": depth_to_png(prediction)}
        packed = {name: base64.b64encode(png).decode() for name, png in pictures.items()}
        return {"label": prediction.label, "depth": {**packed, **prediction.to_json()[0]}}
    if not isinstance(prediction, Prediction):
        return {"label": prediction.label, "answer": prediction.to_json(top)}
    made: dict[str, Any] = {
        "label": prediction.label,
        "probability": prediction.probability,
        "top": [choice._asdict() for choice in prediction.top(top)],
    }
    if isinstance(prediction, TagsAnswer):
        made["tags"] = [choice._asdict() for choice in prediction.tags]
    if every:
        made["probabilities"] = prediction.probabilities.tolist()
    return made


def prediction_from_json(
    said: Mapping[str, Any], labels: Sequence[str]
) -> Prediction | NumbersAnswer | MaskAnswer | DepthAnswer | VectorAnswer:
    """The prediction that `prediction_to_json` told with `every`, as it was but for its place in memory and the rounding of depths.

    Raises:
        DataError: It is of a kind that another package defines.
    """
    if "numbers" in said:
        return NumbersAnswer(tuple(Number(**each) for each in said["numbers"]))
    if "vector" in said:
        return VectorAnswer(torch.tensor(said["vector"]))
    if "mask" in said:
        return MaskAnswer(labels, drawn=from_png(base64.b64decode(said["mask"])))
    if "depth" in said:
        told = said["depth"]
        ends = (told[name] or 0.0 for name in ("least", "most"))
        drawn = unpack(Packed(base64.b64decode(told["png"]), *ends))
        return DepthAnswer(error=told["error"], drawn=drawn)
    if "answer" in said:
        raise _other_kind(said["label"], "POST to /v1/predict, which has it as JSON in `answer`")
    chances = torch.tensor(said["probabilities"])
    if "tags" not in said:
        return Prediction(said["label"], said["probability"], chances, labels)
    tags = tuple(Choice(**each) for each in said["tags"])
    return TagsAnswer(said["label"], said["probability"], chances, labels, tags)


def answer_to_json(answer: Answer, tasks: Sequence[str], top: int, every: bool) -> dict[str, Any]:
    """What several tasks say of one input: an object by task, of tagged words a list by word."""
    if not answer.predictions:
        # Of an input without words each task answers none.
        return {
            task: [
                {"word": word.input, **prediction_to_json(word[task], top, every)}
                for word in answer.words
            ]
            for task in tasks
        }
    return {task: prediction_to_json(answer[task], top, every) for task in tasks}


def replies_to_json(
    replies: Sequence[Reply], order: Iterable[str], top: int, every: bool
) -> dict[str, Any]:
    """What tasks of all backbones say of one input, in the order of their names, and how that came about."""
    tasks: dict[str, Any] = {}
    for reply in replies:
        tasks |= answer_to_json(reply.answer, [*reply.versions], top, every)
    return {
        "tasks": put_in_order(tasks, order),
        "cached": all(reply.cached for reply in replies),
        "seconds": {
            name: sum(reply.seconds.get(name, 0.0) for reply in replies)
            for name in ("decode", "wait", "forward", "tasks")
        },
    }


def put_in_order(told: Mapping[str, T], order: Iterable[str]) -> dict[str, T]:
    """What tasks told in the order of these names; of a backbone each they come one after the other."""
    # A task that came meanwhile is none of the names.
    return {name: told[name] for name in dict.fromkeys([*order, *told]) if name in told}


def scores(reply: Reply, task: str, top: int | None = None) -> list[dict[str, Any]]:
    """One answer in the shape of Hugging Face and text-embeddings-inference, all labels unless `top` says.

    Scores are probabilities, or the values of numbers. Of tagged words a row a word, with its own number as `index`.

    Raises:
        DataError: The task has no scores: it answers as another package defines, or words with numbers.
    """
    answer = reply.answer
    if answer.predictions:
        prediction = answer[task]
        if isinstance(prediction, NumbersAnswer):
            return [{"label": n.label, "score": n.value} for n in prediction.numbers]
        if not isinstance(prediction, Prediction):
            raise _other_kind(task, "ask /v1/predict")
        chosen = prediction.top(len(prediction.labels) if top is None else top)
        return [{"label": choice.label, "score": choice.probability} for choice in chosen]
    if not all(isinstance(word[task], Prediction) for word in answer.words):
        raise _other_kind(task, "ask /v1/predict")
    return [
        {
            "word": word.input,
            "index": index,
            "entity": word[task].label,
            "score": word[task].probability,
        }
        for index, word in zip(reply.places, answer.words, strict=True)
    ]


def _other_kind(where: str, fix: str) -> DataError:
    return DataError("an answer that is neither classes nor numbers", where=where, fix=fix)


def entry_to_json(entry: Entry, *, whole: bool = False) -> dict[str, Any]:
    """What a task says of itself.

    Args:
        entry: The task.
        whole: With its labels, and all that is known of its backbone.
    """
    said, backbone = entry.description["task"], entry.description["backbone"]
    live = entry.batcher.live
    alone = entry.name in live.predictor.multi.alone_names
    made: dict[str, Any] = {
        "name": entry.name,
        "version": entry.version,
        "kind": entry.batcher.kind,
        "problem": entry.problem.kind,
        "answers": entry.problem.describe(entry.labels),
        "method": said["method"],
        "forward": "own" if alone else "shared",
        "backbone": backbone["name"],
        "runs_on": live.predictor.backbone.name,
        "engine": live.engine,
        "temperature": said.get("temperature", 1.0),
        "since": entry.since,
        "fetched": find_origin(entry.folder) or None,
        "refused": entry.error or None,
    }
    if whole:
        made |= {
            "labels": [*entry.labels],
            "preprocessing": entry.description["preprocessing"],
            "fingerprint": backbone["fingerprint"],
            "digest": backbone.get("digest"),
        }
    return made


def error_to_json(error: Exception, request: str = "") -> dict[str, Any]:
    """An error as all protocols but KServe's tell it; OpenAI's clients read `message` and `type`."""
    told: Mapping[str, Any] = {
        name: value
        for name in ("what", "where", "found", "fix")
        if (value := getattr(error, name, ""))
    }
    return {
        "error": {"message": str(error), "type": type(error).__name__, **told},
        "request": request,
    }

"""The bodies of requests and answers, as the OpenAPI page and file tell them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """A body in which an unknown name is a mistake and not passed over."""

    model_config = ConfigDict(extra="forbid")


class Question(Strict):
    """Images, sounds or texts, and which tasks are asked."""

    images: str | list[str] | None = Field(
        None, description="Files of images in base64, alone or as `data:` addresses."
    )
    sounds: str | list[str] | None = Field(
        None, description="Files of sounds in base64, alone or as `data:` addresses."
    )
    texts: str | list[str | list[str]] | None = Field(
        None, description="Texts; for tasks on tagged words also as lists of words."
    )
    tasks: list[str] | None = Field(None, description="Names; all that answer such inputs without.")
    top: int = Field(5, ge=1, le=10_000, description="Classes of each answer.")
    probabilities: bool = Field(False, description="Also those of all classes, in order of labels.")
    tiles: bool = Field(
        False,
        description="Read images that are larger than those of training as overlapping windows; for tasks on pixels.",
    )
    window: int | None = Field(
        None,
        description="Of `tiles`: side of a window in pixels of the image; without it that of training images.",
    )


class Choice(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class Number(BaseModel):
    """A number in its units, and how far off such values were on rows left out."""

    label: str
    value: float
    error: float | None


class Share(BaseModel):
    """A class and the share of the pixels that are answered with it."""

    label: str
    share: float


class DepthTold(BaseModel):
    """A number for every pixel, in the image's own size."""

    png: str = Field(
        description="PNG of 16 bits in base64: 1 is `least`, 65535 `most`, and 0 a pixel without an answer."
    )
    picture: str = Field(
        description="PNG in base64 to be looked at: dark is `least`, bright `most` (matplotlib's viridis)."
    )
    least: float | None
    median: float | None
    most: float | None
    error: float | None = Field(description="How far off such numbers were on images left out.")


class TaskAnswer(BaseModel):
    """What one task says of one input, or of one word of it: a class, several labels, numbers, a mask or a depth."""

    label: str
    probability: float | None = None
    top: list[Choice] | None = None
    tags: list[Choice] | None = Field(None, description="Of several labels those that are there.")
    numbers: list[Number] | None = None
    shares: list[Share] | None = Field(None, description="Of pixels, by class; the largest first.")
    colours: list[str] | None = Field(
        None, description="Of these classes in the palette of the mask, as #rrggbb."
    )
    mask: str | None = Field(
        None,
        description="PNG in base64, a palette whose indices are the numbers of classes, 255 of pixels without an "
        "answer, in the image's own size.",
    )
    depth: DepthTold | None = None
    answer: Any = Field(None, description="Of a kind that another package defines: its own JSON.")
    probabilities: list[float] | None = None
    word: str | None = None


class InputAnswer(BaseModel):
    """What all tasks say of one input."""

    input: str = Field(description="The name of its file, else its number.")
    tasks: dict[str, TaskAnswer | list[TaskAnswer]]
    cached: bool = Field(description="Whether no forward was made for it.")
    seconds: dict[str, float] = Field(description="Of decoding, waiting, the forward, the tasks.")


class Answers(BaseModel):
    """Answers in the order of the inputs, images first, then sounds."""

    request: str
    versions: dict[str, str] = Field(description="Of each task that answered.")
    problems: dict[str, str] = Field(description="Of each of them, as in /v1/tasks.")
    answers: list[InputAnswer]


class Engine(BaseModel):
    """An engine that runs a backbone."""

    runtime: str
    precision: str
    file: str = Field(description="The start of the sha256 of its file.")


class TaskEntry(BaseModel):
    """A task that is served."""

    name: str
    version: str = Field(description="sha256 of its description, in which that of its weights is.")
    kind: Literal["image", "audio", "text", "words"]
    problem: str = Field(
        description="single-label, multi-label, regression, segmentation, depth, or another kind."
    )
    answers: str = Field(description="What it answers with, in words: `7 classes`.")
    method: str
    forward: Literal["shared", "own"] = Field(description="Whether it takes a forward of its own.")
    backbone: str = Field(description="That the task names.")
    runs_on: str = Field(description="The backbone that runs: that one, or what was given for all.")
    engine: Engine | None = Field(None, description="What it runs in, where that is not PyTorch.")
    temperature: float = Field(
        description="Logits are divided by it: probabilities are calibrated."
    )
    since: float
    fetched: str | None = Field(
        description="Of a task of a hub its name with the commit: `user/pets@4f1c...`."
    )
    refused: str | None = Field(description="Why what lies in its folder now was refused.")


class WholeTask(TaskEntry):
    """A task that is served, with all that is known of it."""

    labels: list[str]
    preprocessing: dict[str, Any]
    fingerprint: dict[str, Any]
    digest: str | None


class Tasks(BaseModel):
    """All tasks."""

    tasks: list[TaskEntry]
    refused: dict[str, str] = Field(description="Folders that hold no task that could be opened.")


class ClassifyQuestion(BaseModel):
    """As Hugging Face and text-embeddings-inference are asked; other names are passed over."""

    inputs: str | list[str] = Field(description="Texts, or images or sounds in base64.")
    parameters: dict[str, Any] = Field({}, description="`top_k`: classes of each answer.")
    raw_scores: bool = Field(False, description="Refused: scores are calibrated probabilities.")


class Score(BaseModel):
    """A label and its score."""

    label: str
    score: float


class EmbeddingQuestion(BaseModel):
    """As OpenAI is asked; other names are passed over."""

    input: str | list[str] = Field(
        description="Texts, or images or sounds in base64 or as `data:` addresses."
    )
    model: str | None = Field(None, description="A backbone, or a task for its backbone.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Only the backbone's own number is given.")


class Embedding(BaseModel):
    """One feature."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Features in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorTold(BaseModel):
    """What happened, where, what was found and what to do."""

    message: str
    type: str
    what: str | None = None
    where: str | None = None
    found: str | None = None
    fix: str | None = None


class Error(BaseModel):
    """An error, and the number of the request in the server's log."""

    error: ErrorTold
    request: str

"""One vector an input from the store of a collection, and the inputs nearest to a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._errors import BackboneError, DataError, StoreError, UnknownNameError
from restuning._files import expand_home
from restuning.backbones import AudioPreprocessing, Backbone, with_text_tower
from restuning.backbones.audio import AUDIO_SUFFIXES
from restuning.backbones.images import image_suffixes
from restuning.data import DataOptions, TextBatch, read_image, say_left_out
from restuning.data.collection import Collection, load_collection
from restuning.data.media import with_preprocessing
from restuning.features.cached import StoredFeatures, select_taps
from restuning.features.opened import open_backbone
from restuning.features.stored import Stored, StoreOptions, choose_pool, open_or_build
from restuning.host import Extractor
from restuning.sites import Needs, resolve_tokens, split_tap
from restuning.task import Task

ROWS = 1024
"""Rows that are read of a store at a time."""
OWN = "own"
"""The backbone's own feature, which a linear probe reads."""
USUAL = StoreOptions()


class Embeddings(NamedTuple):
    """`vectors, ids = restuning.embed(...)`.

    Attributes:
        vectors: `n d` in single precision.
        ids: One a row; see `Collection`.
    """

    vectors: np.ndarray
    ids: list[str]


class Match(NamedTuple):
    """An input that was found.

    Attributes:
        id: See `Collection`.
        score: The cosine with the question, from -1 to 1.
        text: The input, where it is a text of a file.
    """

    id: str
    score: float
    text: str | None = None


def embed(
    data: Any,
    backbone: str | Backbone = "restuning-tiny",
    *,
    feature: str = OWN,
    normalize: bool = False,
    weights: str | Path | None = None,
    random: bool = False,
    device: str | torch.device | None = None,
    options: StoreOptions = USUAL,
    reading: DataOptions | None = None,
) -> Embeddings:
    """One vector for each input of a folder, a file or a data set: all that `restuning embed` does.

    They come from the feature store, which is built where there is none: a linear probe that was trained on the same data has left
    all that is needed, and a second call runs no forward.

    Args:
        data: A folder of images (its sub-folders need be no classes), an image, a file of texts, or as `load_data`
            takes it.
        backbone: By name (see `load_backbone`), or one that is loaded.
        feature: "own", the backbone's feature as its authors pool it; a tap such as "block.6" as the readout reads it (a token, or
            the mean of normalised tokens); or a part of one ("block.6/places"), flat.
        normalize: Divide each vector by its Euclidean length, so that products are cosines.
        weights: File of the backbone's weights, without a hub.
        random: Random weights of the backbone, from seed 0.
        device: "cpu", "cuda", "cuda:1"; None for CUDA if it is there.
        options: Where the store lies, how it is computed and kept.
        reading: How the data are read.

    Raises:
        RestuningError: Names, data or weights are not what they should be; no such feature.

    Cost: of inputs that are not stored yet a forward each; memory for all vectors.
    """
    with open_backbone(backbone, weights, random, device) as (host, loaded):
        encoder = _Encoder(host, loaded)
        collection = load_collection(data, loaded, reading)
        vectors = encoder.read(collection, feature, options)
    if normalize:
        vectors = F.normalize(vectors, dim=-1)
    return Embeddings(vectors.numpy(), collection.ids)


def retrieve(
    data: Any,
    query: str | Path,
    backbone: str | Backbone = "restuning-tiny",
    *,
    count: int = 10,
    weights: str | Path | None = None,
    random: bool = False,
    device: str | torch.device | None = None,
    options: StoreOptions = USUAL,
    reading: DataOptions | None = None,
) -> list[Match]:
    """The inputs whose features are nearest to that of an image or of words, by cosine: what `restuning search` does.

    Args:
        data: As for `embed`.
        query: An image file; or words, where the backbone has a text tower (`clip:`, `openclip:`; `hf:NAME` is loaded as
            `clip:NAME` then) or reads texts itself.
        backbone: As for `embed`, like what follows.
        count: How many are found at most.
        weights: File of the backbone's weights.
        random: Random weights of the backbone.
        device: Where it runs.
        options: Where the store lies.
        reading: How the data are read.

    Returns:
        The nearest first. An image that is itself among the data is found with score 1.

    Raises:
        BackboneError: The query is words, and the backbone has no text tower.
        DataError: There is no such image.
        RestuningError: As `embed`.

    Cost: the first search stores the features of all inputs; from then on one forward, of the query.
    """
    if count < 1:
        raise DataError("nothing is looked for", found=f"count={count}", fix="give 1 or more")
    image = _find_image(query)
    if image is None and isinstance(backbone, str):
        backbone = with_text_tower(backbone)
    with open_backbone(backbone, weights, random, device) as (host, loaded):
        encoder = _Encoder(host, loaded)
        # Before a store is built for it.
        asked = encoder.encode(image if image is not None else str(query), reading)
        collection = load_collection(data, loaded, reading)
        vectors = F.normalize(encoder.read(collection, OWN, options), dim=-1)
    scores = vectors @ F.normalize(asked, dim=-1)
    # Of equal scores the first input comes first.
    best = scores.sort(descending=True, stable=True)
    found = zip(best.values[:count].tolist(), best.indices[:count].tolist(), strict=True)
    return [
        Match(collection.ids[row], score, collection.texts[int(row)] if collection.texts else None)
        for score, row in found
    ]


def _find_image(query: str | Path) -> Path | None:
    """The file of an image or a sound that a query names; None of words."""
    words = str(query)
    if not words.strip():
        raise DataError("nothing is asked", found=repr(words), fix="give a file or words")
    path = expand_home(query)
    if path.is_file():
        return path
    sound = path.suffix.lower() in AUDIO_SUFFIXES
    if isinstance(query, Path) or sound or path.suffix.lower() in image_suffixes():
        noun = "sound" if sound else "image"
        raise DataError(f"no such {noun}", where=words, fix="check the path, or ask with words")
    return None


@dataclass(frozen=True)
class _Encoder:
    """A frozen backbone that makes vectors of inputs."""

    host: Extractor
    backbone: Backbone

    def read(self, collection: Collection, feature: str, options: StoreOptions) -> Tensor:
        """Vectors of all inputs, `n d` on the CPU, from a store that is there or is built now."""
        data = collection.data
        if data.kind == "tags":
            raise DataError(
                "tagged words have a vector each and none together",
                where=data.name,
                fix="give texts without tags, a text a line",
            )
        left_out = f"; left out: {said}" if (said := say_left_out(data.left_out)) else ""
        options.log(f"data  {data.name}: {len(collection.ids):,} inputs{left_out}")
        needs, make = self._plan(feature, choose_pool(self.backbone, data))
        stored = open_or_build(self.host, self.backbone, data, needs, options)
        if stored is None:
            raise StoreError(
                "the features cannot be stored",
                where=data.name,
                found=feature,
                fix="give another feature, or a higher limit of the store",
            )
        with torch.inference_mode():
            parts = [make(taps).float().cpu() for taps in _rows(stored, collection)]
        # One that inference made could not be trained on.
        return torch.cat(parts).clone()

    def encode(self, query: str | Path, reading: DataOptions | None) -> Tensor:
        """The vector of one image, sound or text, `d`: one forward."""
        if isinstance(query, Path):
            return self._encode_file(query, reading or DataOptions())
        if self.backbone.text is not None:
            return self.backbone.text.embed([query])[0].float().cpu()
        if self.backbone.tokenizer is None:
            raise BackboneError(
                "words are asked of a backbone without a text tower",
                where=self.backbone.name,
                found=f"{type(self.backbone.model).__name__}, and the query {query[:60]!r}, which is no file",
                fix="give a vision-language model, such as --backbone clip:openai/clip-vit-base-patch32, or ask "
                "with a file",
            )
        batch = TextBatch(self.backbone.tokenizer, (reading or DataOptions()).max_tokens)
        return self._forward((), dict(batch.tokens([query])), self.backbone.pool)

    def _encode_file(self, file: Path, reading: DataOptions) -> Tensor:
        preprocessing = with_preprocessing(self.backbone, reading).preprocessing
        if preprocessing is None:
            raise DataError(
                "a file is asked of a backbone that reads texts",
                where=str(file),
                found=self.backbone.name,
                fix="give a backbone of images or sounds, or ask with words",
            )
        if isinstance(preprocessing, AudioPreprocessing):
            prepared = preprocessing.prepare(preprocessing.read(file))
            return self._forward((), preprocessing.collate([prepared]), None)
        image = read_image(file, least=preprocessing.least)
        return self._forward((preprocessing.image(image).unsqueeze(0),), {}, None)

    def _forward(
        self, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], pool: str | None
    ) -> Tensor:
        task, device = self._task(pool), self.host.device
        with torch.inference_mode():
            features = self.host.features(
                *(x.to(device) for x in args),
                **{name: x.to(device) for name, x in kwargs.items()},
                keep=task.needs(self.host.readout_rule),
            )
            return task(features)[0].float().cpu().clone()

    def _task(self, pool: str | None) -> Task:
        """A head alone without its head: it answers with the backbone's own feature."""
        return Task(pool=pool or self.host.readout_rule.pool)

    def _plan(self, feature: str, pool: str | None) -> tuple[Needs, Callable[..., Tensor]]:
        """What is read for a feature, and what makes a vector an input of it."""
        rule, last = self.host.readout_rule, self.host.sites.taps[-1]
        if feature == OWN:
            task = self._task(pool)
            needs = task.needs(rule)
            return needs, lambda stored: task(
                select_taps(stored, needs, last), readout=self.host.readout
            )
        tap, part = split_tap(feature)
        if tap not in self.host.sites.taps:
            raise UnknownNameError(
                "no such feature",
                where=feature,
                found=f"taps {self.host.sites.taps[0]} to {last}",
                fix=f"give {OWN}, a tap, or a part of one such as {last}/places",
            )
        tokens = resolve_tokens(pool or rule.pool)
        averaged = not part and tokens == "all"
        if averaged:
            part = "patches" if self.host.images else "tokens"
        needs = Needs((f"{tap}/{part}" if part else tap,), "cls" if part else tokens)
        self.host.resolve_needs(needs)

        def flatten(stored: Mapping[str, Tensor]) -> Tensor:
            value = select_taps(stored, needs, last)[needs.taps[0]]
            return value[:, 0] if averaged else value.flatten(1)

        return needs, flatten


def _rows(stored: Stored, collection: Collection) -> Iterator[dict[str, Tensor]]:
    for split in collection.splits:
        rows = StoredFeatures(stored.store, [split])
        for start in range(0, len(rows), ROWS):
            yield rows.__getitems__(range(start, min(start + ROWS, len(rows))))[0]

"""How a sound becomes a backbone's input, as data: a feature extractor of transformers and its settings."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from restuning._errors import (
    MALFORMED,
    BackboneError,
    DataError,
    FormatError,
    UnknownNameError,
    require,
    warn,
)
from restuning.backbones.audio import read_audio
from restuning.backbones.trust import hub_arguments

LONGEST_SOUND = 10.0
"""Seconds that are read where a backbone takes any length; AST takes 10.24, Whisper 30, and no other."""

MOST_SECONDS = 600.0
LARGEST_LEAST = 100_000
"""Samples: what a front end may need for one frame, as a file says it."""

_MASKED = "Wav2Vec2FeatureExtractor"
_FRAMED = "ASTFeatureExtractor"
_FRAMES = ("torchaudio", "numpy")

WINDOW = 0.025
"""Seconds of the first frame of all three kinds of backbones."""

_WHOLE, _NUMBER, _YES = "whole", "number", "yes"

_FIELDS: Mapping[str, Mapping[str, tuple]] = {
    _FRAMED: {
        "sampling_rate": (_WHOLE, 1_000, 192_000),
        "num_mel_bins": (_WHOLE, 1, 1024),
        "max_length": (_WHOLE, 1, 100_000),
        "do_normalize": (_YES,),
        "mean": (_NUMBER, -1e4, 1e4),
        "std": (_NUMBER, 1e-6, 1e6),
    },
    "Wav2Vec2FeatureExtractor": {
        "sampling_rate": (_WHOLE, 1_000, 192_000),
        "do_normalize": (_YES,),
    },
    "WhisperFeatureExtractor": {
        "sampling_rate": (_WHOLE, 1_000, 192_000),
        "feature_size": (_WHOLE, 1, 1024),
        "hop_length": (_WHOLE, 1, 100_000),
        "chunk_length": (_WHOLE, 1, 600),
        "n_fft": (_WHOLE, 2, 2**16),
    },
}
"""Feature extractors that are known, and of each the settings that decide what it gives, with their bounds."""

_INPUTS = {"WhisperFeatureExtractor": "input_features"}
PADDINGS = ("own", "mask", "repeat")


@dataclass(frozen=True)
class AudioPreprocessing:
    """One channel at the backbone's rate, through its feature extractor, to `input_values` or `input_features`.

    Attributes:
        extractor: Its class in transformers, one of three.
        settings: What that class is made with.
        seconds: What is read of a sound at most, from its beginning.
        padding: What makes a batch of sounds of any length. "own": the extractor gives all of them one length
            (AST with zeros among its frames, Whisper with silence), and there is no mask. "mask": zeros to the longest, with an
            `attention_mask`. "repeat": each is repeated to fill `seconds`, with a mask of its first time: for a front end
            with a group norm, which averages over time and would average over zeros.
        least: Samples that a sound must have.
        frames: Of AST what makes its frames, as transformers chooses: torchaudio where it is installed, else numpy. They
            differ a little, so stores of one are not read for the other, and a task says where it was trained with the other.
    """

    kind: ClassVar[str] = "audio"

    extractor: str
    settings: Mapping[str, Any]
    seconds: float
    padding: str
    least: int = 1
    frames: str = ""

    @property
    def rate(self) -> int:
        """Samples a second."""
        return int(self.settings["sampling_rate"])

    @property
    def longest(self) -> int:
        """Samples that are read of a sound at most."""
        return round(self.seconds * self.rate)

    @property
    def has_mask(self) -> bool:
        """Whether batches have an `attention_mask`, so that sounds have tokens of their own number."""
        return self.padding != "own"

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a task file."""
        return {
            "kind": self.kind,
            "extractor": self.extractor,
            "settings": dict(self.settings),
            "seconds": self.seconds,
            "padding": self.padding,
            "least": self.least,
            **({"frames": self.frames} if self.frames else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AudioPreprocessing:
        """From a task file.

        Raises:
            FormatError: A field is missing, of another kind, or not within its bounds.
        """
        try:
            name = values["extractor"]
            settings = _check_settings(name, values["settings"])
            seconds, padding, least = values["seconds"], values["padding"], values["least"]
            if type(seconds) not in (int, float) or type(least) is not int:
                raise TypeError(f"seconds {seconds!r}, least {least!r}")
            frames = values.get("frames", "")
            if frames not in (("",) if name != _FRAMED else ("", *_FRAMES)):
                raise ValueError(f"frames {frames!r}")
            made = cls(name, settings, float(seconds), padding, least, frames)
            known = padding in PADDINGS and (padding == "own") != (name == _MASKED)
            if not known or not 1 <= least <= LARGEST_LEAST:
                raise ValueError(f"padding {padding!r}, least {least!r}, seconds {seconds!r}")
            return made._check_seconds()
        except (*MALFORMED, DataError) as error:
            raise FormatError(
                "the preprocessing of a task is malformed",
                found=f"{type(error).__name__}: {error}"[:300],
                fix="restore task.json from where it was saved",
            ) from None

    def with_seconds(self, seconds: float | None) -> AudioPreprocessing:
        """The same, where other seconds of a sound are read; None for the same.

        Raises:
            DataError: The backbone takes no other number, or it is none.
        """
        if seconds is None or seconds == self.seconds:
            return self
        if self.padding == "own":
            raise DataError(
                "a backbone takes sounds of one length only",
                found=f"{seconds:g} seconds, and it takes {self.seconds:g}: shorter ones are filled up",
                fix="leave the seconds out",
            )
        return replace(self, seconds=float(seconds))._check_seconds()

    def _check_seconds(self) -> AudioPreprocessing:
        least = self.least / self.rate
        if not math.isfinite(self.seconds) or not least <= self.seconds <= MOST_SECONDS:
            raise DataError(
                "not a length of sounds",
                found=f"{self.seconds:g} seconds",
                fix=f"give seconds from {least:g} to {MOST_SECONDS:g}",
            )
        return self

    def read(self, source: Any, name: str = "") -> np.ndarray:
        """A sound as `read_audio` reads it: one channel at the backbone's rate, no longer than `seconds`."""
        return read_audio(source, self.rate, self.seconds, self.least, name)[: self.longest]

    def prepare(self, wave: np.ndarray) -> Tensor:
        """What `read` gave as the extractor makes it: samples `n`, `frames mel` or `mel frames`."""
        made = self._extractor(wave, sampling_rate=self.rate, return_tensors="np")
        return torch.from_numpy(np.asarray(made[self.input][0], np.float32))

    def collate(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        """Some of these as the backbone is called with them, `b ...` each."""
        if not self.has_mask:
            return {self.input: torch.stack(list(prepared))}
        lengths = torch.tensor([len(each) for each in prepared])
        if self.padding == "repeat":
            places = torch.arange(self.longest)
            rows = torch.stack([each[places % len(each)] for each in prepared])
        else:
            rows = torch.nn.utils.rnn.pad_sequence(list(prepared), batch_first=True)
        mask = (torch.arange(rows.shape[1]) < lengths[:, None]).long()
        return {self.input: rows, "attention_mask": mask}

    def example(self) -> dict[str, Tensor]:
        """The backbone's input of one sound as long as any: noise, the same each time."""
        wave = np.random.default_rng(0).standard_normal(self.longest).astype(np.float32) / 8
        return self.collate([self.prepare(wave)])

    def transform(self, policy: str) -> Callable[[np.ndarray], Tensor]:
        """Wave to tensor; sounds are not augmented.

        Raises:
            UnknownNameError: Another policy than "none".
        """
        if policy != "none":
            raise UnknownNameError(
                "sounds are not augmented", where=policy, fix="leave --augment out, or give none"
            )
        return self.prepare

    @property
    def input(self) -> str:
        """The name under which the backbone takes it."""
        return _INPUTS.get(self.extractor, "input_values")

    @cached_property
    def _extractor(self) -> Any:
        hf = require("transformers", "audio", "a backbone of sounds")
        if self.frames and self.frames != _choose_frames():
            warn(
                "sounds are made into frames by another library than in training",
                where=self.extractor,
                found=f"{_choose_frames()}, and it was {self.frames}: answers may differ a little",
                fix="pip install torchaudio"
                if self.frames == "torchaudio"
                else "train again where the task is used, or use it where torchaudio is not installed",
            )
        return getattr(hf, self.extractor)(**self.settings)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which makes the extractor itself."""
        return {k: v for k, v in vars(self).items() if k != "_extractor"}


def _check_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a known extractor, within their bounds."""
    fields = _FIELDS[name]
    if settings.keys() != fields.keys():
        raise ValueError(f"settings {sorted(settings)} of {name}")
    for key, (kind, *bounds) in fields.items():
        value = settings[key]
        kinds = {_WHOLE: (int,), _NUMBER: (int, float), _YES: (bool,)}[kind]
        if type(value) not in kinds or (bounds and not bounds[0] <= value <= bounds[1]):
            raise ValueError(f"{key} {value!r}")
    return dict(settings)


def _choose_frames() -> str:
    """What transformers makes frames of AST with here: its `is_speech_available`."""
    return _FRAMES[0] if importlib.util.find_spec("torchaudio") is not None else _FRAMES[1]


def read_feature_extractor(hf: Any, name: str, config: Any) -> AudioPreprocessing:
    """What the feature extractor of a folder or repository does, with the padding that its model bears.

    Args:
        hf: transformers.
        name: Folder or repository.
        config: Of the model.

    Raises:
        BackboneError: There is none, it is of a kind that is not known, or what it gives does not fit the model.
    """
    try:
        found = hf.AutoFeatureExtractor.from_pretrained(name, **hub_arguments())
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError) as error:
        raise BackboneError(
            "nothing says how sounds are prepared for this model",
            where=f"hf:{name}",
            found=(str(error).strip().splitlines() or [type(error).__name__])[0][:200],
            fix="put the model's preprocessor_config.json into its folder",
        ) from None
    kind = type(found).__name__
    if kind not in _FIELDS:
        raise BackboneError(
            "a backbone of sounds is prepared for by another feature extractor",
            where=f"hf:{name}",
            found=kind,
            fix=f"use a model with one of {', '.join(_FIELDS)}",
        )
    try:
        settings = _check_settings(kind, {key: getattr(found, key) for key in _FIELDS[kind]})
        made = _fit(kind, settings, config)
        return made._check_seconds()
    except (AttributeError, ValueError, KeyError, TypeError, DataError) as error:
        raise BackboneError(
            "a feature extractor does not fit its model",
            where=f"hf:{name}",
            found=str(error)[:200],
            fix="restore preprocessor_config.json and config.json from where the model came from",
        ) from None


def _fit(kind: str, settings: dict[str, Any], config: Any) -> AudioPreprocessing:
    rate = settings["sampling_rate"]
    least = math.ceil(WINDOW * rate)
    if kind == _FRAMED:
        theirs = (config.max_length, config.num_mel_bins)
        ours = (settings["max_length"], settings["num_mel_bins"])
        if theirs != ours:
            raise ValueError(f"frames and mel bins {ours}, the model has {theirs}")
        # Frames of 25 ms, one every 10 ms, as its code has them whatever the settings say.
        return AudioPreprocessing(
            kind, settings, settings["max_length"] * 160 / rate, "own", least, _choose_frames()
        )
    if kind == "WhisperFeatureExtractor":
        frames = settings["chunk_length"] * rate // settings["hop_length"]
        if (frames, settings["feature_size"]) != (
            2 * config.max_source_positions,
            config.num_mel_bins,
        ):
            raise ValueError(
                f"{frames} frames of {settings['feature_size']} mel bins, the model has "
                f"{2 * config.max_source_positions} of {config.num_mel_bins}"
            )
        return AudioPreprocessing(kind, settings, float(settings["chunk_length"]), "own", least)
    # Samples of which one frame comes, through all convolutions of the front end.
    reach = 1
    for width, step in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        reach = (reach - 1) * step + width
    padding = {"group": "repeat", "layer": "mask"}[config.feat_extract_norm]
    return AudioPreprocessing(kind, settings, LONGEST_SOUND, padding, max(reach, 1))

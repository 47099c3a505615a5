"""What is read through a preprocessing: images and sounds. Texts go through a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from restuning.backbones.audio_preprocessing import AudioPreprocessing
from restuning.backbones.preprocessing import Preprocessing

AnyPreprocessing = Preprocessing | AudioPreprocessing


def preprocessing_from_dict(values: Mapping[str, Any]) -> AnyPreprocessing:
    """What `to_dict` of either wrote; files of before sounds were read say no kind.

    Raises:
        FormatError: It is malformed.
    """
    audio = values.get("kind") == AudioPreprocessing.kind
    return (AudioPreprocessing if audio else Preprocessing).from_dict(values)

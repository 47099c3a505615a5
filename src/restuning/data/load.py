"""Data sets by name or path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from restuning._errors import DataError, UnknownNameError
from restuning.data.arrays import digits, from_hub, from_torchvision
from restuning.data.data import Data
from restuning.data.folders import from_folder
from restuning.data.texts import TAGGED, from_conll, from_csv
from restuning.data.tokens import LONGEST_TEXT

if TYPE_CHECKING:
    from restuning.backbones import Backbone


def load_data(
    name: str,
    backbone: Backbone,
    *,
    augment: str = "none",
    skip_bad: bool = False,
    final: bool = False,
    text: str = "text",
    label: str = "label",
    max_tokens: int = LONGEST_TEXT,
    root: str | Path = "data",
) -> Data:
    """Load a data set with the backbone's own preprocessing.

    Args:
        name: `digits`; a folder of class folders (with or without train/val/test); a folder in
            VTAB-1K list layout; `torchvision:NAME`; `hf:NAME`; a csv file or folder of csv files (a text and
            a label a row); a CoNLL file or folder of them (a word and a tag a line).
        backbone: Whose preprocessing or tokenizer is used.
        augment: Training images: "none", "flip", "timm", "timm:POLICY".
        skip_bad: Leave corrupt images out and count them.
        final: Train on train and val together (after settings were chosen on val).
        text, label: Columns of a csv.
        max_tokens: Tokens of a text that are read; 256, or what the backbone takes if less.
        root: Where torchvision data sets lie.

    Raises:
        DataError: Missing or malformed data.
        UnknownNameError: No such data set.
    """
    path = Path(name).expanduser()
    scheme, _, rest = name.partition(":")
    if path.suffix == ".csv" or (path.is_dir() and (path / "train.csv").exists()):
        return from_csv(path, backbone, text, label, final, max_tokens)
    if path.suffix in TAGGED or any((path / f"train{end}").exists() for end in TAGGED):
        return from_conll(path, backbone, final, max_tokens)
    if backbone.preprocessing is None:
        raise DataError(
            "a text backbone needs text", where=name, fix="give a csv file, or an image backbone"
        )
    if name == "digits":
        return digits(backbone.preprocessing, augment, final)
    if scheme == "torchvision" and rest:
        return from_torchvision(rest, backbone.preprocessing, augment, final, root)
    if scheme == "hf" and rest:
        return from_hub(rest, backbone.preprocessing, augment, final)
    if path.is_dir():
        return from_folder(path, backbone.preprocessing, augment, skip_bad, final)
    raise UnknownNameError(
        "no such data set",
        where=name,
        fix="give `digits`, a folder, a csv file, torchvision:NAME or hf:NAME",
    )

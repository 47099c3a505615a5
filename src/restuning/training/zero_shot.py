"""A head that is made of the names of the classes, by a text tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from restuning._errors import BackboneError, DataError
from restuning.backbones import Backbone
from restuning.data.text_files import read_lines


@dataclass(frozen=True)
class ZeroShot:
    """Prompts and names that a head starts from.

    Attributes:
        templates: Prompts with `{}` where a name goes, or .txt files with one a line.
        names: A file with a class name a line, in the order of the labels; None for the labels.
    """

    templates: tuple[str, ...]
    names: str | Path | None = None

    def head(self, backbone: Backbone, labels: Sequence[str]) -> nn.Linear:
        """The classifier that the names make.

        Raises:
            BackboneError: The backbone has no text tower.
            DataError: A file cannot be read, or there are more or fewer names than classes.
        """
        if backbone.text is None:
            raise BackboneError(
                "a zero-shot start needs a text tower",
                where=backbone.name,
                found=type(backbone.model).__name__,
                fix="give a vision-language model: clip:NAME or openclip:NAME/TAG",
            )
        names = list(labels) if self.names is None else read_lines(Path(self.names))
        if len(names) != len(labels):
            raise DataError(
                "every class needs one name",
                where=str(self.names),
                found=f"{len(names)} names for {len(labels)} classes: {', '.join(labels[:4])} ...",
                fix="write a name a line, in the order of the labels",
            )
        templates: list[str] = []
        for template in self.templates:
            # A prompt may end in ".txt" as well; one with a place for the name is no file.
            if template.endswith(".txt") and "{}" not in template:
                templates += read_lines(Path(template))
            else:
                templates.append(template)
        return backbone.text.head(names, templates)

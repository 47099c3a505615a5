"""Every error says what happened, where, what was found and what to do next.

Imports nothing of the package: every room may raise these.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class RestuningError(Exception):
    """The mother of every error a user's input can cause.

    Args:
        what: What happened, one clause.
        where: The file, site, module or option concerned.
        found: What was found there instead of what was wanted.
        fix: What to do next, an instruction.
    """

    def __init__(self, what: str, *, where: str = "", found: str = "", fix: str = "") -> None:
        self.what, self.where, self.found, self.fix = what, where, found, fix
        lines = [f"{what}: {where}" if where else what]
        if found:
            lines.append(f"  found: {found}")
        if fix:
            lines.append(f"  do:    {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple:
        """Rebuild from the four parts, so that an error crosses process borders whole."""
        return _rebuilt, (type(self), self.what, self.where, self.found, self.fix)


def _rebuilt(kind: type, what: str, where: str, found: str, fix: str) -> RestuningError:
    return kind(what, where=where, found=found, fix=fix)


class NoSitesError(RestuningError):
    """No place to tune was found in a backbone, or none matches a selection."""


class SiteNotReachedError(RestuningError):
    """A tuner was in use, but its site never fired in a forward."""


class TunerShapeError(RestuningError):
    """A tuner returned another shape than the stream it was given."""


class ProjectionsError(RestuningError):
    """A tuner needs the frozen attention maps of a site, and they could not be proved."""


class RecomputedError(RestuningError):
    """A block was run again inside backward, where its task is unknown."""


class UnknownNameError(RestuningError):
    """A method, tuner, backbone or data set has no such name."""


class BackboneError(RestuningError):
    """A backbone or its weights could not be loaded."""


class EngineError(RestuningError):
    """An engine cannot be made, opened or run, or is asked for what engines cannot do."""


class WrongBackboneError(RestuningError):
    """A task was trained on another backbone than the one it is given."""


class FormatError(RestuningError):
    """A file is not what it should be: damaged, of an unknown version, or incomplete."""


class HubError(RestuningError):
    """A hub refused or cannot be reached."""


class DataError(RestuningError):
    """A data set, an image or a list of labels cannot be read."""


class StoreError(RestuningError):
    """A feature store cannot be built, read or used for this purpose."""


class TrainingError(RestuningError):
    """Training cannot start or go on."""


class ForecastError(RestuningError):
    """A forecast cannot be made, or was asked for in terms that cannot be read."""


class MissingExtraError(RestuningError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or raise with the exact line that installs it.

    Args:
        module: The module to import, e.g. ``"transformers"``.
        extra: The extra of this package that brings it.
        purpose: What it is needed for, to complete "... needs MODULE".

    Raises:
        MissingExtraError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {module.split('.')[0]}",
            found=str(error),
            fix=f"pip install 'restuning[{extra}]'",
        ) from None

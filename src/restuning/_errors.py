"""Every error says what happened, where, what was found and what to do next; so does a warning.

Imports nothing of the package: every room may raise these.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType


class RestuningError(Exception):
    """Base class of every error that a user's input can cause.

    Args:
        what: What happened, one clause.
        where: The file, site, module or option concerned.
        found: What was there instead of what was needed.
        fix: What to do next, an instruction.
    """

    def __init__(self, what: str, *, where: str = "", found: str = "", fix: str = "") -> None:
        self.what, self.where, self.found, self.fix = what, where, found, fix
        super().__init__(_write_lines(what, where, found, fix))

    def __reduce__(self) -> tuple:
        """Rebuild from the four parts, so that an error crosses process borders whole."""
        return _rebuild, (type(self), self.what, self.where, self.found, self.fix)


def _write_lines(what: str, where: str, found: str, fix: str) -> str:
    lines = [f"{what}: {where}" if where else what]
    if found:
        lines.append(f"  found: {found}")
    if fix:
        lines.append(f"  do:    {fix}")
    return "\n".join(lines)


def _rebuild(kind: type, what: str, where: str, found: str, fix: str) -> RestuningError:
    return kind(what, where=where, found=found, fix=fix)


class RestuningWarning(UserWarning):
    """Something was assumed or passed over that whoever reads a result should know."""


def warn(what: str, *, where: str = "", found: str = "", fix: str = "") -> None:
    """Warn in the words of an error, where it is right to go on.

    Args:
        what: What was assumed or passed over, one clause.
        where: The file, option or name concerned.
        found: What was there.
        fix: What to do if it is not meant so.
    """
    # The place to look is in the words; a line of this library would tell a user nothing.
    warnings.warn(RestuningWarning(_write_lines(what, where, found, fix)), stacklevel=3)


MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading and building from a file raises where values are of another kind than they should be,
too large or nested too deep; whoever parses one makes an error of ours of them."""


# Where a task meets a backbone.


class NoSitesError(RestuningError):
    """Raised where a backbone has no place to tune, or none of the name or selection asked for."""


class SiteNotReachedError(RestuningError):
    """Raised after a forward in which a tuner was in use, but its site never ran."""


class ProjectionsError(RestuningError):
    """Raised where a tuner needs W_q, W_k, W_v and W_o of a layer's attention, and has none.

    Either they could not be proved (recomputing the attention from them did not give what the layer
    returned), or there is no attention, or they are used outside the layer's forward.
    """


class PlacementError(RestuningError):
    """Raised where a tuner stands at a place at which it cannot do what it is for.

    Tokens appended at the stem of a causal backbone or among relative positions; the exact scale
    where a norm stands between W_o and the stream.
    """


class MissingInputError(RestuningError):
    """Raised where a forward lacks something that a task reads: a time step, a tap, the readout."""


class DecodingError(RestuningError):
    """Raised where text is decoded with a cache, and a tuner must see all tokens at once."""


class WrongTaskError(RestuningError):
    """Raised where a task of one kind is used as one of another: a head inside the backbone."""


class TunerShapeError(RestuningError):
    """Raised where shapes do not fit: of a tuner's delta, a side network, a head, or a batch."""


class RecomputedError(RestuningError):
    """Raised where a block is run again inside backward, where its task is unknown."""


class WrongBackboneError(RestuningError):
    """Raised where a task is opened on another backbone than the one it was trained on."""


class BackboneChangedError(WrongBackboneError):
    """Raised where a backbone is no longer what it was when its host was built."""


# What is opened by name or path.


class UnknownNameError(RestuningError):
    """Raised where a method, tuner, option, backbone or data set has no such name."""


class BackboneError(RestuningError):
    """Raised where a backbone or its weights cannot be loaded, or cannot be used so."""


class EngineError(RestuningError):
    """Raised where an engine cannot be made, opened or run, or is asked what engines cannot do."""


class FormatError(RestuningError):
    """Raised where a file is damaged, incomplete or of an unknown version."""


class HubError(RestuningError):
    """Raised where a hub refuses or cannot be reached."""


class DataError(RestuningError):
    """Raised where a data set, an image or a list of labels cannot be read."""


class StoreError(RestuningError):
    """Raised where a feature store cannot be built, read or used for this purpose."""


class MissingExtraError(RestuningError, ImportError):
    """Raised where an optional dependency is not installed."""


# A server.


class BusyError(RestuningError):
    """Raised where a server has as many questions waiting as it keeps, or is about to end.

    Attributes:
        seconds: After which it is worth asking again.
    """

    seconds: int = 1


class AnswerError(RestuningError):
    """Raised where a task answers with what is no number: NaN, or infinite."""


class ServerError(RestuningError):
    """Raised where a server does not answer, or fails."""


class TooLargeError(RestuningError):
    """Raised where a question is larger than a server takes."""


# Training and its forecast.


class TrainingError(RestuningError):
    """Raised where training cannot start or go on."""


class DivergedError(TrainingError):
    """Raised where training diverges: the loss or a weight is NaN or infinite."""


class CallbackError(TrainingError):
    """Raised where a callback raises; its own error is the cause, and a checkpoint was written first."""


class ForecastError(RestuningError):
    """Raised where a forecast cannot be made, or is asked for in terms that cannot be read."""


def require(module: str, extra: str, purpose: str, *, package: str = "") -> ModuleType:
    """Import an optional module, or raise with the exact line that installs it.

    Args:
        module: The module to import, e.g. ``"transformers"``.
        extra: The extra of this package that brings it.
        purpose: What it is needed for, to complete "... needs MODULE".
        package: What pip installs in place of that extra, as a shell takes it.

    Raises:
        MissingExtraError: The module is not installed.
    """
    package = package or f"'restuning[{extra}]'"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {module.split('.')[0]}",
            found=str(error),
            fix=f"pip install {package}",
        ) from None

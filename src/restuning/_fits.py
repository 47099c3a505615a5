"""Whether values that came from a file have the types that a constructor says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NUMBERS: dict[Any, Any] = {int: Integral, float: Real}
"""Of numpy as well, where a task in memory is copied by its spec."""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: a plain one, one of several, a literal, a list or a mapping.

    A boolean is no whole number here, a whole number may stand for a fraction, and NaN for none.
    Of a class other than these it must be an instance; what a hint says beyond that is not looked at.
    """
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(hint))
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if origin in (tuple, list, Sequence):
        inner = next(iter(get_args(hint)), Any)
        return isinstance(value, list | tuple) and all(fits(each, inner) for each in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if not isinstance(hint, type):
        return True
    if hint in _NUMBERS:
        number = isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, hint)


def hints_of(function: Any) -> dict[str, Any]:
    """The types that a function or a dataclass says; of a stranger's that cannot be read, none."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        # Imported for type checkers alone, or written for a later Python.
        return {}

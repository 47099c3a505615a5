"""Tables of classes by kind that specs are read from: ours, and those of installed packages.

Tuners, side networks and problems are found this way. A spec is JSON: `{"kind": ..., argument: value}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from restuning._errors import MALFORMED, FormatError, UnknownNameError
from restuning._files import fits, hints_of

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])


class Registry(Generic[T]):
    """Classes by kind.

    Args:
        noun: What its classes are, for error messages: "tuner".
        group: Entry points by which an installed package adds one:
            `[project.entry-points."GROUP"]`, `kind = "module:Class"`.
    """

    def __init__(self, noun: str, group: str) -> None:
        self.noun, self.group = noun, group
        self._table: dict[str, Any] = {}
        self._broken: dict[str, str] = {}

    def register(self, kind: str) -> Callable[[C], C]:
        """Make a class decorator that puts a class into the table under its kind."""

        def add(cls: C) -> C:
            cls.kind = kind
            self._table[kind] = cls
            return cls

        return add

    def kinds(self) -> dict[str, type[T]]:
        """All classes by kind; one that does not import is named when its kind is asked for."""
        for point in entry_points(group=self.group):
            # Ours go first: an installed package cannot take the place of a kind that files name.
            if point.name in self._table:
                continue
            try:
                cls = point.load()
            except Exception as error:  # noqa: BLE001 (a stranger's module fails in any way it likes)
                why = f"{point.value} fails: {type(error).__name__}: {error}"
                self._broken[point.name] = why
                continue
            cls.kind = point.name
            self._table[point.name] = cls
        return dict(self._table)

    def find(self, spec: Any) -> type[T]:
        """The class that a spec names.

        Raises:
            FormatError: It is no spec.
            UnknownNameError: The kind is in no table.
        """
        if not isinstance(spec, Mapping) or not isinstance(spec.get("kind"), str):
            raise FormatError(
                f"not the spec of a {self.noun}", found=repr(spec)[:200], fix='give {"kind": ...}'
            )
        kind = spec["kind"]
        # Entry points are read only for kinds that are not ours: it takes a while.
        table = self._table if kind in self._table else self.kinds()
        if kind not in table and kind in self._broken:
            raise UnknownNameError(
                f"a package registers this {self.noun} but does not import",
                where=kind,
                found=self._broken[kind],
                fix="repair or reinstall the package",
            )
        if kind not in table:
            raise UnknownNameError(
                f"no {self.noun} of this kind",
                where=kind,
                found=f"known kinds: {', '.join(sorted(table))}",
                fix="install the package that registers it, or correct the spec",
            )
        return table[kind]


def read_arguments(built: Any, to_json: Callable[[Any], Any]) -> dict[str, Any]:
    """The constructor's arguments, each an attribute of the same name, as JSON."""
    names = list(inspect.signature(type(built).__init__).parameters)[1:]
    return {name: to_json(getattr(built, name)) for name in names}


def construct(cls: type[T], arguments: Mapping[str, Any], noun: str) -> T:
    """Call a constructor with what a spec holds.

    Raises:
        FormatError: The arguments do not fit.
    """
    left, kind = dict(arguments), getattr(cls, "kind", cls.__name__)
    try:
        signature = inspect.signature(cls.__init__)
        _refuse_types(cls, left, signature)
        positional, keyword = [], {}
        for name, parameter in list(signature.parameters.items())[1:]:
            # `*tuners` of a `Sum` is one list in its spec.
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional += left.pop(name, ())
            elif name in left and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                positional.append(left.pop(name))
            elif name in left:
                keyword[name] = left.pop(name)
        if left:
            raise FormatError(
                f"the spec of a {noun} has unknown arguments",
                where=kind,
                found=", ".join(sorted(left)),
                fix=f"{kind} takes {', '.join(list(signature.parameters)[1:])}",
            )
        return cls(*positional, **keyword)
    except MALFORMED as error:
        raise cannot_build(noun, kind, error) from None


def cannot_build(noun: str, kind: str, error: BaseException) -> FormatError:
    """The error of a spec whose values a constructor does not take."""
    return FormatError(
        f"a {noun} cannot be built from its spec",
        where=kind,
        found=f"{type(error).__name__}: {error}"[:300],
        fix="write the spec with the library version that reads it",
    )


def _refuse_types(
    cls: type[Any], arguments: Mapping[str, Any], signature: inspect.Signature
) -> None:
    """Compare a spec's values with the types that the constructor says.

    Raises:
        TypeError: One is of another.
    """
    hints = hints_of(cls.__init__)
    for name, value in arguments.items():
        parameter = signature.parameters.get(name)
        if parameter is None or name not in hints:
            continue
        hint = hints[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            hint = Sequence[hint]
        if not fits(value, hint):
            raise TypeError(f"{name} is {value!r}"[:200])

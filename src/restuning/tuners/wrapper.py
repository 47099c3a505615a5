"""A tuner made of tuners: what its members need, it needs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from restuning.tuners._base import Tuner, trait


class Wrapper(Tuner):
    """A tuner around others of one width that read the same place; abstract.

    It has every trait that one of its members has. A subclass says who they are, in `members`.

    Args:
        first: The member that `dim` and `reads` are taken from.
    """

    def __init__(self, first: Tuner) -> None:
        super().__init__()
        self.dim, self.reads = first.dim, first.reads

    @property
    @abstractmethod
    def members(self) -> Sequence[Tuner]:
        """The tuners inside."""

    @property
    def dim_out(self) -> int:
        """Width of each member's delta."""
        return self.members[0].dim_out

    @trait
    def mixes_tokens(self) -> bool:
        """Whether any member does."""
        return any(t.mixes_tokens for t in self.members)

    @property
    def looks_ahead(self) -> bool:
        """Whether any member does."""
        return any(t.looks_ahead for t in self.members)

    @trait
    def needs_view(self) -> bool:
        """Whether any member does."""
        return any(t.needs_view for t in self.members)

    @trait
    def needs_grid(self) -> bool:
        """Whether any member does."""
        return any(t.needs_grid for t in self.members)

    def reset_parameters(self) -> None:
        """Each member's own start."""
        for each in self.members:
            each.reset_parameters()

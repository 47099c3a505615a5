"""A folder of tasks that is looked at again and again: what is saved there answers, what is gone does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from restuning._errors import BusyError, FormatError, RestuningError
from restuning.serve.service import Service
from restuning.task import DESCRIPTION

State = tuple[int, int, int]


class Watcher:
    """The tasks of a folder, each in a folder of its own (`NAME.task`), kept the same in a service.

    A task is read again when its `task.json` is another file or was written to: that is the one step in
    which a task is saved. One that cannot be read is told of once, and what answered goes on.

    Args:
        service: Where they answer.
        folder: Looked at; links in it are followed, and nothing below its tasks is looked for.
        tell: Called with what has happened, a sentence.

    Raises:
        FormatError: There is no such folder.
    """

    def __init__(
        self, service: Service, folder: str | Path, tell: Callable[[str], object] = lambda _: None
    ) -> None:
        self.service, self.folder, self.tell = service, Path(folder), tell
        self._seen: dict[str, State] = {}
        self._refused: set[str] = set()
        if not self.folder.is_dir():
            raise FormatError(
                "no folder to watch",
                where=str(folder),
                fix="make it, and save tasks in it as NAME.task",
            )

    def look(self) -> None:
        """Bring the service up to what lies in the folder now."""
        try:
            found, refused = self._find()
        except OSError as error:
            # A network folder that is away for a moment: nothing is taken out for that.
            self.tell(f"{self.folder} cannot be read: {error.strerror}")
            return
        for name, error in refused.items():
            if name not in self._refused:
                # What it was goes on answering.
                self._refuse(name, error)
        before, self._refused = self._refused, {*refused}
        for name, (folder, state) in found.items():
            if self._seen.get(name) == state and name not in before:
                continue
            try:
                entry = self.service.put(name, folder)
                self.tell(f"task {name} answers, version {entry.version[:12]}")
            except BusyError:
                return
            except RestuningError as error:
                self._refuse(name, error)
            self._seen[name] = state
        for name in (self._seen.keys() | before) - found.keys() - refused.keys():
            self._seen.pop(name, None)
            self.service.forget_refused(name)
            if name in self.service.entries:
                self.service.remove(name)
                self.tell(f"task {name} is gone")

    def _refuse(self, name: str, error: RestuningError) -> None:
        self.service.note_refused(name, error)
        self.tell(f"task {name} was refused: {error}")

    def _find(self) -> tuple[dict[str, tuple[Path, State]], dict[str, FormatError]]:
        """What lies there, and why the rest of it is not looked at."""
        found: dict[str, tuple[Path, State]] = {}
        refused: dict[str, FormatError] = {}
        with os.scandir(self.folder) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                # A name need not be text; one that is none is refused, in text.
                name = os.fsencode(entry.name.removesuffix(".task")).decode(errors="replace")
                try:
                    about = (Path(entry.path) / DESCRIPTION).stat()
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    refused[name] = FormatError(
                        "a task cannot be read", where=name, found=str(error.strerror)
                    )
                    continue
                if other := found.pop(name, None):
                    refused[name] = FormatError(
                        "two folders hold tasks of one name",
                        where=name,
                        found=f"{other[0].name}, {entry.name}",
                        fix="rename one of them, or remove it",
                    )
                if name not in refused:
                    state = about.st_ino, about.st_size, about.st_mtime_ns
                    found[name] = Path(entry.path), state
        return found, refused

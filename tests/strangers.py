"""Distributions of strangers: as pip would leave them, and used in processes of their own."""

import json
import os
import textwrap
from dataclasses import dataclass

from children import Child

PATIENCE = 240
"""Seconds; far above what such a process takes alone."""

BROKEN = "import a_module_that_is_not_there\n"
"""A module that cannot be imported."""

ERROR_OF_LOADING = """
try:
    load({folder!r}, host)
except RestuningError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
"""Prints kind and words of the error that loading a task ends with."""


@dataclass(frozen=True)
class Distribution:
    """A package that adds one class by an entry point.

    Attributes:
        kind: The name of the entry point.
        group: Its group.
        place: Module and class it stands for, such as "soft_sign_tuner:SoftSign".
        code: Of the module.
        prelude: What each process that uses it begins with.
    """

    kind: str
    group: str
    place: str
    code: str
    prelude: str

    def install(self, folder, code=None):
        """What `pip install` leaves: the module, and a dist-info that names the entry point."""
        module, _, _ = self.place.partition(":")
        folder.mkdir()
        (folder / f"{module}.py").write_text(self.code if code is None else code)
        info = folder / f"restuning_{module}-1.2.dist-info"
        info.mkdir()
        name = f"restuning-{module}"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{self.group}]\n{self.kind} = {self.place}\n")
        (info / "INSTALLER").write_text("pip\n")
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        record = [*names, f"{info.name}/RECORD"]
        (info / "RECORD").write_text("".join(f"{n},,\n" for n in record))
        return folder

    def python(self, code, *packages):
        """A fresh process with folders of packages on its path; its last line, as JSON."""
        child = Child(
            ["-c", self.prelude + textwrap.dedent(code)],
            {"PYTHONPATH": os.pathsep.join(map(str, packages))},
        )
        out, errors = child.communicate(timeout=PATIENCE)
        assert child.returncode == 0, errors[-3000:]
        return json.loads(out.splitlines()[-1])

    def check_errors(self, task, tmp_path):
        """A task of its class names the kind and what to do where the package is absent or broken."""
        loading = ERROR_OF_LOADING.format(folder=str(task))
        kind, words = self.python(loading)
        assert kind == "UnknownNameError"
        assert self.kind in words
        assert "install the package" in words
        _, words = self.python(loading, self.install(tmp_path / "packages", BROKEN))
        assert self.kind in words
        assert "a_module_that_is_not_there" in words

"""How much a command says, and that a library says nothing by itself."""

import logging
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from restuning.cli.app import COMMANDS, load_command
from restuning.cli.common import command, group, messages
from restuning.cli.results import log_to
from restuning.cli.speech import is_quiet


@pytest.fixture
def speaks():
    """A command that says a line, warns, logs and prints a result."""
    app = group("Speak.")

    @command(app, "restuning speak")
    def speak() -> None:
        log_to(messages(True))("data  a line")
        logging.getLogger("restuning.training.loop").debug("a checkpoint")
        logging.getLogger("restuning.any").warning("a fault")
        print("bar" if not is_quiet() else "no bar", "result")

    return app


SAID = {
    (): (True, False, "bar result"),
    ("--quiet",): (False, False, "no bar result"),
    ("--verbose",): (True, True, "bar result"),
}


@pytest.mark.parametrize("options", SAID, ids=lambda o: " ".join(o) or "neither")
def test_a_command_says_as_much_as_it_was_asked_to(speaks, options):
    done = CliRunner().invoke(speaks, options)
    lines, debug, out = SAID[options]
    assert done.exit_code == 0, done.output
    assert out in done.stdout
    assert ("a line" in done.stderr) == lines
    assert ("debug: a checkpoint" in done.stderr) == debug
    assert "warning: a fault" in done.stderr
    # Nothing of it stays behind.
    assert not is_quiet()
    kinds = {type(each) for each in logging.getLogger("restuning").handlers}
    assert kinds == {logging.NullHandler}
    assert logging.getLogger("restuning").level == logging.NOTSET


def test_quiet_and_verbose_together_are_refused(speaks):
    done = CliRunner().invoke(speaks, ["--quiet", "--verbose"])
    assert done.exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet(name):
    made = load_command(name)
    for each in getattr(made, "commands", {"": made}).values():
        options = [opt for parameter in each.params for opt in parameter.opts]
        assert options.count("--quiet") == 1
        assert ("--verbose" in options) or name == "serve"


def test_the_library_says_nothing_by_itself():
    code = (
        "import logging, restuning\n"
        "logging.getLogger('restuning.training').error('to nobody')\n"
        "print([type(h).__name__ for h in logging.getLogger('restuning').handlers])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() == "['NullHandler']"

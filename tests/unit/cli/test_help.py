"""Help: at once, in the order of use, with examples that can be copied; and what a new command costs."""

import json
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from typer.testing import CliRunner

from restuning import FitSettings, methods
from restuning.backbones import SCHEMES
from restuning.bench.studies.robustness import IMAGES
from restuning.cli import bench, common
from restuning.cli.app import COMMANDS, EXAMPLES, app, load_command
from restuning.data import LONGEST_TEXT
from restuning.search import AUTO

NEW = '''
from restuning.cli.common import command, group

app = group("New.")


@command(app, "restuning greet Ann")
def greet(name: str) -> None:
    """Greet somebody."""
    print("hello", name)
'''

INTERRUPTED = NEW.replace('print("hello", name)', "raise KeyboardInterrupt")

ALL_HELP = """
import contextlib, io, json, sys
from restuning.cli import main
from restuning.cli.app import COMMANDS

def modules_after(*words):
    sys.argv = ["restuning", *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main()
    assert "Usage" in text.getvalue()
    return sorted(m for m in sys.modules if m in ("torch", "numpy") or m.startswith("restuning."))

print(json.dumps([modules_after(), *(modules_after(name) for name in COMMANDS)]))
"""


def parsers(name):
    """The command of this name, or those in it if it is a group."""
    made = load_command(name)
    return list(getattr(made, "commands", {}).values()) or [made]


def all_parsers():
    return [each for name in COMMANDS for each in parsers(name)]


def call(*arguments, **environment):
    return CliRunner(env=environment).invoke(app, list(arguments), prog_name="restuning")


def parse(line):
    """What the real parser makes of a command line; nothing is carried out."""
    program, name, *rest = shlex.split(line)
    assert program == "restuning"
    made = load_command(name)
    while hasattr(made, "commands"):
        made = made.commands[rest.pop(0)]
    return made.make_context(made.name, rest)


@pytest.fixture
def greet(tmp_path, monkeypatch):
    """A new command is one file and one line."""

    def add(source):
        (tmp_path / "greeting.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "greeting", raising=False)
        monkeypatch.setitem(COMMANDS, "greet", ("greeting", "Greet somebody"))

    return add


def test_no_help_imports_torch_and_the_first_imports_no_command():
    done = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *others = json.loads(done.stdout)
    commands = {module for module, _ in COMMANDS.values()}
    assert not commands & set(first)
    assert commands <= set(others[-1])
    for modules in (first, *others):
        assert "torch" not in modules
        assert "numpy" not in modules


def test_a_new_command_is_one_file_and_one_line(greet):
    greet(NEW)
    assert "Greet somebody" in call("--help").output
    assert call("greet", "Ann").output == "hello Ann\n"
    assert "restuning greet Ann" in call("greet", "--help").output


def test_commands_stand_in_the_order_of_use():
    text = call("--help").output
    places = [text.index(f"│ {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert list(COMMANDS)[:3] == ["train", "predict", "eval"]


def test_options_of_train_are_in_panels():
    text = call("train", "--help").output
    panels = ("Data", "Backbone", "Method", "Optimiser", "Features", "Output")
    places = [text.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places)
    assert "--learning-rate" in text


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_printed_as_they_must_be_typed(name, columns):
    made = load_command(name)
    for path, each in (
        [((name,), made)]
        if not hasattr(made, "commands")
        else [((name, inner), command) for inner, command in made.commands.items()]
    ):
        text = call(*path, "--help", COLUMNS=columns).output
        assert each.examples
        assert all(f" {example}\n" in text for example in each.examples)


def test_brackets_of_an_example_are_not_read_as_markup():
    text = call("train", "--help", COLUMNS="80").output
    assert "--method 'res-tuning[mha=prompt,ffn=adapter]' --epochs 30\n" in text


@pytest.mark.parametrize(
    "line", sorted({*EXAMPLES, *(e for each in all_parsers() for e in each.examples)})
)
def test_every_example_is_understood(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "settings.json").write_text('{"epochs": 3}')
    if line.endswith("--help"):
        line = line.removesuffix("--help") + "digits"
    assert parse(line).params


def test_what_is_completed_exists_and_all_methods_are():
    assert sorted(common.METHODS) == sorted([AUTO, *methods.names()])
    for kind in {name.partition(":")[0] for name in common.BACKBONES} - {"restuning-tiny"}:
        assert f"{kind}:" in " ".join(SCHEMES)
    assert common.complete_method("res-tuning-b") == ["res-tuning-bypass"]
    assert "timm:resnet50" in common.complete_backbone("timm:")


def test_a_shell_can_ask_for_completions():
    words = {"COMP_WORDS": "restuning train digits --method mix", "COMP_CWORD": "4"}
    done = call(_RESTUNING_COMPLETE="complete_bash", **words)
    assert done.output.split() == ["mixing-bypass"]


def test_defaults_in_the_help_are_those_of_the_library():
    """They are written twice, because asking the library would import torch."""
    defaults = {option.name: option.default for option in parsers("train")[0].params}
    for field in fields(FitSettings):
        assert field.name in defaults, "every setting is an option, so that settings.json is"
        # The method's own, and the problem's.
        if field.name not in ("epochs", "lr", "lambda_rate", "batch_size"):
            assert (defaults[field.name] or None) == (field.default or None), field.name
    assert defaults["max_tokens"] == LONGEST_TEXT
    assert bench.IMAGES == IMAGES
    rank = next(o for o in parsers("train")[0].params if o.name == "rank")
    assert rank.help.endswith(f": {methods.RANK}")


def test_ctrl_c_ends_with_a_sentence_and_exit_code_130(greet):
    greet(INTERRUPTED)
    done = call("greet", "Ann")
    assert done.exit_code == 130
    assert "goes on from there" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("trian", "digits"), ("train",), ("train", "x", "--lr", "y")]
)
def test_a_wrong_usage_ends_with_exit_code_2(arguments):
    assert call(*arguments).exit_code == 2


def test_names_with_brackets_are_printed_as_they_are(capsys, monkeypatch):
    common.show_rows([{"method": "res-tuning[ffn=adapter]", "label": "[bold]"}], "[red]title")
    text = capsys.readouterr().out
    for name in ("res-tuning[ffn=adapter]", "[bold]", "[red]title"):
        assert name in text


def takes_one(parameter):
    many = parameter.multiple or getattr(parameter, "is_flag", False) or parameter.nargs != 1
    return parameter.param_type_name == "option" and not many and parameter.name != "help"


@pytest.mark.parametrize("name", COMMANDS)
def test_one_value_given_twice_is_refused_by_every_command(name):
    """The last would win without a word."""
    for each in parsers(name):
        words = [name] if each.name == name else [name, each.name]
        for option in filter(takes_one, each.params):
            given = [word for value in "12" for word in (option.opts[0], value)]
            result = CliRunner().invoke(app, [*words, *given])
            assert result.exit_code == 2, (words, option.name, result.output)
            assert "is given 2 times" in " ".join(result.output.split()), (words, option.name)

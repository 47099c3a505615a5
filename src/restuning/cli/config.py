"""`--config FILE`: options from a YAML or JSON file, such as the `settings.json` that a run leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from restuning._errors import FormatError
from restuning._files import parse_json, read_bytes
from restuning.runtime.hub import named_in

NESTED = "options"
"""Where `settings.json` keeps what belongs to the method; its keys are options as well."""

IN_WORDS = {dict: "keys and values", list: "a list", str: "one line of text", type(None): "nothing"}

REFUSED = {
    "data": ("hf:",),
    "suite": ("hf:",),
    "what": ("hf:", "rm"),
    "pipeline": ("",),
    "store": (),
}
"""Values by how they begin that are an option's only if the user writes them."""

IN_PLACE = {"data": "", "suite": "", "what": "", "pipeline": "--pipeline ", "store": "--store "}
"""How these options are written."""

LARGEST = 2**18
"""Bytes of a file of options: YAML of this size takes a second or two, and real ones have a page."""

NOT_SAID = ("", "~", "null")
"""How YAML writes nothing."""


def use_config(ctx: typer.Context, file: Path | None) -> Path | None:
    """Make the values of a file the defaults of this command; the command line wins over them.

    Raises:
        FormatError: The file cannot be read, a key is no option, or a value does not fit.
    """
    # While a shell completes a line (`resilient_parsing`) a damaged file must not stop it.
    if file is None or ctx.resilient_parsing:
        return file
    options = _index_options(ctx)
    values: dict[str, Any] = {}
    for key, value in read_config(file).items():
        option = options.get(key.replace("-", "_"))
        if option is None:
            near = get_close_matches(key.replace("-", "_"), options, n=1)
            raise FormatError(
                f"no such option of `{ctx.command_path}`",
                where=f"{file}: {key}",
                found=f"did you mean {near[0]}?" if near else "",
                fix=f"see `{ctx.command_path} --help`; keys are its options",
            )
        values[option.name] = _parse_value(ctx, option, value, f"{file}: {key}")
    # Defaults and not values: click then lets what was typed win.
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return file


Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML or JSON file of options, e.g. the settings.json of a run; options given here win",
        callback=use_config,
        # Before all other options, whose defaults it sets.
        is_eager=True,
    ),
]


@contextmanager
def chosen_by_file(ctx: Any) -> Iterator[None]:
    """Inside, a backbone that the file of options names, and the user does not, is a file's choice.

    Such a name fetches nothing and executes nothing (`restuning.runtime.hub.named_in`).

    Raises:
        FormatError: The file asks for data of a hub, a pipeline, or to remove something.
    """
    file = ctx.params.get("config")
    # Members by name: typer has had its own copy of click's classes since version 0.2x.
    sources = {name: ctx.get_parameter_source(name) for name in (*REFUSED, "backbone")}
    said = {name for name, source in sources.items() if source and source.name == "DEFAULT_MAP"}
    for name in said - {"backbone"}:
        value = str(ctx.params[name])
        if value.startswith(REFUSED[name]) or "://" in value:
            raise FormatError(
                "a file of options does not choose what is fetched, executed or removed",
                where=f"{file}: {name}",
                found=value[:200],
                fix=f"write it on the command line, which wins over the file: {IN_PLACE[name]}"
                f"{value[:200]}",
            )
    with named_in(file if "backbone" in said else None):
        yield


def read_config(file: Path) -> dict[str, Any]:
    """The keys of a file that have a value; each value a string, or a list of strings.

    Raises:
        FormatError: It cannot be read, or is not a list of keys and values.
    """
    what, fix = "a file of options", "write lines such as `epochs: 30`, or JSON in a file NAME.json"
    try:
        text = read_bytes(file, LARGEST)
        content: Any
        if file.suffix == ".json":
            content = parse_json(text, str(file), what=what, fix=fix)
        else:
            content = _parse_yaml(text.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise FormatError(
            f"{what} cannot be read", where=str(file), found=found[:300], fix=fix
        ) from None
    if not isinstance(content, dict):
        raise FormatError(
            "a file of options has keys and values",
            where=str(file),
            found=IN_WORDS.get(type(content), "a single value"),
            fix="write lines such as `epochs: 30`",
        )
    # What stands at the top wins over the same key below `options`.
    inner = content.pop(NESTED, None)
    pairs = {**(inner if isinstance(inner, dict) else {}), **content}
    return {str(key): value for key, value in pairs.items() if value is not None}


def _parse_yaml(text: str) -> Any:
    import yaml

    # This loader makes strings, lists and dictionaries and nothing else: no tag builds an object,
    # and `precision: no` is the word and not False, as it would be to `safe_load`.
    try:
        content = yaml.BaseLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(content, dict):
        return content
    return {
        key: None if isinstance(value, str) and value in NOT_SAID else value
        for key, value in content.items()
    }


def _index_options(ctx: typer.Context) -> dict[str, Any]:
    """Parameters of a command by all keys they go by: `lr` and `learning_rate`."""
    named = {}
    for option in ctx.command.params:
        if option.name not in ("config", "help"):
            for name in (str(option.name), *option.opts):
                named[name.lstrip("-").replace("-", "_")] = option
    return named


def _parse_value(ctx: typer.Context, option: Any, value: Any, where: str) -> Any:
    """A value as the command line would have it, a list only where an option may be repeated."""
    repeated = bool(getattr(option, "multiple", False)) or option.nargs == -1
    values = value if isinstance(value, list) else [value]
    # The type and not the value itself is shown: what lies in a file may be of any length.
    if isinstance(value, dict) or (isinstance(value, list) and not repeated):
        found: str | None = IN_WORDS[type(value)]
    elif any(isinstance(each, dict | list) for each in values):
        found = "a list of lists"
    else:
        found = None
    texts: Any = None if found else [str(each) for each in values]
    if texts is not None:
        texts = texts if repeated else texts[0]
        # Tried here, where the file and the key can be named; click would name the option alone.
        try:
            option.process_value(ctx, texts)
        except typer.BadParameter as error:
            found = error.message
    if found:
        raise FormatError(
            "an option cannot have this value",
            where=where,
            found=found,
            fix=f"see `{ctx.command_path} --help`",
        )
    return texts

"""`restuning push`, `ls-hub`: tasks on a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from restuning.cli.common import (
    OUTPUT,
    Json,
    add_heading,
    command,
    group,
    messages,
    option,
    show_json,
    show_rows,
    size_in_words,
)

app = group("Tasks on a hub.")

HUB = "Hub"


@command(
    app,
    "restuning push runs/pets/pets.task user/pets --private",
    "restuning push pets.task user/zoo/pets --license apache-2.0",
    "restuning push pets.task user/pets --parent 4f1c9e2",
)
def push(
    task: Annotated[Path, typer.Argument(help="Task folder, or its run folder")],
    repository: Annotated[
        str, typer.Argument(help="user/repository, or user/repository/task for one of several")
    ],
    private: Annotated[
        bool, option(HUB, "Of a repository that is made now: seen by its owner alone", "--private")
    ] = False,
    revision: Annotated[
        str | None, option(HUB, "A branch, made if it is not there; default: main")
    ] = None,
    parent: Annotated[
        str | None,
        option(HUB, "The commit that is to be replaced; refused where another is the newest"),
    ] = None,
    license: Annotated[  # noqa: A002 (the hub's word)
        str | None, option(HUB, "For the card, by the hub's identifier, such as apache-2.0")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload a task in one commit; log in with `hf auth login` first, or set HF_TOKEN."""
    from dataclasses import asdict

    from restuning.task import push_to_hub

    done = push_to_hub(
        task, repository, private=private, revision=revision, parent=parent, license=license
    )
    if as_json:
        show_json({**asdict(done), "files": list(done.files)})
        return
    if done.commit == done.replaced:
        said = "nothing had changed"
    else:
        said = f"{len(done.files)} files" + f", in place of {done.replaced[:12]}" * bool(
            done.replaced
        )
    screen = messages(as_json)
    screen.print(add_heading("pushed", f"{done.name}: {said}"), soft_wrap=True)
    screen.print(add_heading("at", done.address), soft_wrap=True)


@command(
    app, "restuning ls-hub --user somebody", "restuning ls-hub --search pets --json", name="ls-hub"
)
def list_tasks(
    user: Annotated[str | None, option(HUB, "Only those of a user or an organisation")] = None,
    search: Annotated[str | None, option(HUB, "Words in their names")] = None,
    limit: Annotated[int, option(OUTPUT, "The most that are listed", min=1)] = 100,
    as_json: Json = False,
) -> None:
    """The tasks on a hub, by what their cards say, the newest first."""
    from dataclasses import asdict

    from restuning.task import list_hub

    found = [asdict(each) for each in list_hub(user, search, limit=limit)]
    if as_json:
        show_json(found)
        return
    rows = [
        {
            "name": each["name"] + " (private)" * each["private"],
            "problem": each["problem"],
            "backbone": each["backbone"],
            "figure": each["metric"],
            "revision": (each["revision"] or "")[:12],
            "size": size_in_words(each["bytes"]),
        }
        for each in found
    ]
    if rows:
        show_rows(rows, "tasks on the hub")
    else:
        messages(as_json).print("no task on the hub has such a name or user")

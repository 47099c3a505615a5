"""A task pushed to a hub, in one commit: who reads meanwhile finds the old task whole, or the new one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restuning._errors import FormatError, HubError, RestuningError, require, warn
from restuning._files import Claim, expand_home, read_bytes, seal, write_text
from restuning.runtime.hub import hub_address
from restuning.task.card import PICTURE, card_for_hub, index_card
from restuning.task.folder import CARD, DESCRIPTION, files_of, take_usual_names
from restuning.task.hub import (
    LARGEST,
    HubTask,
    api_of,
    explain,
    first_line,
    is_commit,
    reason_alone,
    tasks_in,
)
from restuning.task.save_and_load import WeightsFile, describe, find_in_folder

LARGEST_PICTURE = 4 * 2**20

SHORTEST_COMMIT = 7
"""Digits by which a commit is known."""

_PNG = b"\x89PNG\r\n\x1a\n"
_NOTHING = (".gitattributes", ".gitignore", "license", "license.txt", "license.md", CARD.lower())
"""Of a repository in which nothing is yet, in small letters."""


@dataclass(frozen=True)
class Pushed:
    """A task that lies on a hub now.

    Attributes:
        name: By which it is loaded, with its commit: `user/pets@4f1c...`.
        address: Of the commit.
        commit: That holds it.
        replaced: The commit before; the same where nothing had changed, "" in a repository that was empty.
        files: What was pushed, by its place in the repository.
    """

    name: str
    address: str
    commit: str
    replaced: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        """The address."""
        return self.address


def push_to_hub(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    parent: str | None = None,
    license: str | None = None,  # noqa: A002 (the hub's word)
    token: str | bool | None = None,
) -> Pushed:
    """Upload a task folder to the Hugging Face hub, in one commit.

    Pushed are the files of the task, its card with the lines that open it from there, and the curves of its run
    where it has some. A push that is killed leaves what was there before. What others push meanwhile is not
    written over: the commit that this push begins at must still be the newest when it ends.

    Args:
        path: What `save` left, or the run folder that it is in.
        repository: `user/repository`, made if it is not there; `user/repository/task` for one of several tasks in it.
        private: Of a repository that is made now; one that is there and public is refused.
        revision: A branch, made if it is not there; None for `main`.
        parent: The commit that is to be replaced (or how it begins): the push is refused where another is the newest.
        license: For the card, by the hub's identifier (`apache-2.0`); None for what the card says, here or there.
        token: That may write; None for that of the login (`hf auth login`, HF_TOKEN).

    Raises:
        FormatError: No task, a name that is none of a hub, or a repository that holds something else.
        HubError: Not logged in, not allowed, changed meanwhile, or the hub cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    path = find_in_folder(expand_home(path))
    # Before anything is made there.
    said = describe(path)
    named = _read_name(repository, revision)
    hub = require("huggingface_hub", "hub", "pushing a task")
    if why := reason_alone(False):
        raise HubError(
            "the task was not pushed",
            where=repository,
            found=why,
            fix="push where the hub answers; the folder here is as it was",
        )
    _warn_of_paths(said, path)
    api = api_of(hub, token)
    with tempfile.TemporaryDirectory() as aside:
        try:
            folder = _copy(path, Path(aside))
        except OSError as error:
            raise FormatError(
                "a task cannot be read",
                where=str(path),
                found=first_line(error),
                fix="restore it from where it was saved",
            ) from None
        try:
            return _push(hub, api, folder, named, private, parent, license, token)
        except RestuningError:
            raise
        except Exception as error:  # noqa: BLE001 (each version of the client raises others)
            raise explain(error, named, token, writing=True) from None


def _read_name(repository: str, revision: str | None) -> HubTask:
    named = HubTask.read(repository, revision)
    if named is None:
        raise FormatError(
            "not a name on a hub",
            where=repository,
            fix="give user/repository, or user/repository/task for one of several in it, without .task",
        )
    if named.revision and is_commit(named.revision):
        raise FormatError(
            "a commit is not pushed to",
            where=str(named),
            found="what is pushed makes a commit of its own",
            fix="give a branch as the revision; a commit that is to be replaced as --parent (parent=...)",
        )
    return named


def _push(
    hub: Any,
    api: Any,
    folder: Path,
    named: HubTask,
    private: bool,
    parent: str | None,
    license: str | None,  # noqa: A002
    token: str | bool | None,
) -> Pushed:
    # Said only where it is asked for: an organisation may make all of its own private.
    api.create_repo(named.repository, exist_ok=True, **({"private": True} if private else {}))
    if named.revision not in (None, "main"):
        api.create_branch(named.repository, branch=named.revision, exist_ok=True)
    info = api.model_info(named.repository, revision=named.revision, files_metadata=True)
    there = {each.rfilename: each.size for each in info.siblings or ()}
    newest = info.sha or ""
    if private and info.private is False:
        raise HubError(
            "the task was not pushed: the repository is there, and everybody sees it",
            where=named.repository,
            found="--private (private=True), which is of a repository that is made now",
            fix=f"make it private on {hub_address()}/{named.repository}/settings, or give another name",
        )
    _refuse_other_parent(named, parent, newest)
    _refuse_foreign(named, there)

    def read_card(place: str) -> str:
        return _read_there(hub, named, place, there, newest, token)

    card = folder / CARD
    written = card_for_hub(
        card.read_text(encoding="utf-8", errors="replace") if card.exists() else "",
        named.place,
        before=read_card(named.prefix + CARD),
        license=license,
        picture=(folder / PICTURE).exists(),
    )
    write_text(card, written)
    files = {named.prefix + file.name: file for file in sorted(folder.iterdir())}
    if named.task:
        tasks = sorted({*tasks_in(there), named.task})
        index = index_card(named.repository, tasks, written, read_card(CARD), license)
        if index:
            files[CARD] = folder.with_name("index.md")
            write_text(files[CARD], index)
    operations = [hub.CommitOperationAdd(place, str(file)) for place, file in files.items()]
    picture = named.prefix + PICTURE
    if picture in there and picture not in files:
        # Of the task that was there.
        operations.append(hub.CommitOperationDelete(picture))
    made = api.create_commit(
        named.repository,
        operations,
        commit_message=f"Task {named.name}",
        revision=named.revision,
        parent_commit=newest or None,
    )
    pinned = HubTask(named.repository, named.task, made.oid)
    return Pushed(str(pinned), made.commit_url, made.oid, newest, tuple(files))


def _copy(path: Path, aside: Path) -> Path:
    """What is pushed, apart: these and nothing else; what lies or is linked beside them is nobody's business.

    Raises:
        FormatError: A file is a link that leaves the folder.
        OSError: It cannot be read.
    """
    folder = aside / "task"
    folder.mkdir()
    with Claim.of_folder(path):
        # Nobody saves over it meanwhile.
        description = describe(path)
        for file in files_of(path):
            shutil.copyfile(file, folder / file.name)
    take_usual_names(folder, description)
    if stored := WeightsFile.from_description(description):
        # Folders of this machine are nobody's business; name and digest tell the file.
        description["backbone"]["weights"] = {**stored.to_dict(), "path": stored.name}
        write_text(folder / DESCRIPTION, json.dumps(seal(description), indent=1) + "\n")
    if picture := _read_picture(path):
        (folder / PICTURE).write_bytes(picture)
    return folder


def _read_picture(path: Path) -> bytes:
    """The curves that a run drew beside its task; empty where there are none.

    They are drawn of figures alone: no input of a user is on them.
    """
    file = path.resolve().parent / PICTURE
    if not (file.parent / "metrics.json").exists() or file.is_symlink() or not file.is_file():
        return b""
    try:
        content = read_bytes(file, LARGEST_PICTURE)
    except OSError:
        return b""
    return content if content.startswith(_PNG) else b""


def _warn_of_paths(description: Mapping[str, Any], path: Path) -> None:
    name = description["backbone"]["name"]
    _, _, rest = name.partition(":")
    rest = rest.removeprefix("local-dir:")
    # A hub's own names (`org/model`) are folders here only where somebody made one of that name.
    if rest.startswith(("/", "~", ".", "\\")) or expand_home(rest.split("+")[0] or "-").exists():
        warn(
            "a task names its backbone by a path of this machine",
            where=str(path),
            found=f"{name}, which is pushed as it is",
            fix="who loads the task must give the backbone: backbone=NAME (--backbone NAME)",
        )


def _refuse_other_parent(named: HubTask, parent: str | None, newest: str) -> None:
    if parent is not None and not (len(parent) >= SHORTEST_COMMIT and newest.startswith(parent)):
        raise HubError(
            "the task was not pushed: another commit is to be replaced than the newest",
            where=str(named),
            found=f"the newest is {newest or 'none'}, to be replaced is {parent}",
            fix=f"look at what is there now (`restuning info {named.place}`), then push again with "
            f"--parent {newest[:12]} (parent=...)",
        )


def _refuse_foreign(named: HubTask, there: Mapping[str, Any]) -> None:
    """Refuse a repository, or a folder in it, that holds something else: its card would be written over.

    Raises:
        FormatError: It does.
    """
    if named.prefix + DESCRIPTION in there:
        return
    if named.task:
        others = [file for file in there if file.startswith(named.prefix)]
    else:
        # Tasks in folders of their own, and then one that is the repository: what would `user/zoo` be?
        others = [file for file in there if file.lower() not in _NOTHING]
    if others:
        raise FormatError(
            "a place on the hub holds something else than a task",
            where=named.place,
            found=", ".join(sorted(others)[:6]),
            fix=f"give another name, such as {named.repository}/TASK for one of several tasks"
            if tasks_in(there) and not named.task
            else "give another name",
        )


def _read_there(
    hub: Any,
    named: HubTask,
    place: str,
    there: Mapping[str, int | None],
    commit: str,
    token: str | bool | None,
) -> str:
    """A card that is on the hub; empty where there is none, or one that is far too long."""
    size = there.get(place)
    if size is None or size > LARGEST[CARD]:
        return ""
    with tempfile.TemporaryDirectory() as aside:
        file = hub.hf_hub_download(
            named.repository,
            place,
            revision=commit,
            token=token,
            endpoint=hub_address(),
            cache_dir=aside,
        )
        return read_bytes(Path(file).resolve(), LARGEST[CARD]).decode("utf-8", "replace")

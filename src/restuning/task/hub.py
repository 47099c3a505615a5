"""Tasks on a hub: how they are named, how they are fetched by their commit, and which there are.

A name is `user/repository[/task][@revision]`. What is fetched is pinned: its folder in the cache of the hub is
called by the commit, and only a whole one is remembered for a branch or tag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restuning._errors import FormatError, HubError, RestuningError, require, warn
from restuning._files import JSON_BYTES, write_text
from restuning.problems import kinds
from restuning.runtime.hub import first_cached, hub_address, hub_answers, is_offline, naming_file
from restuning.task.folder import CARD, DESCRIPTION, WEIGHTS

LIBRARY = "restuning"
"""`library_name` of the cards, by which tasks are found on a hub."""

LARGEST = {DESCRIPTION: JSON_BYTES, CARD: 2**20, WEIGHTS: 8 * 2**30}
"""All that is fetched of a task, by name, and the most bytes of each."""

PATIENCE = 10.0
"""Seconds for the answer to one question to a hub."""

MOST_LISTED = 100

_NAME = re.compile(r"([\w-][\w.-]*)/([\w-][\w.-]*)(?:/([\w-][\w.-]*))?(?:@(.*))?", re.ASCII)
_REVISION = re.compile(r"[\w-][\w./-]{0,199}", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class HubTask:
    """A task on a hub: `user/repository`, or `user/repository/task` where a repository holds several.

    Attributes:
        repository: `user/name`.
        task: Its folder there; "" for a repository that is one task.
        revision: Branch, tag or commit; None for the newest.
    """

    repository: str
    task: str = ""
    revision: str | None = None

    @classmethod
    def read(cls, name: str | Path, revision: str | None = None) -> HubTask | None:
        """What a name says; None where it is none of a hub, such as a path.

        Args:
            name: `user/repository[/task][@revision]`; a name that ends in `.task` is that of a folder.
            revision: Where it stands beside the name.

        Raises:
            FormatError: A revision is none, or there are two.
        """
        text = name.as_posix() if isinstance(name, Path) else name
        found = _NAME.fullmatch(text)
        if found is None or (found[3] or found[2]).endswith(".task"):
            return None
        given = found[4]
        if given is not None and revision is not None and given != revision:
            raise FormatError(
                "two revisions of one task",
                where=text,
                found=f"{given} in the name and {revision} beside it",
                fix="give one",
            )
        wanted = revision if given is None else given
        if wanted is not None and (not _REVISION.fullmatch(wanted) or ".." in wanted):
            raise FormatError(
                "not a revision",
                where=text,
                found=repr(wanted)[:200],
                fix="give a branch, a tag or a commit, last: user/repository@v1, or user/repository/task@v1",
            )
        return cls(f"{found[1]}/{found[2]}", found[3] or "", wanted)

    def __str__(self) -> str:
        """As it is written."""
        return self.place + (f"@{self.revision}" if self.revision else "")

    @property
    def place(self) -> str:
        """The name without a revision."""
        return f"{self.repository}/{self.task}" if self.task else self.repository

    @property
    def name(self) -> str:
        """What the task is called in answers."""
        return self.place.rpartition("/")[2]

    @property
    def prefix(self) -> str:
        """What its files begin with in the repository."""
        return f"{self.task}/" if self.task else ""


def is_commit(revision: str) -> bool:
    """Whether a revision is the whole name of a commit, which never means another."""
    return _COMMIT.fullmatch(revision) is not None


def find_origin(folder: str | Path) -> str:
    """Where a task folder was fetched from, with the commit: `user/zoo/pets@4f1c...`; "" for folders of one's own.

    Args:
        folder: As `find_task` answers; those of a hub lie in its cache, whose folders are called so.
    """
    here = Path(folder).absolute()
    for snapshot, task in ((here, ""), (here.parent, here.name)):
        home = snapshot.parent.parent
        user, _, name = home.name.removeprefix("models--").partition("--")
        cached = snapshot.parent.name == "snapshots" and home.name.startswith("models--")
        if cached and name and _COMMIT.fullmatch(snapshot.name):
            return str(HubTask(f"{user}/{name}", task, snapshot.name))
    return ""


def is_cached(named: HubTask) -> bool:
    """Whether the task was fetched before."""
    return first_cached(named.repository, [named.prefix + DESCRIPTION], named.revision) is not None


def fetch(
    named: HubTask, *, token: str | bool | None = None, local_files_only: bool = False
) -> Path:
    """The folder of a task in the cache of the hub, after fetching what of it is not there.

    Its three files are fetched and nothing else, by the commit that the revision means now. Where the hub
    does not answer, or must not be asked, what was fetched before is taken.

    Args:
        named: The task.
        token: For repositories that are private; None for that of the login, False for none.
        local_files_only: Ask no hub.

    Raises:
        FormatError: There is no such task, or it was not fetched before and the hub cannot be asked.
        HubError: The hub refuses, or fails.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", "hub", "loading a task from the hub")
    if why := reason_alone(local_files_only):
        return _find_cached(named, why)
    pinned = named.revision is not None and is_commit(named.revision)
    if pinned and (found := _look_in_cache(named)):
        # A commit is what it was: nothing is asked.
        return found
    try:
        info = api_of(hub, token).model_info(
            named.repository, revision=named.revision, files_metadata=True, timeout=PATIENCE
        )
    except Exception as error:  # noqa: BLE001 (each version of the client raises others)
        failing = (status_of(error) or 500) >= 500
        if failing and (found := _look_in_cache(named)):
            warn(
                "the hub failed, and what was fetched before is taken",
                where=str(named),
                found=f"{find_origin(found)}; {first_line(error)}",
                fix="ask again for what is there now",
            )
            return found
        raise explain(error, named, token) from None
    commit = str(info.sha)
    if not is_commit(commit):
        raise HubError(
            "a hub does not tell which commit a task is of",
            where=str(named),
            found=repr(commit)[:100],
            fix=f"check that {hub_address()} (HF_ENDPOINT) is a hub",
        )
    sizes = {each.rfilename: each.size for each in info.siblings or ()}
    files = _check_files(named, sizes)
    try:
        folders = {
            _fetch_file(hub, named, file, commit, size, token) for file, size in files.items()
        }
    except RestuningError:
        raise
    except Exception as error:  # noqa: BLE001 (as above)
        raise explain(error, named, token) from None
    (folder,) = folders
    if not pinned:
        _remember(folder, named, commit)
    return folder


def api_of(hub: Any, token: str | bool | None) -> Any:
    """The client, at the address that `HF_ENDPOINT` says now."""
    return hub.HfApi(endpoint=hub_address(), token=token, library_name=LIBRARY)


def reason_alone(local_files_only: bool) -> str:
    """Why the hub is not asked; "" where it is."""
    if local_files_only:
        return "local_files_only=True"
    if file := naming_file():
        return f"it is named by {file}, and what a file names is not fetched"
    if is_offline():
        return "HF_HUB_OFFLINE is set"
    return "" if hub_answers() else "the hub does not answer"


def _look_in_cache(named: HubTask) -> Path | None:
    """The folder of a task that was fetched whole."""
    found = first_cached(named.repository, [named.prefix + DESCRIPTION], named.revision)
    return found.parent if found and (found.parent / WEIGHTS).is_file() else None


def _find_cached(named: HubTask, why: str) -> Path:
    if found := _look_in_cache(named):
        return found
    raise FormatError(
        "no such folder, and a task of this name was not fetched before",
        where=f"{Path(named.place).absolute()}{f' (at {named.revision})' if named.revision else ''}",
        found=f"{named}: {why}",
        fix="check the path; of a name on the hub, load it once where the hub answers, or copy the "
        "task folder here and give its path",
    )


def _check_files(named: HubTask, sizes: Mapping[str, int | None]) -> dict[str, int]:
    """The files of the task that are there, and their bytes.

    Raises:
        FormatError: It is none, or larger than a task is.
    """
    found = {name: sizes[named.prefix + name] for name in LARGEST if named.prefix + name in sizes}
    if missing := [name for name in (DESCRIPTION, WEIGHTS) if name not in found]:
        several = tasks_in(sizes)
        raise FormatError(
            "a repository holds several tasks"
            if several and not named.task
            else "no such task in a repository of the hub"
            if named.task
            else "a repository of the hub is no task",
            where=str(named),
            found=", ".join(several[:12])
            or f"no {missing[0]} among {', '.join([*sizes][:6]) or 'no files'}",
            fix=f"give one of them: {named.repository}/{several[0]}"
            if several
            else "give a repository that `restuning push` made",
        )
    for name, size in found.items():
        if size is None or size > LARGEST[name]:
            raise FormatError(
                "a file of a task on the hub is too large to be one",
                where=f"{named}: {name}",
                found="of unknown size" if size is None else f"{size:,} bytes",
                fix=f"at most {LARGEST[name]:,} are fetched; if you trust it, `hf download "
                f"{named.repository}` and give the folder",
            )
    return {named.prefix + name: int(size or 0) for name, size in found.items()}


def tasks_in(files: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Names of the tasks that a repository holds in folders of their own."""
    end = f"/{DESCRIPTION}"
    folders = [file.removesuffix(end) for file in files if file.endswith(end)]
    names = [HubTask.read(f"user/repository/{folder}") for folder in folders]
    return sorted(each.task for each in names if each and each.task and not each.revision)


def _fetch_file(
    hub: Any, named: HubTask, file: str, commit: str, size: int, token: str | bool | None
) -> Path:
    """Fetch one file unless it is there; the folder it lies in."""
    path = Path(
        hub.hf_hub_download(
            named.repository,
            file,
            revision=commit,
            token=token,
            endpoint=hub_address(),
            library_name=LIBRARY,
        )
    )
    if path.stat().st_size != size:
        raise HubError(
            "a file of the hub has another size than the hub says",
            where=f"{named}: {file}",
            found=f"{path.stat().st_size:,} bytes in place of {size:,}",
            fix=f"remove {path.resolve()} and load the task again",
        )
    return path.parent


def _remember(folder: Path, named: HubTask, commit: str) -> None:
    """Note the commit of a branch or tag, as the client does, when all files are there: offline it is whole."""
    snapshot = folder.parent if named.task else folder
    try:
        write_text(snapshot.parent.parent / "refs" / (named.revision or "main"), commit)
    except OSError:
        # A cache that others keep, and nobody writes here.
        return


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error of the client; None where no hub answered."""
    return getattr(getattr(error, "response", None), "status_code", None)


def first_line(error: BaseException) -> str:
    """What a client says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def explain(
    error: BaseException, named: HubTask, token: str | bool | None, *, writing: bool = False
) -> RestuningError:
    """What a hub meant by refusing, in words: who one is, what one may, and what there is are told apart.

    Args:
        error: Of the client.
        named: The task.
        token: That was given; None for that of the login.
        writing: Whether it was pushed.
    """
    what = "the task was not pushed" if writing else "the hub did not give a task"
    same = "; the folder here is as it was" if writing else ""
    status, kind = status_of(error), type(error).__name__
    where = str(named)
    if not writing:
        where = f"{named}, and no folder {Path(named.place).absolute()} is here"
    if kind == "RevisionNotFoundError":
        more = "; a revision stands last: user/repository/task@v1" * ("/" in (named.revision or ""))
        return FormatError(
            what,
            where=where,
            found=f"the repository has no revision {named.revision}{more}",
            fix="give a branch, a tag or a commit that it has",
        )
    if status == 401:
        sent = _has_token(token)
        return HubError(
            what,
            where=where,
            found="the hub does not know the token that was sent (401)"
            if sent
            else "no token was sent (401): the repository is private, or is not there",
            fix=f"{_LOG_IN} to a token that is valid{same}"
            if sent
            else f"check the name, and {_LOG_IN}{same}",
        )
    if kind == "GatedRepoError":
        return HubError(
            what,
            where=where,
            found="its owner admits who asks, and this token's user is not admitted (403)",
            fix=f"ask on {hub_address()}/{named.repository}{same}",
        )
    if status == 403:
        return HubError(
            what,
            where=where,
            found=f"the token may not {'write' if writing else 'read'} there (403)",
            fix=f"{_LOG_IN} to a token that may, of a user who may{same}",
        )
    if status == 404:
        return FormatError(
            what if writing else "no such folder, and the hub gave no such task",
            where=where,
            found="no such repository, or a private one that this token does not see (404)",
            fix="check the path; of a name on the hub, the name, and whose token it is" + same,
        )
    if status == 412:
        return HubError(
            what,
            where=where,
            found="somebody pushed there since this push began (412)",
            fix=f"look at what is there now (`restuning info {named.place}`), then push again{same}",
        )
    if status == 400 or (status is None and isinstance(error, ValueError)):
        return HubError(
            what,
            where=where,
            found=f"the hub refuses what was sent: {' '.join(str(error).split())}"[:400],
            fix=f"mend the name, or the head of the card (README.md, --license){same}"
            if writing
            else "check the name",
        )
    answer = f"the hub answers {status}" if status else "the hub cannot be reached"
    return HubError(
        what,
        where=where,
        found=f"{answer}: {first_line(error)}",
        fix="try again later"
        + (same or "; what was fetched before is opened with HF_HUB_OFFLINE=1"),
    )


def _has_token(token: str | bool | None) -> bool:
    if isinstance(token, str):
        return bool(token)
    hub = require("huggingface_hub", "hub", "asking a hub")
    return token is not False and bool(hub.get_token())


@dataclass(frozen=True)
class Listed:
    """A repository of tasks on a hub, as its card tells it.

    Attributes:
        name: `user/repository`.
        problem: Kind of answer; of several tasks none.
        backbone: The model on the hub that it was trained on.
        metric: A figure and what it is of, in words.
        revision: The newest commit.
        bytes: All that the hub keeps of it, older commits as well.
        private: Whether only its owner sees it.
    """

    name: str
    problem: str | None
    backbone: str | None
    metric: str | None
    revision: str | None
    bytes: int | None
    private: bool = False


def list_hub(
    user: str | None = None,
    search: str | None = None,
    *,
    limit: int = MOST_LISTED,
    token: str | bool | None = None,
) -> list[Listed]:
    """Repositories of tasks on the hub, those that changed last first.

    They are found by their cards (`library_name: restuning`); what a card says is its author's.

    Args:
        user: Only those of a user or an organisation.
        search: Words in their names.
        limit: The most that are told.
        token: As for `fetch`.

    Raises:
        HubError: The hub does not answer, or refuses.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", "hub", "looking at a hub")
    if why := reason_alone(False):
        raise HubError(
            "no hub to look at",
            where=hub_address(),
            found=why,
            fix="check the network, and try again",
        )
    try:
        found = api_of(hub, token).list_models(
            filter=LIBRARY,
            author=user,
            search=search,
            sort="last_modified",
            limit=limit,
            expand=["sha", "model-index", "tags", "private", "usedStorage"],
        )
        return [_listed(each) for each in found]
    except Exception as error:  # noqa: BLE001 (each version of the client raises others)
        status = status_of(error)
        raise HubError(
            "the hub did not tell its tasks",
            where=hub_address(),
            found=f"{status or 'no answer'}: {first_line(error)}",
            fix=f"{_LOG_IN} to a token that is valid"
            if status in (401, 403)
            else "try again later",
        ) from None


def _listed(info: Any) -> Listed:
    tags = [tag for tag in info.tags or () if isinstance(tag, str)]
    told = [tag for tag in tags if tag in kinds()]
    # The hub makes tags of a card: `base_model:org/model`, and again with the relation between the two.
    bases = [tag.partition(":")[2] for tag in tags if tag.startswith("base_model:")]
    return Listed(
        name=info.id,
        problem=", ".join(told) or None,
        backbone=", ".join(base for base in bases if ":" not in base)[:200] or None,
        metric=_first_metric(info.model_index),
        revision=info.sha,
        bytes=getattr(info, "used_storage", None),
        private=bool(info.private),
    )


def _first_metric(index: Any) -> str | None:
    """The first figure of a card; a stranger's card may hold anything."""
    try:
        result = index[0]["results"][0]
        metric = result["metrics"][0]
        value = metric["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        return f"{metric.get('name') or metric['type']} {shown} on {result['dataset']['name']}"[
            :100
        ]
    except (LookupError, TypeError, AttributeError, ValueError):
        return None

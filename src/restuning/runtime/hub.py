"""What may be fetched: nothing that a file names, and nothing where no hub answers.

Rooms that open models, tasks and data sets by name ask here; nothing of the package is imported.
"""

from __future__ import annotations

import importlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

HUB = "https://huggingface.co"
ANSWERS_WITHIN = 3.0
"""Seconds for the one attempt to connect. The clients of hubs try again for minutes."""
REMEMBERED = 60.0
"""Seconds for which it is taken for granted that a hub answers or does not."""

_named_in: ContextVar[str] = ContextVar("named_in", default="")
_offline: ContextVar[bool] = ContextVar("offline", default=False)
_asked: dict[str, tuple[float, bool]] = {}


class _Switch:
    """The client's switch: turned by the first that comes, and turned back by the last that leaves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = False

    def enter(self) -> None:
        """Turn it to offline."""
        constants = _client_constants()
        with self.lock:
            if not self.inside:
                self.before = bool(constants and constants.HF_HUB_OFFLINE)
                _set_switch(constants, True)
            self.inside += 1

    def leave(self) -> None:
        """Turn it back, unless others are inside."""
        with self.lock:
            self.inside -= 1
            if not self.inside:
                _set_switch(_client_constants(), self.before)


_switch = _Switch()


@contextmanager
def named_in(file: str | Path | None) -> Iterator[None]:
    """Inside, names of models are those that a file gives, and not the user.

    Such a name opens what is on this machine, in forms that execute nothing: it fetches nothing.

    Args:
        file: A task, the description of a grid, a file of options; None where the user names it.
    """
    token = _named_in.set("" if file is None else str(file))
    try:
        yield
    finally:
        _named_in.reset(token)


def naming_file() -> str:
    """The file that names what is opened now; "" where the user does."""
    return _named_in.get()


@contextmanager
def offline() -> Iterator[None]:
    """Inside, the client of the Hugging Face hub reads its cache, and every request of it raises.

    The client has one switch a process, which timm and open_clip take no argument for: another
    thread that fetches meanwhile is told that the client is offline.
    """
    _switch.enter()
    token = _offline.set(True)
    try:
        yield
    finally:
        _offline.reset(token)
        _switch.leave()


def is_offline() -> bool:
    """Whether calls made now may read the cache alone: inside `offline`, or by the environment."""
    constants = _client_constants()
    return _offline.get() or bool(constants and constants.HF_HUB_OFFLINE)


def hub_address() -> str:
    """Of the Hugging Face hub, or of the one that `HF_ENDPOINT` names."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def hub_answers(address: str = "") -> bool:
    """Whether a hub can be connected to: one attempt of 3 seconds, remembered for a minute.

    Args:
        address: "" for the Hugging Face hub, or what `HF_ENDPOINT` says. Behind a proxy it is the proxy
            that must answer.
    """
    if not address:
        if is_offline():
            return False
        address = hub_address()
    parts = urlsplit(address)
    host = parts.hostname or ""
    proxy = getproxies().get(parts.scheme or "https")
    if proxy and not proxy_bypass(host):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
    except ValueError:
        return False
    place = f"{parts.hostname}:{port}"
    when, answered = _asked.get(place, (0.0, False))
    if not when or time.monotonic() - when > REMEMBERED:
        answered = _connects(parts.hostname or "", port)
        _asked[place] = time.monotonic(), answered
    return answered


def first_cached(repository: str, names: Sequence[str], revision: str | None = None) -> Path | None:
    """The first of some files of a repository that was fetched before; None for none of them."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        return None
    for name in names:
        try:
            found = hub.try_to_load_from_cache(repository, name, revision=revision)
        except (ValueError, OSError):
            return None
        # Not a path: the hub said once that there is no such file.
        if isinstance(found, str) and Path(found).is_file():
            return Path(found)
    return None


def _connects(host: str, port: int) -> bool:
    done: list[bool] = []

    def attempt() -> None:
        try:
            with socket.create_connection((host, port), timeout=ANSWERS_WITHIN):
                done.append(True)
        except (OSError, UnicodeError):
            done.append(False)

    # A thread of its own: the time a name server takes cannot be limited.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(ANSWERS_WITHIN)
    return bool(done and done[0])


def _client_constants() -> Any:
    try:
        return importlib.import_module("huggingface_hub.constants")
    except ImportError:
        return None


def _set_switch(constants: Any, value: bool) -> None:
    if constants is None or bool(constants.HF_HUB_OFFLINE) is value:
        return
    constants.HF_HUB_OFFLINE = value
    # Versions before 1.0 look at the switch when a session is made.
    reset = getattr(importlib.import_module("huggingface_hub.utils"), "reset_sessions", None)
    if reset is not None:
        reset()

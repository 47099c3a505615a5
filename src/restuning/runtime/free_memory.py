"""How much memory this process may still take."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from restuning.runtime.processes import count_on_machine

MEMINFO = Path("/proc/meminfo")
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def read_free_memory() -> int | None:
    """Bytes that are free, of several processes of a run on this machine each one's part; None where nothing tells.

    On Linux what the kernel calls available, or what a control group (a container, a job of Slurm) still allows, if
    that is less; pages of files count as free, for the system drops them. On other systems half of what the machine has.
    """
    free = [each for each in (_available(), *_left_in_groups()) if each is not None]
    return min(free) // count_on_machine() if free else None


def _available() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in MEMINFO.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                # Linux writes kB and means 1024 bytes (man 5 proc).
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _left_in_groups() -> list[int]:
    """What each control group around this process still allows, of the second and the first version of them."""
    left = []
    with suppress(OSError):
        for line in OWN_GROUP.read_text(encoding="utf-8", errors="replace").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root = GROUPS / "memory" if kinds else GROUPS
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if not kinds:
                names = ("memory.max", "memory.current", "inactive_file")
            # In a container the path may be one of the machine outside: its own group then lies at the root.
            own = root / path.strip("/")
            for group in dict.fromkeys((own, *own.parents, root)):
                if (
                    group.is_relative_to(root)
                    and (bytes_left := _left_in(group, *names)) is not None
                ):
                    left.append(bytes_left)
    return left


def _left_in(group: Path, limit: str, usage: str, dropped: str) -> int | None:
    # "max" where there is no limit, which is no number.
    with suppress(OSError, ValueError, IndexError):
        most, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
        files = 0
        for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.split()[0] == dropped:
                files = int(line.split()[1])
        return max(0, most - used + files)
    return None

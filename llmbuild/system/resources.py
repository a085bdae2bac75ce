"""Memory and CPUs that this host, and the control groups (cgroup v1 and v2) of this process, provide.

Standard library alone: shared by the child processes, the loader and code that is shipped elsewhere. Every function
takes the root folder of the file system, so that a test can replace it.

A child group has no more than its parent, so the least limit from the own group up to the root counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 1 << 60
"""cgroup v1 writes a value above this where there is no limit."""
_V2 = "cgroup2"
_HOME = "sys/fs/cgroup"
"""Mount points of the groups if the mounts cannot be read."""


@dataclass(frozen=True)
class Bound:
    """A limit in bytes, and the file that sets it, to be named in messages."""

    bytes: int
    file: Path


@dataclass(frozen=True)
class _Names:
    """File names of one version of control groups, for memory."""

    limits: tuple[str, ...]
    used: str
    cache: str
    """The line of `memory.stat` with file pages that are reclaimable."""


_MEMORY = {
    "v1": _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    "v2": _Names(("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def memory_limit(root: Path = ROOT) -> Bound | None:
    """Return the maximum memory of a process here: the host's, or a control group's; None if unknown."""
    found = [bound for group, names in _memory_groups(root) if (bound := _limit(group, names))]
    total = meminfo("MemTotal", root)
    if total is not None:
        found.append(Bound(total, root / "proc/meminfo"))
    return min(found, key=lambda b: b.bytes, default=None)


def group_memory_limit(root: Path = ROOT) -> Bound | None:
    """Return the least memory limit of a control group around this process that is below the host's memory."""
    bound = memory_limit(root)
    return None if bound is None or bound.file == root / "proc/meminfo" else bound


def memory_available(root: Path = ROOT) -> Bound | None:
    """Return how much memory a new process could use now, and which file bounds it; None if unknown."""
    found = []
    for group, names in _memory_groups(root):
        if bound := _limit(group, names):
            used = (_number(group / names.used) or 0) - _stat(group, names.cache)
            found.append(Bound(max(0, bound.bytes - max(0, used)), bound.file))
    free = meminfo("MemAvailable", root)
    if free is not None:
        found.append(Bound(free, root / "proc/meminfo"))
    return min(found, key=lambda b: b.bytes, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many CPUs' worth of time the control groups allow, such as 1.5; None where they do not bound it."""
    found = []
    for group in _groups("cpu", root):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is None:
            words = [*_text(group / "cpu.max").split(), "", ""]
            quota, period = _whole(words[0]), _whole(words[1]) or 100_000
        if quota is not None and quota > 0 and period:
            found.append(quota / period)
    return min(found, default=None)


def group_cpus(root: Path = ROOT) -> frozenset[int] | None:
    """Return the numbers of the CPUs that the control groups allow; None if unknown."""
    names = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
    told = (cpu_list(_text(group / name)) for group in _groups("cpuset", root) for name in names)
    return next((cpus for cpus in told if cpus), None)


def host_cpus(root: Path = ROOT) -> frozenset[int] | None:
    """Return the numbers of the CPUs that are online; None if unknown."""
    return cpu_list(_text(root / "sys/devices/system/cpu/online")) or None


def cpu_list(text: str) -> frozenset[int]:
    """Return the numbers of a list such as `0-3,8`; none for an invalid one."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        begin, end = _whole(first), _whole(last if dash else first)
        if begin is not None and end is not None:
            found.update(range(begin, end + 1))
    return frozenset(found)


def meminfo(name: str, root: Path = ROOT) -> int | None:
    """Return a value of /proc/meminfo in bytes; None if unknown."""
    match = re.search(rf"^{name}:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


# --- control groups ----------------------------------------------------------------------------------------------


def _memory_groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Yield each group that bounds this process's memory."""
    for group in _groups("memory", root):
        v1 = (group / _MEMORY["v1"].limits[0]).exists()
        yield group, _MEMORY["v1" if v1 else "v2"]


def _limit(group: Path, names: _Names) -> Bound | None:
    found = [Bound(value, group / name) for name in names.limits if (value := _number(group / name)) is not None]
    return min((b for b in found if b.bytes < _UNLIMITED), key=lambda b: b.bytes, default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups in a controller, its own first, then their parents.

    Both versions may be mounted side by side; a controller belongs to one of them, and the other has no file of it.
    """
    own = _own_groups(root)
    for kind, mount, begin in _mounts(root):
        name = _V2 if kind == _V2 else controller
        if kind != _V2 and controller not in kind.split(","):
            continue
        path = own.get(name, begin)
        inside = path.removeprefix(begin.rstrip("/")) if _is_inside(path, begin) else ""
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        for count in range(len(parts), -1, -1):
            group = mount.joinpath(*parts[:count])
            if _text(group / "memory.use_hierarchy").strip() == "0" and count < len(parts):
                break  # of cgroup v1: a parent's limit then does not apply to its children
            if group.is_dir():
                yield group


def _is_inside(path: str, begin: str) -> bool:
    return begin == "/" or path == begin or path.startswith(f"{begin}/")


def _own_groups(root: Path) -> dict[str, str]:
    """Return the path of this process's group by controller; that of v2 by `cgroup2`."""
    found = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(",") if controllers else [_V2] if number == "0" else []:
            found[name] = path
    return found


def _mounts(root: Path) -> list[tuple[str, Path, str]]:
    """Return, for each mounted hierarchy, its controllers (or `cgroup2`), its folder, and its root group."""
    found = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, dash, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if not dash or len(fields) < 5 or len(rest) < 1 or rest[0] not in ("cgroup", _V2):
            continue
        kind = _V2 if rest[0] == _V2 else rest[-1]
        found.append((kind, root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3])))
    if found:
        return found
    home = root / _HOME
    if (home / "cgroup.controllers").exists() or (home / "memory.max").exists():
        return [(_V2, home, "/")]
    return [(path.name, path, "/") for path in sorted(home.glob("*")) if path.is_dir()] if home.is_dir() else []


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


# --- files -------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    return _whole(_text(path).strip())


def _whole(text: str) -> int | None:
    """Return a whole number; None for `max`, for an empty text, and for anything else."""
    return int(text) if re.fullmatch(r"-?\d{1,20}", text) else None


def _stat(group: Path, name: str) -> int:
    match = re.search(rf"^{name} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
    return int(match[1]) if match else 0

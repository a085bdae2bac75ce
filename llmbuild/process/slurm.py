"""Slurm by the library submitit, an extra: what a place on it asks for, and the one place where it is imported."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from llmbuild.errors import InputError

SLURM = "slurm"
"""The default partition of the cluster whose commands are on PATH."""
TOOLS = ("sbatch", "srun", "sacct", "scancel")
NAME = "llmbuild"
"""Name of every job, so that `squeue` and `scancel` find them."""
MARGIN_S = 120.0
"""Seconds that a job may take beside its work: Python starts, and files come through a network."""
_ANSWERS_S = 60
_SAFE = re.compile(r"[^\s'\"\\$`;#]+")


@dataclass(frozen=True)
class Options:
    """Options of `sbatch` and `srun`, by their names; empty is left out."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gres: str = ""
    nodelist: str = ""
    mem: str = ""
    time: str = ""
    exclusive: bool = False
    requeue: bool = True
    """Whether Slurm may begin the job again itself."""

    def pairs(self) -> dict[str, str | bool]:
        """Return what is given, as submitit writes it; True is a switch."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "requeue"}
        return {name: value for name, value in given.items() if value} | ({} if self.requeue else {"no-requeue": True})

    def words(self) -> list[str]:
        """Return what is given, as a command reads it."""
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in self.pairs().items()]


NO_OPTIONS = Options()


@dataclass(frozen=True)
class Asked:
    """What the jobs of a build ask of Slurm, and where their files are; empty is Slurm's own default."""

    partition: str = ""
    devices: str = ""
    """Partition of what measures; empty: the same."""
    account: str = ""
    qos: str = ""
    cpus: int = 1
    """CPUs of a compile."""
    mem: str = ""
    """Memory of a compile, such as `8G`."""
    constraint: str = ""
    """Features of a node that measures, in place of the label of its target."""
    gres: str = ""
    """Generic resources of what measures, in place of a GPU for a target that is no CPU."""
    lease: str = ""
    """Minutes, or Slurm's days-hours, that a device is held for at most."""
    folder: str = ""
    """Folder that all nodes see; empty: one in the user's cache."""

    def compiling(self) -> Options:
        """Return the options of a compile. A lost one is begun again here, so Slurm shall not do it too."""
        return replace(self._shared(), partition=self.partition, mem=self.mem, requeue=False)

    def measuring(self, label: str, gpu: bool) -> Options:
        """Return the options of a job that has a node for itself, with all of its memory.

        Args:
            label: what the node must be called as a feature; empty: any.
            gpu: whether it must have one.
        """
        return replace(
            self._shared(),
            partition=self.devices or self.partition,
            constraint=self.constraint or label,
            gres=self.gres or ("gpu:1" if gpu else ""),
            exclusive=True,
            mem="0",
        )

    def leasing(self, measuring: Options, node: str) -> Options:
        """Return the options of a lease: a job that measures, on one node."""
        return replace(measuring, nodelist=node, time=self.lease)

    def _shared(self) -> Options:
        return Options(account=self.account, qos=self.qos)


OPTION_NAMES = tuple(field.name for field in fields(Asked) if field.name != "partition")


def is_slurm(text: str) -> bool:
    """Return whether a text names a place on Slurm: `slurm`, or `slurm://PARTITION?OPTIONS`."""
    return text == SLURM or text.startswith(f"{SLURM}:")


def asked_of(text: str) -> Asked:
    """Return what `slurm` or `slurm://[PARTITION][?OPTION=VALUE&...]` asks for.

    Raises:
        InputError: not of this form, or an option that there is not.
    """
    if text == SLURM:
        return Asked()
    form = f"--on {text!r}: write slurm://[PARTITION][?OPTION=VALUE&...]; options are {', '.join(OPTION_NAMES)}"
    try:
        parts = urlsplit(text)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise InputError(f"{form}: {error}") from None
    if not text.startswith(f"{SLURM}://") or parts.path.strip("/") or parts.fragment:
        raise InputError(form)
    given = dict(pairs)
    if len(given) < len(pairs) or given.keys() - set(OPTION_NAMES):
        wrong = ", ".join(sorted(given.keys() - set(OPTION_NAMES))) or "one is given twice"
        raise InputError(f"{form}: {wrong}")
    for value in (*given.values(), *([parts.netloc] if parts.netloc else [])):
        if not _SAFE.fullmatch(value):
            raise InputError(f"{form}: {value!r} is no value (& is written %26, + is written %2B)")
    cpus = given.pop("cpus", "1")
    if not cpus.isascii() or not cpus.isdigit() or int(cpus) < 1:
        raise InputError(f"{form}: cpus is a number from 1, not {cpus!r}")
    if "folder" in given and not Path(given["folder"]).is_absolute():
        raise InputError(f"{form}: folder is an absolute path that all nodes see")
    return Asked(parts.netloc, cpus=int(cpus), **given)


def connected(asked: Asked) -> Any:
    """Return submitit's executor for this cluster, with a new folder for the files of its jobs.

    What this process has from a job of Slurm in which it may run itself is forgotten: new jobs are no part of that.

    Raises:
        InputError: submitit is not installed, or there is no Slurm that tells how its jobs are.
    """
    if find_spec("submitit") is None:
        raise InputError("submitit is not installed: pip install 'llmbuild[slurm]'")
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        raise InputError(f"no Slurm here: {', '.join(missing)} not on PATH; build where jobs are submitted")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_")) and name != "SLURM_CONF"]:
        del os.environ[name]
    _tells_states()
    import submitit

    return submitit.AutoExecutor(jobs_folder(asked.folder), SLURM, slurm_python=python())


def python() -> str:
    """Return the shell's words for this Python on a node; the folder of the job is not searched for modules."""
    return shlex.join([sys.executable, "-P"])


def jobs_folder(named: str = "") -> Path:
    """Return a new folder that only this user reads, below the named one or in the user's cache.

    Raises:
        InputError: it cannot be made.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    base = Path(named) if named else home / "llmbuild/slurm"
    try:
        base.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="build-", dir=base))
    except OSError as error:
        raise InputError(f"{base}: no folder for the files of jobs: {error.strerror}; folder=PATH names one") from None


def _tells_states() -> None:
    """Ask Slurm for nothing.

    Raises:
        InputError: it does not answer, or keeps no account of jobs.
    """
    try:
        done = subprocess.run(
            ["sacct", "--noheader", "--allocations", "--starttime=now", "--format=JobID"],
            capture_output=True,
            text=True,
            timeout=_ANSWERS_S,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"Slurm did not answer sacct within {_ANSWERS_S} s") from None
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"it ended with {done.returncode}"
        raise InputError(f"Slurm's accounting is needed to watch jobs, and sacct says: {why}")

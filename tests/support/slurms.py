"""Slurm's commands as far as a build uses them: jobs are processes here, and a test says what befalls them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

SBATCH = """\
echo "sbatch $*" >>calls
if [ -f refusal ]; then cat refusal >&2; exit 1; fi
n=$(($(cat last) + 1))
echo $n >last
cp "$1" $n.sh
option() { sed -n "s/^#SBATCH --$1=//p" $n.sh | tr -d "'" | sed "s/%j/$n/g"; }
out=$(option output) err=$(option error)
fate=$(sed -n ${n}p fates)
case "$fate" in
"")
    echo RUNNING >$n.state
    (
        SLURM_JOB_ID=$n SLURMD_NODENAME=n1 setsid sh -c "cd /; exec sh $PWD/$n.sh" >$out 2>$err &
        echo $! >$n.pid
        if wait $!; then end=COMPLETED; else end=FAILED; fi
        [ "$(cat $n.state)" != RUNNING ] || echo $end >$n.state
    ) </dev/null >/dev/null 2>&1 &
    ;;
PENDING) echo PENDING >$n.state ;;
*) echo "$fate" >$n.state && echo "slurmstepd: error: *** JOB $n ON n1 CANCELLED: $fate ***" >$err ;;
esac
echo "Submitted batch job $n"
"""
SACCT = """\
if [ -f disabled ]; then cat disabled >&2; exit 1; fi
case "$*" in *-j*) ;; *) exit 0 ;; esac
echo "JobID|State|NodeList"
for one in *.state; do echo "${one%.state}|$(cat $one)|n1"; done
"""
SCANCEL = """\
echo "scancel $*" >>calls
echo "CANCELLED by 1000" >$1.state
[ ! -f $1.pid ] || kill -KILL -$(cat $1.pid)
"""
SRUN = """\
echo "srun $*" >>calls
if [ -f refusal ]; then cat refusal >&2; exit 1; fi
while case "$1" in --*) ;; *) false ;; esac do shift; done
echo $$ >srun.pid
cd /
exec "$@"
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster with one node, `n1`."""

    folder: Path

    @staticmethod
    def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
        """Put its commands first on PATH; its state is in the folder, and jobs' files are below it."""
        folder.mkdir()
        for name, text in (("sbatch", SBATCH), ("sacct", SACCT), ("scancel", SCANCEL), ("srun", SRUN)):
            path = folder / name
            path.write_text(f"#!/bin/sh\ncd {folder}\n{text}")
            path.chmod(0o755)
        for name, text in (("last", "0\n"), ("fates", ""), ("calls", "")):
            (folder / name).write_text(text)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return Slurm(folder)

    def fates(self, *states: str) -> None:
        """Say how the next jobs end; an empty one runs, as all further ones do."""
        (self.folder / "fates").write_text("".join(f"{state}\n" for state in states))

    def refuses(self, told: str) -> None:
        """Refuse what is asked from now on."""
        (self.folder / "refusal").write_text(told)

    def keeps_no_account(self) -> None:
        """Tell nothing of jobs."""
        (self.folder / "disabled").write_text("Slurm accounting storage is disabled\n")

    def calls(self, command: str) -> list[str]:
        """Return the arguments of each call of a command."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.removeprefix(f"{command} ") for line in lines if line.startswith(f"{command} ")]

    def script(self, job: int) -> list[str]:
        """Return the lines of a job's script."""
        return (self.folder / f"{job}.sh").read_text().splitlines()

    def files(self) -> list[str]:
        """Return what builds have left for jobs."""
        return sorted(path.name for path in (self.folder / "cache/llmbuild/slurm").glob("*/*"))

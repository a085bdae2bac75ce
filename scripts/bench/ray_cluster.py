"""A fleet and a build on a cluster of Ray of three nodes on this machine, one of which is killed on the way.

    python scripts/bench/ray_cluster.py fleet [--fleet FILE] [--seconds S] [--rate N] [-C CATALOG] [--json]
    python scripts/bench/ray_cluster.py build [--target TARGET] [--trials N] [--json]

Needs `llmbuild[ray]`. All addresses are of the loopback. Only processes that this script has started are ended.

`fleet` runs `llmbuild orchestrate FLEET --on ray` and sends streams at Poisson times; halfway a node that runs a
replica is killed, with everything on it. `accepted` are requests that were not refused with 429 or 503. `lost` are
requests that ended without an end of the answer and without an error; `failed` ended with an error. `twice` are streams
with more tokens than were asked for or with a second end. `recovery_s` is from the kill to as many replicas as before.

`build` builds two tiny models on the cluster, kills a node while it compiles, builds the same on this machine, and
compares: variants by key, artifacts and programs by digest, and quality.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

import fleet_live
from comparison.script import end, say

from llmbuild.errors import InputError
from llmbuild.fleet.policies.named import POLICIES
from llmbuild.fleet.simulate.trace import Arrival, Trace
from llmbuild.process.rays import VARIABLE
from llmbuild.report.table import table
from llmbuild.runtime import reader
from llmbuild.spec.files.fleet import read_fleet

STORE_BYTES = 80 << 20
SLOW = {
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_failure_threshold": "20",
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
}
"""Of a machine that does much besides."""
WAIT_S = 600.0
TEXT = "def push(self, item):\n    self.items.append(item)\n\n" * 40
SHAPE = {
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
RECIPE = """\
name: {name}
model: {{huggingface: {model}}}
workloads:
  - {{name: short, prompt: 8, output: 8, context: 32}}
objectives: [tpot_s, ttft_s, parameter_bytes]
quality: {{text: {{file: {text}}}, tokens: 64}}
budget: {{trials: {trials}, time: 30m}}
sampler: random
knobs:
  kernel: [compiler]
  opt_level: [O2]
  data_tiling: [off]
  split_reduction: [false]
"""


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fleet", "build"))
    parser.add_argument("--fleet", type=Path, default=Path(__file__).parents[2] / "recipes/fleets/local.yaml")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--target", default="x86-64-v3")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


# --- the cluster -----------------------------------------------------------------------------------------------------


class Nodes:
    """A cluster of three nodes: the first one has Ray's own state, and is not killed."""

    def __init__(self, resources: dict[str, float]) -> None:
        from ray.cluster_utils import Cluster

        self.made: Any = Cluster()
        for i in range(3):
            more = {"include_dashboard": False} if i == 0 else {}
            own = {**resources, "llmbuild_device": 1.0} if i == 0 else resources
            self.made.add_node(
                wait=False,
                num_cpus=1,
                object_store_memory=STORE_BYTES,
                resources=own,
                node_ip_address=f"127.0.0.{i + 2}",
                **more,
            )
        self.made.wait_for_nodes(WAIT_S)
        self.address = str(self.made.address)

    def running(self, word: str) -> Any:
        """Return a node, not the first, below which a process runs that has a word in its command; None without one."""
        found = processes()
        for node in self.made.worker_nodes:
            below, more = set[int](), {node.all_processes["raylet"][0].process.pid}
            while more:
                below |= more
                more = {pid for pid, (parent, _) in found.items() if parent in more} - below
            if any(word in found[pid][1] for pid in below & found.keys()):
                return node
        return None

    def kill(self, node: Any) -> None:
        """Kill the processes of a node, as if it were cut off from power."""
        self.made.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End the cluster."""
        self.made.shutdown()


def processes() -> dict[int, tuple[int, str]]:
    """Return the parent and the command of every process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = (parent, command)
    return found


@contextlib.contextmanager
def cluster(resources: dict[str, float]) -> Iterator[Nodes]:
    """Start a cluster; its address is in the environment of what is started in the block."""
    os.environ.update(SLOW)
    try:
        nodes = Nodes(resources)
    except ImportError:
        raise InputError("Ray is not installed: pip install 'llmbuild[ray]'") from None
    os.environ[VARIABLE] = nodes.address
    say(f"three nodes of Ray, {nodes.address} is the first")
    try:
        yield nodes
    finally:
        nodes.close()


# --- the fleet -------------------------------------------------------------------------------------------------------


def steady(rate: float, seconds: float, prompt: int, output: int) -> Trace:
    """Return Poisson arrivals of one length."""
    rng, at_s, found = random.Random(0), 0.0, list[Arrival]()
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        found.append(Arrival(at_s, prompt, output))
    return Trace("steady", tuple(found), seconds)


def orchestrated(nodes: Nodes, asked: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Run the fleet with requests and a kill; return its figures."""
    fleet = read_fleet(asked.fleet, tuple(POLICIES))
    kind = fleet.services[0].classes[0]
    trace = steady(asked.rate, asked.seconds, int(kind.prompt), int(kind.output))
    path = fleet_live.with_load(asked.fleet, folder, 1e4, trace.arrivals)  # so much that every node is needed
    run = fleet_live.Run("static-peak")
    words = ["-m", "llmbuild", "orchestrate", path, "-C", asked.catalog, "--on", "ray", "--port", "0"]
    log = folder / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *map(str, words), "--policy", run.policy], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise InputError(f"the fleet did not start: {log.read_text()[-2000:]}")
        asyncio.run(sent(url, fleet.services[0].name, trace, run, nodes, fleet.nodes[0].count))
    finally:
        process.terminate()
        run.code = process.wait(WAIT_S)
        process.stdout.close()
        run.told = log.read_text().splitlines()
        say("\n".join(line for line in run.told if line.partition(" ")[0] in fleet_live.TOLD))
    return fleet_live.figures(run, fleet, trace)


async def sent(url: str, model: str, trace: Trace, run: fleet_live.Run, nodes: Nodes, wanted: int) -> None:
    """Send the requests once all replicas are there, and kill a node halfway."""
    until = time.monotonic() + WAIT_S
    while await fleet_live.replicas(url) < wanted and time.monotonic() < until:
        await asyncio.sleep(fleet_live.LOOK_S)
    looking = asyncio.ensure_future(looks(url, run, nodes, trace.seconds / 2, time.monotonic()))
    run.sent = await asyncio.to_thread(fleet_live.heard, url, model, trace)
    await asyncio.wait((looking,), timeout=WAIT_S)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)


async def looks(url: str, run: fleet_live.Run, nodes: Nodes, kill_s: float, began: float) -> None:
    """Count replicas until there are, after the kill, as many as before it."""
    before, fewer = 0, False
    while run.recovered_s == inf:
        now = time.monotonic() - began
        count = await fleet_live.replicas(url)
        run.replicas.append((now, count))
        if run.killed_s == inf and now >= kill_s:
            node, before = nodes.running("serve"), count
            if node is None:
                raise InputError("no node but the first runs a replica")
            run.killed_s = now
            await asyncio.to_thread(nodes.kill, node)
        elif run.killed_s < inf and count < before:
            fewer = True
        elif fewer:
            run.recovered_s = now - run.killed_s
        await asyncio.sleep(fleet_live.LOOK_S)


# --- the build -------------------------------------------------------------------------------------------------------


def recipes(folder: Path, trials: int) -> list[Path]:
    """Write two tiny models and their recipes."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library: Any = transformers
    (folder / "text.py").write_text(TEXT)
    found = []
    for i, hidden in enumerate((64, 128)):
        name = f"tiny-{hidden}"
        torch.manual_seed(i)
        config = library.LlamaConfig(**SHAPE, hidden_size=hidden)
        library.LlamaForCausalLM(config).save_pretrained(folder / name)
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
        made.save(str(folder / name / "tokenizer.json"))
        path = folder / f"{name}.yaml"
        path.write_text(RECIPE.format(name=name, model=folder / name, text=folder / "text.py", trials=trials))
        found.append(path)
    return found


def built(paths: Sequence[Path], catalog: Path, asked: argparse.Namespace, *more: str) -> subprocess.Popen[str]:
    """Begin a build."""
    words = [sys.executable, "-m", "llmbuild", "build", *paths, "-C", catalog, "-t", asked.target, "--json", *more]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    """Wait for a build; return what it told."""
    _, told = process.communicate()
    say(told)
    if process.returncode:
        raise InputError(f"a build ended with {process.returncode}")
    return told


def killed_while_compiling(nodes: Nodes, process: subprocess.Popen[str]) -> str:
    """Kill a node on which the compiler runs; return whether there was one before the build had ended."""
    while process.poll() is None:
        node = nodes.running("iree-compile")
        if node is not None:
            nodes.kill(node)
            return "while it compiled"
        time.sleep(0.02)
    return "not killed: the build had ended"


def compared(names: Sequence[str], there: Path, here: Path) -> list[dict[str, object]]:
    """Return for each recipe how many variants of two catalogs are equal, and in what."""
    found = []
    for name in names:
        rows = [{str(r["variant"]): r for r in reader.variants(each, name, everything=True)} for each in (there, here)]
        both = [(rows[0][key], rows[1][key]) for key in rows[0].keys() & rows[1].keys()]
        same = {
            column: sum(a[column] == b[column] for a, b in both)
            for column in ("artifact", "program", "quality_kl", "quality_top1", "machine_digest")
            if not both or column in both[0][0]
        }
        failed = sum(r["status"] == "failed" for r in rows[0].values())
        found.append(
            {
                "recipe": name,
                "ray": len(rows[0]),
                "local": len(rows[1]),
                "same key": len(both),
                **same,
                "failed": failed,
            }
        )
    return found


def farmed(nodes: Nodes, asked: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Build on the cluster and here; return the comparison."""
    paths = recipes(folder, asked.trials)
    there, here = folder / "ray", folder / "local"
    process = built(paths, there, asked, "--on", "ray", "-j", "3")
    what = list[str]()
    killer = threading.Thread(target=lambda: what.append(killed_while_compiling(nodes, process)))
    killer.start()
    finished(process)
    killer.join()
    finished(built(paths, here, asked))
    return [{**row, "node killed": what[0]} for row in compared([path.stem for path in paths], there, here)]


def main() -> None:
    """Run one of both."""
    asked = options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.what == "fleet":
            kinds = {
                f"llmbuild_{kind.name}": float(kind.slots) for kind in read_fleet(asked.fleet, tuple(POLICIES)).nodes
            }
            with cluster(kinds) as nodes:
                found = [orchestrated(nodes, asked, folder)]
            columns = (
                "policy",
                "requests",
                "accepted",
                "answered",
                "failed",
                "lost",
                "twice",
                "recovery_s",
                "exit_code",
            )
            found = [{key: one[key] for key in columns} for one in found]
        else:
            with cluster({f"llmbuild_target_{asked.target}": 1.0}) as nodes:
                found = farmed(nodes, asked, folder)
    if asked.json:
        print(json.dumps(found, default=str))
    else:
        rows = [[f"{v:.1f}" if isinstance(v, float) else v for v in one.values()] for one in found]
        print(table(list(found[0]), rows, (0,)))


if __name__ == "__main__":
    end(main)

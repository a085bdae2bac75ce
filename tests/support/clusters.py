"""A simulated cluster: an API server on the loopback over objects in memory, and what acts on them as time goes by.

Deployments make pods, a scheduler places them by labels, taints and what nodes have left, nodes make them ready and let
them end. Nodes are lost and come back. Time is what a test says.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.schemas import faults

Object = dict[str, Any]
TOKEN = "of-the-test"
_PATH = re.compile(r"/(api/v1|apis/[a-z0-9.]+/v1)(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


class Answered(Exception):
    """An error that the server answers with."""

    def __init__(self, status: int, told: str) -> None:
        super().__init__(told)
        self.status = status


@dataclass
class Cluster:
    """The objects of a cluster by what they are, their namespace and their name."""

    ready_s: float = 3.0
    drain_s: float = 2.0
    now: float = 0.0
    objects: dict[tuple[str, str, str], Object] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Verbs and kinds of all requests."""
    created: list[Object] = field(default_factory=list)
    refusals: list[tuple[str, str, int]] = field(default_factory=list)
    """Verb, kind and status of requests that are to be refused, each once."""
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    broken: dict[str, Object] = field(default_factory=dict)
    """States of containers that never run, by a word of their arguments."""
    url: str = ""
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # --- for tests ---------------------------------------------------------------------------------------------------

    def node(self, name: str, cpus: int = 8, taint: str = "", labels: Object | None = None, **devices: int) -> None:
        """Add a node."""
        offers = {"cpu": str(cpus), "memory": "64000000000", **{f"nvidia.com/{k}": str(n) for k, n in devices.items()}}
        taints = [{"key": taint, "effect": "NoSchedule"}] if taint else []
        self.objects["nodes", "", name] = {
            "metadata": {"name": name, "labels": labels or {}},
            "spec": {"taints": taints},
            "status": {"allocatable": offers, "conditions": [{"type": "Ready", "status": "True"}]},
        }

    def silence(self, name: str) -> None:
        """Let a node be heard of no more: what it runs can neither end nor be seen."""
        self.objects["nodes", "", name]["status"]["conditions"][0]["status"] = "Unknown"

    def remove(self, name: str) -> None:
        """Take a node away, with its pods."""
        del self.objects["nodes", "", name]
        for key, pod in list(self.objects.items()):
            if key[0] == "pods" and pod["spec"].get("nodeName") == name:
                del self.objects[key]

    def all(self, plural: str, namespace: str = "llm") -> list[Object]:
        """Return the objects of a kind in a namespace."""
        self.settle()
        return [one for (kind, space, _), one in self.objects.items() if (kind, space) == (plural, namespace)]

    def put(self, body: Object) -> Object:
        """Create an object as `kubectl apply` would."""
        plural = f"{body['kind'].lower()}s"
        return self._create(plural, body["metadata"].get("namespace", ""), body)

    def kubeconfig(self, folder: Path) -> Path:
        """Return a file that gives access."""
        path = folder / "kubeconfig.json"
        named = {"name": "test", "cluster": {"server": self.url}}
        user = {"name": "test", "user": {"token": TOKEN}}
        context = {"name": "test", "context": {"cluster": "test", "user": "test"}}
        top = {"apiVersion": "v1", "kind": "Config", "current-context": "test"}
        path.write_text(json.dumps({**top, "clusters": [named], "users": [user], "contexts": [context]}))
        return path

    # --- requests ----------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, token: str, body: Object | None) -> tuple[int, Object]:
        """Answer a request by its status and an object."""
        with self._lock:
            try:
                return self._answer(method, target, token, body)
            except Answered as error:
                status = {"kind": "Status", "apiVersion": "v1", "code": error.status, "message": str(error)}
                return error.status, status

    def _answer(self, method: str, target: str, token: str, body: Object | None) -> tuple[int, Object]:
        parts, query = urlsplit(target), parse_qs(urlsplit(target).query)
        match = _PATH.fullmatch(parts.path)
        if token != f"Bearer {TOKEN}":
            raise Answered(401, "Unauthorized")
        if match is None:
            raise Answered(404, f"the server has no {parts.path}")
        _, namespace, plural, name = match.groups()
        verb = {"GET": "get" if name else "list", "POST": "create", "PUT": "update", "DELETE": "delete"}[method]
        self.asked.append((verb, plural))
        self._refuse(verb, plural)
        self.settle()
        key = (plural, namespace or "", name or "")
        if verb == "list":
            return 200, self._list(plural, namespace or "", query)
        if verb == "create":
            assert body is not None
            return 201, self._create(plural, namespace or "", body)
        if key not in self.objects:
            raise Answered(404, f'{plural} "{name}" not found')
        if verb == "get":
            return 200, self.objects[key]
        assert body is not None
        return 200, self._update(key, body) if verb == "update" else self._delete(key, body)

    def _refuse(self, verb: str, plural: str) -> None:
        if (verb, plural) in self.forbidden:
            raise Answered(403, f"{plural} is forbidden: User cannot {verb} resource")
        for one in self.refusals:
            if one[:2] == (verb, plural):
                self.refusals.remove(one)
                raise Answered(one[2], "try again later")

    def _list(self, plural: str, namespace: str, query: dict[str, list[str]]) -> Object:
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", [""])[0].split(",") if pair)
        found = [
            one
            for (kind, space, _), one in sorted(self.objects.items())
            if (kind, space) == (plural, namespace) and wanted.items() <= one["metadata"].get("labels", {}).items()
        ]
        first, most = int(query.get("continue", ["0"])[0]), int(query.get("limit", ["500"])[0])
        rest = {"continue": str(first + most)} if first + most < len(found) else {}
        return {"kind": "List", "apiVersion": "v1", "metadata": rest, "items": found[first : first + most]}

    def _create(self, plural: str, namespace: str, body: Object) -> Object:
        metadata = body["metadata"]
        wrong = faults(body) + [f"name {metadata['name']!r}" for _ in (1,) if not _NAME.fullmatch(metadata["name"])]
        wrong += [f"label {value!r}" for value in metadata.get("labels", {}).values() if not _LABEL.fullmatch(value)]
        wrong += [] if metadata.get("namespace", "") == namespace else ["namespace"]
        if wrong:
            raise Answered(422, f"{body['kind']} is invalid: {wrong}")
        if (plural, namespace, metadata["name"]) in self.objects:
            raise Answered(409, f'{plural} "{metadata["name"]}" already exists')
        self.created.append(json.loads(json.dumps(body)))
        return self._add(plural, namespace, body)

    def _add(self, plural: str, namespace: str, body: Object) -> Object:
        self._count += 1
        own = {"uid": f"uid-{self._count}", "resourceVersion": str(self._count), "creationTimestamp": self._time()}
        made = {**json.loads(json.dumps(body)), "metadata": {**body["metadata"], "namespace": namespace, **own}}
        self.objects[plural, namespace, body["metadata"]["name"]] = made
        return made

    def _update(self, key: tuple[str, str, str], body: Object) -> Object:
        if wrong := faults(body):
            raise Answered(422, f"invalid: {wrong}")
        if body["metadata"].get("resourceVersion") != self.objects[key]["metadata"]["resourceVersion"]:
            raise Answered(409, "the object has been modified; please apply your changes to the latest version")
        self._count += 1
        made = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self._count)}}
        self.objects[key] = made
        return made

    def _delete(self, key: tuple[str, str, str], options: Object) -> Object:
        one = self.objects[key]
        if wrong := faults(options):
            raise Answered(422, f"invalid: {wrong}")
        if options.get("preconditions", {}).get("uid", one["metadata"]["uid"]) != one["metadata"]["uid"]:
            raise Answered(409, "the UID in the precondition does not match")
        if key[0] == "pods" and options.get("gracePeriodSeconds") != 0:
            self._end(one)
        elif options.get("propagationPolicy") == "Foreground":
            one["metadata"].setdefault("deletionTimestamp", self._time())
        else:
            del self.objects[key]
        return one

    # --- what acts on the objects ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let pods, garbage, deployments, the scheduler and the nodes do what is due."""
        self._run_all()
        for key, one in list(self.objects.items()):
            if key[0] == "deployments":
                self._keep(key, one)
        self._run_all()

    def _run_all(self) -> None:
        owners = {one["metadata"]["uid"] for key, one in self.objects.items() if key[0] == "deployments"}
        for key, pod in list(self.objects.items()):
            if key[0] == "pods":
                if pod["metadata"]["ownerReferences"][0]["uid"] not in owners:
                    self._end(pod)
                self._run(key, pod)

    def _keep(self, key: tuple[str, str, str], one: Object) -> None:
        """Let a deployment have one pod; none where it is being deleted."""
        uid = one["metadata"]["uid"]
        own = [p for p in self._pods() if p["metadata"]["ownerReferences"][0]["uid"] == uid]
        if "deletionTimestamp" in one["metadata"]:
            for pod in own:
                self._end(pod)
            if not own:
                del self.objects[key]
        elif not [pod for pod in own if "deletionTimestamp" not in pod["metadata"]]:
            template = one["spec"]["template"]
            owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": key[2], "uid": uid, "controller": True}
            name = f"{key[2][:50]}-{self._count}"
            metadata = {**template["metadata"], "name": name, "ownerReferences": [owner]}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
            self._add("pods", key[1], pod)["status"] = {"phase": "Pending"}

    def _run(self, key: tuple[str, str, str], pod: Object) -> None:
        """Place a pod, make it ready, or let it end, when it is time."""
        if "nodeName" not in pod["spec"] and "deletionTimestamp" not in pod["metadata"]:
            self._place(pod)
        node = self.objects.get(("nodes", "", pod["spec"].get("nodeName", "")))
        if "deletionTimestamp" in pod["metadata"]:
            if node is None or (_sound(node) and self.now >= pod["ends"]):
                del self.objects[key]
            return
        if node is None or not _sound(node):
            return
        words = pod["spec"]["containers"][0]["args"]
        state = next((state for word, state in self.broken.items() if word in words), None)
        if state is not None:
            pod["status"]["containerStatuses"] = [{"name": "server", "ready": False, **state}]
            pod["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
        elif self.now >= pod["placed"] + self.ready_s:
            pod["status"].update(phase="Running", podIP=f"10.0.0.{int(pod['metadata']['uid'][4:]) % 250 + 1}")
            pod["status"]["conditions"] = [{"type": "Ready", "status": "True"}]

    def _place(self, pod: Object) -> None:
        node = next((n for (kind, _, _), n in self.objects.items() if kind == "nodes" and self._fits(n, pod)), None)
        if node is None:
            told = {"reason": "Unschedulable", "message": "0 nodes are available"}
            pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", **told}]
        else:
            pod["spec"] = {**pod["spec"], "nodeName": node["metadata"]["name"]}
            pod["placed"], pod["status"]["conditions"] = self.now, [{"type": "PodScheduled", "status": "True"}]

    def _fits(self, node: Object, pod: Object) -> bool:
        spec, there = pod["spec"], node["metadata"]["labels"]
        borne = {one["key"] for one in spec.get("tolerations", ())}
        if not _sound(node) or not spec["nodeSelector"].items() <= there.items():
            return False
        if any(taint["key"] not in borne for taint in node["spec"]["taints"]):
            return False
        mine = [p for p in self._pods() if p["spec"].get("nodeName") == node["metadata"]["name"]]
        return all(
            sum(_amount(one, name) for one in (*mine, pod)) <= int(node["status"]["allocatable"].get(name, 0))
            for name in spec["containers"][0]["resources"]["requests"]
        )

    def _end(self, pod: Object) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            pod["metadata"]["deletionTimestamp"], pod["ends"] = self._time(), self.now + self.drain_s

    def _pods(self) -> list[Object]:
        return [one for key, one in self.objects.items() if key[0] == "pods"]

    def _time(self) -> str:
        return (_BEGAN + timedelta(seconds=self.now)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _sound(node: Object) -> bool:
    return bool(node["status"]["conditions"][0]["status"] == "True")


def _amount(pod: Object, name: str) -> int:
    return int(pod["spec"]["containers"][0]["resources"]["requests"].get(name, 0))


@contextlib.contextmanager
def served(cluster: Cluster) -> Iterator[Callable[[], None]]:
    """Serve a cluster on the loopback until the block ends, or the function is called that it yields."""

    class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: no connection outlives its answer, nor the server
        def log_message(self, *_: Any) -> None:
            pass

        def _do(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "")
            status, found = cluster.answer(self.command, self.path, token, json.loads(data) if data else None)
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 429:
                self.send_header("Retry-After", "30")
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = _do  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    cluster.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    thread.start()

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join(10)

    try:
        yield end
    finally:
        if thread.is_alive():
            end()

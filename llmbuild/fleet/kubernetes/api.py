"""The API server through the official client, with objects as plain data: one home for its library and its errors.

Objects are lists and mappings, as the server writes them: few of their fields are read, and the client's classes
refuse values of newer servers. Nothing is asked again here: the fleet's loop does it at its next beat.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config
from yaml import YAMLError

from llmbuild.errors import InputError
from llmbuild.fleet.kubernetes.names import Object
from llmbuild.system.strict_json import loads

TIMES_S = (3.05, 10.0)
"""Seconds to connect, and to wait for an answer."""
PAGE = 500
"""Objects that are asked for at a time."""
_DEFAULT = "~/.kube/config"
_TOLD = 300


@dataclass(frozen=True)
class Kind:
    """A kind of objects: the part of the API that has it, its name there, and whether namespaces have it."""

    api: str
    plural: str
    namespaced: bool = True


DEPLOYMENTS = Kind("apis/apps/v1", "deployments")
PODS = Kind("api/v1", "pods")
NODES = Kind("api/v1", "nodes", namespaced=False)
LEASES = Kind("apis/coordination.k8s.io/v1", "leases")


class Refused(OSError):
    """The API server has answered that it does not, or has not answered: then its status is 0."""

    def __init__(self, status: int, told: str) -> None:
        super().__init__(told)
        self.status, self.told = status, told

    def __str__(self) -> str:
        return self.told


class Api:
    """The objects of one namespace, and the nodes."""

    def __init__(self, access: client.ApiClient, namespace: str) -> None:
        self._access, self.namespace = access, namespace

    @property
    def host(self) -> str:
        """Return the address of the API server."""
        return str(self._access.configuration.host)

    def listed(self, kind: Kind, selector: str = "") -> list[Object]:
        """Return the objects that a selector of labels chooses.

        Raises:
            Refused: the server does not answer so.
        """
        found: list[Object] = []
        query = [("limit", str(PAGE)), *([("labelSelector", selector)] if selector else [])]
        page = self._ask("GET", self._path(kind), query)
        found += page["items"]
        while again := page.get("metadata", {}).get("continue"):
            page = self._ask("GET", self._path(kind), [*query, ("continue", again)])
            found += page["items"]
        return found

    def read(self, kind: Kind, name: str) -> Object | None:
        """Return an object; None where there is none.

        Raises:
            Refused: the server does not answer so.
        """
        try:
            return self._ask("GET", self._path(kind, name))
        except Refused as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    def create(self, kind: Kind, body: Object) -> Object:
        """Create an object and return it.

        Raises:
            Refused: the server does not: there is one of that name (409), or it is invalid, or not allowed.
        """
        return self._ask("POST", self._path(kind), body=body)

    def replace(self, kind: Kind, body: Object) -> Object:
        """Write an object that was read, and return it.

        Raises:
            Refused: the server does not: somebody else has written it meanwhile (409), or it is gone.
        """
        return self._ask("PUT", self._path(kind, body["metadata"]["name"]), body=body)

    def delete(self, kind: Kind, name: str, body: Mapping[str, Any]) -> None:
        """Let an object be deleted, with the options of `body`; one that is gone is deleted.

        Raises:
            Refused: the server does not.
        """
        options = {"apiVersion": "v1", "kind": "DeleteOptions", **body}
        try:
            self._ask("DELETE", self._path(kind, name), body=options)
        except Refused as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    def _path(self, kind: Kind, name: str = "") -> str:
        within = f"/namespaces/{self.namespace}" if kind.namespaced else ""
        return f"/{kind.api}{within}/{kind.plural}{name and '/'}{name}"

    def _ask(self, method: str, path: str, query: Any = None, body: Object | None = None) -> Object:
        """Return the object that the server answers with."""
        headers = {"Accept": "application/json", **({"Content-Type": "application/json"} if body else {})}
        try:
            request = self._access.param_serialize(
                method, path, query_params=query or [], header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            answer = self._access.call_api(*request, _request_timeout=TIMES_S)
            status, data = int(answer.status), answer.read()
        except (urllib3.exceptions.HTTPError, client.ApiException, config.ConfigException, OSError) as error:
            told = " ".join(str(error).split())[:_TOLD]
            raise Refused(0, f"the API server at {self.host} does not answer: {told}") from None
        try:
            found = loads(data)
        except ValueError:
            found = {}
        if status >= HTTPStatus.BAD_REQUEST or not isinstance(found, dict):
            message = found.get("message") if isinstance(found, dict) else ""
            raise Refused(status, f"the API server answers {status}: {str(message or 'nothing that is JSON')[:_TOLD]}")
        return found


def connected(namespace: str, kubeconfig: Path | None = None, context: str | None = None) -> Api:
    """Return the cluster of a kubeconfig file, or the one that this process runs in where there is no such file.

    Raises:
        InputError: there is neither, or the file has no such context.
    """
    settings = client.Configuration()
    settings.retries = False
    try:
        if kubeconfig is not None or context is not None or _has_file():
            told = None if kubeconfig is None else str(kubeconfig)
            config.load_kube_config(told, context=context, client_configuration=settings, persist_config=False)
        else:
            config.load_incluster_config(client_configuration=settings)
    except (config.ConfigException, YAMLError, OSError, ValueError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())[:_TOLD]
        raise InputError(f"no access to a cluster ({told}): give --kubeconfig FILE and --context NAME") from None
    return Api(client.ApiClient(settings), namespace)


def _has_file() -> bool:
    """Return whether there is a kubeconfig file where every client looks for it."""
    paths = os.environ.get("KUBECONFIG", _DEFAULT).split(os.pathsep)
    return any(Path(path).expanduser().is_file() for path in paths if path)

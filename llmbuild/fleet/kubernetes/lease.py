"""One orchestrator of a fleet at a time: a Lease in the fleet's namespace, renewed while its holder lives.

Clocks of machines differ: a holder counts as gone when its lease has not changed for its whole length by our clock.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus

from llmbuild.errors import InputError
from llmbuild.fleet.kubernetes.api import LEASES, Api, Refused
from llmbuild.fleet.kubernetes.names import Object

LEASE_S, RENEW_S = 15, 5.0
"""Seconds after which a silent holder is gone, and between two signs of life."""
_LOOK_S = 1.0


class Lease:
    """The right to run a fleet."""

    def __init__(self, api: Api, name: str, labels: dict[str, str], clock: Callable[[], float]) -> None:
        self._api, self._name, self._labels, self._clock = api, name, labels, clock
        self.holder = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        self._renewed_s = float("-inf")

    def take(self, wait: Callable[[float], None]) -> None:
        """Take it, waiting for the end of a holder that is silent.

        Raises:
            InputError: another orchestrator has it and lives, or the server does not give it.
        """
        first, since_s = self._read(), self._clock()
        while (now := self._read()) is not None and self._holder(now):
            if self._sign(now) != self._sign(first):
                told = f"another orchestrator runs this fleet: {self._holder(now)}"
                raise InputError(f"{told} (lease {self._name} in {self._api.namespace}): end it")
            if self._clock() - since_s >= (now["spec"].get("leaseDurationSeconds") or LEASE_S):
                break
            wait(_LOOK_S)
        try:
            self._write(now)
        except Refused as error:
            raise InputError(f"lease {self._name} in {self._api.namespace}: {error}") from None

    def renew(self) -> None:
        """Give a sign of life, where it is time.

        Raises:
            InputError: another orchestrator has taken it.
            Refused: the server does not answer.
        """
        if self._clock() - self._renewed_s < RENEW_S:
            return
        found = self._api.read(LEASES, self._name)
        if found is not None and self._holder(found) not in (self.holder, ""):
            raise InputError(f"another orchestrator has taken over this fleet: {self._holder(found)}")
        try:
            self._write(found)
        except Refused as error:
            if error.status != HTTPStatus.CONFLICT:  # else somebody writes it: the next look tells who
                raise

    def release(self) -> None:
        """Give it back, if it is still held and the server answers; else it runs out."""
        with contextlib.suppress(OSError):
            found = self._api.read(LEASES, self._name)
            if found is not None and self._holder(found) == self.holder:
                self._api.replace(LEASES, {**found, "spec": {**found["spec"], "holderIdentity": ""}})

    def _read(self) -> Object | None:
        try:
            return self._api.read(LEASES, self._name)
        except Refused as error:
            raise InputError(f"lease {self._name} in {self._api.namespace}: {error}") from None

    def _write(self, found: Object | None) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": self.holder, "leaseDurationSeconds": LEASE_S, "renewTime": now}
        metadata = {"name": self._name, "namespace": self._api.namespace, "labels": self._labels}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        if found is None:
            self._api.create(LEASES, body)
        else:  # with the version that was read: of two who take it, one succeeds
            self._api.replace(LEASES, {**found, "spec": spec})
        self._renewed_s = self._clock()

    @staticmethod
    def _holder(found: Object) -> str:
        return str(found.get("spec", {}).get("holderIdentity") or "")

    @staticmethod
    def _sign(found: Object | None) -> tuple[object, object]:
        spec = (found or {}).get("spec", {})
        return spec.get("holderIdentity"), spec.get("renewTime")

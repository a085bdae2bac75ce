"""Publish to an OCI registry through oras: one uncompressed layer for each blob, so that a mount can map it.

The manifest of the publication is the artifact's config; a signature and the time are annotations; the tag is put last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbuild.catalog.exchange.interface import Pointer
from llmbuild.catalog.location import reference
from llmbuild.digest import of_bytes
from llmbuild.errors import CatalogError, InputError, LoadRefused
from llmbuild.system.extras import advice
from llmbuild.system.strict_json import dumps, loads

if TYPE_CHECKING:
    from oras.container import Container

    from llmbuild.catalog.exchange.publication import Publication

ARTIFACT = "application/vnd.llmbuild.catalog.v1"
CONFIG = "application/vnd.llmbuild.manifest.v1+json"
DATABASE = "application/vnd.llmbuild.catalog.v1.sqlite3"
BLOB = "application/vnd.llmbuild.blob.v1"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
SIGNATURE = "dev.llmbuild.signature"
PUBLISHED = "dev.llmbuild.published"
CONNECT_S = 20
LOCAL = ("localhost", "127.0.0.1")
LOCAL_6 = "[::1]"


class Registry:
    """`oci://HOST/NAME[:TAG]`; a local registry is used without TLS, as other clients do."""

    def __init__(self, location: str) -> None:
        try:
            from oras.container import Container
            from oras.provider import Registry as Oras
        except ImportError as error:
            raise InputError(f"{location}: needs oras: {advice(error, 'publish')}") from None
        self.location, self.named = location, reference(location)
        host, name = self.named.host, self.named.name
        self.client: Any = Oras(hostname=host, insecure=is_local(host))
        self.container: Container = Container(name.rpartition("/")[2], registry=host)
        self.container.registry, self.container.namespace = host, name.rpartition("/")[0] or None
        self.container.tag, self.container.digest = self.named.tag, self.named.digest or None
        with reported_by_place(location):
            self.client.auth.load_configs(self.container)
            # oras retries for two minutes: right for a temporary error, not for a wrong name
            self.client.session.get(f"{self.client.prefix}://{host}/v2/", timeout=CONNECT_S)

    def ready(self) -> None:
        """Refuse a digest, which names existing content."""
        if self.named.digest:
            raise InputError(f"{self.location}: a digest names what was published: publish to a tag")

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: a registry collects untagged content by its own rules."""
        return contextlib.nullcontext()

    def pointer(self) -> bytes | None:
        """Return the pointer that corresponds to the tag's manifest."""
        with reported_by_place(self.location):
            url = f"{self.client.prefix}://{self.container.manifest_url()}"
            answer = self.client.do_request(url, "GET", headers={"Accept": MANIFEST})
            if answer.status_code == 404:
                return None
            _good(answer, self.location)
            if self.named.digest and f"sha256:{of_bytes(answer.content)}" != self.named.digest:
                raise LoadRefused(f"{self.location}: the registry's manifest has other bytes than the digest says")
            body = loads(answer.content)
        if body.get("artifactType") != ARTIFACT and body.get("config", {}).get("mediaType") != CONFIG:
            raise CatalogError(f"{self.location}: is not a catalog of llmbuild")
        notes = body.get("annotations") or {}
        found = {"manifest": body["config"]["digest"].removeprefix("sha256:"), "published_at": notes.get(PUBLISHED, "")}
        if SIGNATURE in notes:
            found["signature"] = notes[SIGNATURE]
        return dumps(found).encode()

    def has(self, digest: str, size: int) -> bool:
        """Return whether a blob is uploaded; uploads to a registry are atomic."""
        with reported_by_place(self.location):
            return bool(self.client.blob_exists({"digest": f"sha256:{digest}"}, self.container))

    def put(self, digest: str, path: Path) -> None:
        """Upload a blob."""
        layer = {"digest": f"sha256:{digest}", "size": path.stat().st_size, "mediaType": BLOB}
        with reported_by_place(self.location):
            _good(self.client.upload_blob(str(path), self.container, layer), self.location)

    def fetch(self, digest: str, path: Path) -> None:
        """Download a blob to a file."""
        with reported_by_place(self.location):
            self.client.download_blob(self.container, f"sha256:{digest}", str(path))

    def finish(self, pointer: Pointer, publication: Publication) -> None:
        """Put the tag's manifest; its blobs are uploaded before."""
        body = loads(publication.manifest)
        layers = [self._layer(body["catalog"]["digest"], body["catalog"]["bytes"], DATABASE, {})]
        for name, entry in body["blobs"].items():
            layers.append(self._layer(name, entry["bytes"], BLOB, publication.annotations.get(name, {})))
        notes = {**publication.summary, PUBLISHED: pointer["published_at"]}
        if pointer.get("signature"):
            notes[SIGNATURE] = pointer["signature"]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "config": self._layer(publication.digest, len(publication.manifest), CONFIG, {}),
            "layers": layers,
            "annotations": notes,
        }
        with reported_by_place(self.location):
            _good(self.client.upload_manifest(manifest, self.container), self.location)

    def _layer(self, digest: str, size: int, media: str, notes: dict[str, str]) -> dict[str, object]:
        layer: dict[str, object] = {"mediaType": media, "digest": f"sha256:{digest}", "size": size}
        return {**layer, "annotations": notes} if notes else layer


def is_local(host: str) -> bool:
    """Return whether a registry is on this machine."""
    return host.startswith(LOCAL_6) or host.partition(":")[0] in LOCAL


def _good(answer: Any, location: str) -> None:
    if answer.status_code not in (200, 201, 202):
        told = str(getattr(answer, "text", "") or "")[:200]
        raise CatalogError(f"{location}: the registry answered {answer.status_code}: {told}")


@contextlib.contextmanager
def reported_by_place(location: str) -> Iterator[None]:
    """Turn an error of the network or the library into one message."""
    import requests

    try:
        yield
    except requests.RequestException as error:
        raise CatalogError(f"{location}: the registry cannot be reached: {error}") from None
    except ValueError as error:  # how the library reports rejected credentials
        raise CatalogError(f"{location}: {error}") from None

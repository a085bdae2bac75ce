"""Keys of a server: only those of the file are taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmbuild.errors import InputError
from llmbuild.serve.api.keys import Keys
from tests.support.server import local

REQUEST = {"model": "fake", "prompt": "hej", "temperature": 0}


def test_only_keys_of_the_file_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the build farm\nfirst-key-0123456789\n\nsecond-key-0123456789\n")
    with local(keys=Keys.read(path)) as server, server.client() as client:
        for key in ("first-key-0123456789", "second-key-0123456789"):
            headers = {"authorization": f"Bearer {key}"}
            assert client.post("/v1/completions", json={**REQUEST, "max_tokens": 1}, headers=headers).status_code == 200
            assert not any(key in line for line in server.log)
        for given in ({}, {"authorization": "Bearer first-key"}, {"authorization": "Basic first-key-0123456789"}):
            for call in (
                client.get("/v1/models", headers=given),
                client.post("/v1/completions", json=REQUEST, headers=given),
            ):
                assert (call.status_code, call.json()["error"]["code"]) == (401, "invalid_api_key")
            assert client.get("/metrics", headers=given).status_code == 401
        assert [client.get(p).status_code for p in ("/health", "/ready")] == [200, 200]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"# none\n", "no key in it"),
        (b"short\n", "line 1: a key has 16"),
        (b"a b" * 9, "line 1"),
        (b"\xff\xff", "not a text"),
    ],
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "keys").write_bytes(data)
    with pytest.raises(InputError, match=told):
        Keys.read(tmp_path / "keys")
    with pytest.raises(InputError, match="No such file"):
        Keys.read(tmp_path / "none")

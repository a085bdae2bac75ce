"""Objects of Kubernetes as text that `kubectl apply -f -` reads: YAML documents, or one list in JSON."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from llmbuild.system.strict_json import dumps


def as_yaml(objects: Sequence[Mapping[str, Any]]) -> str:
    """Return a document for each object, its keys in their order."""
    from ruamel.yaml import YAML

    writer, text = YAML(typ="rt"), io.StringIO()
    writer.default_flow_style = False
    writer.width = 4096  # a word is never broken over lines
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.representer.ignore_aliases = lambda data: True  # kubectl reads anchors, people do not
    for one in objects:
        text.write("---\n")
        writer.dump(one, text)
    return text.getvalue().rstrip("\n")


def as_json(objects: Sequence[Mapping[str, Any]]) -> str:
    """Return one object of the kind List."""
    return dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})

"""The thin loader: read a catalog, pick a variant, open it, generate.

Needs the standard library, numpy, iree.runtime, and for text tokenizers, for chats jinja2; imports only `spec`,
`system`, `errors` and `digest`.
"""

from __future__ import annotations

from llmbuild.runtime.model import Model, load
from llmbuild.spec.pick import Pick
from llmbuild.spec.slo import Slo, parse_slo

__all__ = ["Model", "Pick", "Slo", "load", "parse_slo"]

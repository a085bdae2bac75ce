"""Import a recipe's model in one build process: what `llmbuild build` does up to the import, for these formats alone.

    PYTHONPATH=CHECKOUT python import_worker.py RECIPE CATALOG FORMAT...

The formats are those of llmbuild's own kernels. Each answers with one JSON line when it is in the catalog: times of
the monotonic clock, the CPU seconds of the whole tree so far, the program's files, or why there is none.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import monotonic

from comparison.script import end
from comparison.watched import cpu_s

import llmbuild
from llmbuild.build.jobs import jobs_of
from llmbuild.build.request import BuildRequest
from llmbuild.build.steps import Steps
from llmbuild.catalog.writer import Catalog
from llmbuild.spec.variant import Failure

OWN = {"kernel": "own", "layout": "packed", "kv_dtype": "f16", "opt_level": "O2"}


def main(recipe: str, folder: str, *formats: str) -> None:
    """Import one format after another."""
    (job_of,) = jobs_of(BuildRequest(recipes=(Path(recipe),), catalog=Path(folder)))
    job, catalog = job_of(), Catalog(Path(folder))
    steps = Steps(job, catalog)
    for name in formats:
        begin = monotonic()
        made = steps.import_(job.space.complete({**OWN, "weight_format": name}))
        found = {"format": name, "begin": begin, "end": monotonic(), "cpu_s": cpu_s(os.getpid())}
        if isinstance(made, Failure):
            found["failure"] = made.reason
        else:
            files = {kind: getattr(made, kind) for kind in ("module", "parameters", "check")}
            found |= {"files": files, "bytes": catalog.blobs.path(made.parameters).stat().st_size}
        print(json.dumps({**found, "package": str(Path(llmbuild.__file__).parent)}), flush=True)
    steps.close()
    catalog.close()


if __name__ == "__main__":
    end(lambda: main(*sys.argv[1:]))

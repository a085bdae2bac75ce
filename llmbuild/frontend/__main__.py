"""`python -m llmbuild.frontend JOB.json`: one import or reference run in a process of its own.

The job is a JSON object with `verb` and `out`, a folder. `import` and `truth` take the fields of `ImportJob`;
`reference` takes `model`, `random_init`, `seed`, and either `windows` (the path of an `.npy` i64[W,L]) or `prompt`
(ids) and `count`, or both; `chats` takes `model`, `prompts` (ids each), `windows`, `length` and `key`. Results lie in
`out`; `result.json` is written last. Bad input becomes {"error": message} in it, and exit code 2; choices that the
model does not go with become {"refused": message}.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmbuild import digest
from llmbuild.errors import ChoiceRefused, InputError
from llmbuild.spec.program import TRUTH_FILE, ImportJob

RESULT_FILE, LOGITS_FILE, GREEDY_FILE, CHATS_FILE = "result.json", "logits.npy", "greedy.npy", "chats.npy"


def run_import(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Import a model into `out` and return its `ImportResult` as plain data."""
    from llmbuild.frontend.program import import_model

    result: dict[str, Any] = digest.plain(import_model(_import_job(job), out))
    return result


def run_truth(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `truth.npz` f32[1+D,B,V]: what the library's own model says on the tokens that imports are checked on."""
    from llmbuild.frontend.program import ask

    ask(_import_job(job), out)
    return {"truth": TRUTH_FILE}


def _import_job(job: dict[str, Any]) -> ImportJob:
    known = {field.name for field in dataclasses.fields(ImportJob)}
    if unknown := sorted(set(job) - known):
        raise InputError(f"import job: unknown keys {', '.join(unknown)}")
    choices = job.get("choices", ())
    pairs = choices.items() if isinstance(choices, dict) else choices
    settled = {
        **job,
        "choices": tuple((str(knob), str(value)) for knob, value in pairs),
        "features": tuple(job.get("features", ())),
    }
    return ImportJob(**settled)


def run_reference(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `logits.npy` f32[W,L,V] and `greedy.npy` i64[count], as far as the job asks for them."""
    import numpy as np

    from llmbuild.frontend.reference import reference_greedy, reference_logits

    out.mkdir(parents=True, exist_ok=True)
    source = (job["model"], bool(job.get("random_init", False)), int(job.get("seed", 0)))
    files: dict[str, Any] = {}
    if "windows" in job:
        reference_logits(*source, np.load(job["windows"]), out / LOGITS_FILE)
        files["logits"] = LOGITS_FILE
    if "prompt" in job:
        np.save(out / GREEDY_FILE, reference_greedy(*source, np.asarray(job["prompt"], np.int64), int(job["count"])))
        files["greedy"] = GREEDY_FILE
    return files


def run_chats(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `chats.npy` i64[W,L]: texts in which the model answers prompts; a run with the same key goes on."""
    import numpy as np

    from llmbuild.frontend.chats import written
    from llmbuild.frontend.transcript import TRANSCRIPT_FILE, Transcript

    kept = Transcript(out / TRANSCRIPT_FILE, str(job.get("key", "")))
    np.save(out / CHATS_FILE, written(job["model"], job["prompts"], int(job["windows"]), int(job["length"]), kept))
    return {"chats": CHATS_FILE}


VERBS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "import": run_import,
    "truth": run_truth,
    "reference": run_reference,
    "chats": run_chats,
}


def main(arguments: list[str]) -> int:
    """Run the job named on the command line; return the exit code."""
    if len(arguments) != 1:
        print("usage: python -m llmbuild.frontend JOB.json", file=sys.stderr)
        return InputError.exit_code
    job = json.loads(Path(arguments[0]).read_text())
    out = Path(job.pop("out"))
    out.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(out)  # what a killed job leaves goes with its folder
    try:
        verb = VERBS.get(job.pop("verb", ""))
        if verb is None:
            raise InputError(f"job: verb must be one of {', '.join(VERBS)}")
        result, code = verb(job, out), 0
    except ChoiceRefused as error:
        result, code = {"refused": str(error)}, error.exit_code
    except InputError as error:
        result, code = {"error": str(error)}, error.exit_code
    _write_last(out / RESULT_FILE, result)
    return code


def _write_last(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(result, sort_keys=True, indent=1) + "\n")
    draft.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

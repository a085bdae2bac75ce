"""The cause of a child's failure, from its exit code and output: one sentence, what to do, and whether it is
permanent.

A failure is permanent only where it is a function of the inputs: a compiler's diagnostic of its input. A failure that
depends on a host, an installation or a moment (a missing package, a full disk, memory, a signal) is transient: the
next build tries again.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass

LONGEST = 400
"""Maximum characters of a tool's own message in the sentence; the failure's log has all of it."""

AGAIN = "the next build tries it again"
CHOOSE = "this point fails with this compiler: give a knob another value in the recipe or with --set"

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_GROUP = re.compile(r"^\s+[|+] ")
"""Prefix of each line of an exception group."""
_BEGIN = "Traceback (most recent call last):"
_CAUSE = "The above exception was the direct cause of the following exception:"
_CONTEXT = "During handling of the above exception, another exception occurred:"
_ASIDE = ("Exception ignored", "Exception in thread", "--- Logging error ---")
"""Line before a traceback that did not end the process."""
_RAISED = re.compile(r"^((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)(?:: ?(.*))?$")

_DIAGNOSTIC = re.compile(r"^(?:(?P<place>.*?:\d+(?::\d+)?|<unknown>:0|loc\(.*?\)): )?error: (?P<text>\S.*)$")
_FATAL = re.compile(r"^(?:LLVM ERROR: |iree-[a-z-]+: (?!Did you mean)|ld\.lld: )(?P<text>\S.*)$")
_DISPATCH = re.compile(r"\b\w*?\$?(?:async_)?(dispatch_\d+\w*)")
_OPERATION = re.compile(r"^.*?\bnote: see current operation: (.*)$")
_MENTIONS = re.compile(r"\b(?:error|fatal|failed|cannot)\b", re.IGNORECASE)

_MEMORY = re.compile(
    r"\bMemoryError\b|bad_alloc|out of memory|cannot allocate memory|can't allocate memory|failed to map segment|"
    r"RESOURCE_EXHAUSTED|Unable to allocate .* for an array",
    re.IGNORECASE,
)
_DISK = re.compile(
    r"No space left on device|Disk quota exceeded|\[Errno 28\]|\[Errno 122\]|File too large|\[Errno 27\]"
)
_SYSTEM = re.compile(
    r"Permission denied|Read-only file system|Input/output error|Too many open files|Broken ?pipe|Text file busy|"
    r"Resource temporarily unavailable|cannot open (?:input|output) file|error opening (?:input|output) file|"
    r"error while loading shared libraries|No such file or directory|std::system_error|can't start new thread|"
    r"returned exit code (?:9|137)\b",
    re.IGNORECASE,
)
_PACKAGES = ("ModuleNotFoundError", "ImportError", "PackageNotFoundError")
_MODULE = re.compile(r"No module named '([^'.]+)")


@dataclass(frozen=True)
class Diagnosis:
    """Why a child failed, in one sentence with what to do, and whether the same inputs fail again."""

    reason: str
    lasting: bool


@dataclass(frozen=True)
class Raised:
    """An exception that ended a Python process: its type, its message, and its cause."""

    kind: str
    sentence: str
    origin: Raised | None = None

    def text(self) -> str:
        """Return the type and the message."""
        return f"{self.kind}: {self.sentence}" if self.sentence else self.kind

    def chain(self) -> list[Raised]:
        """Return the exception and its causes, the last raised first."""
        return [self, *(self.origin.chain() if self.origin else [])]


def diagnose(tool: str, code: int, log: str, limit: str = "", memory: str = "") -> Diagnosis:
    """Return the diagnosis of an exit with `code` (below 0: by a signal) and `log`.

    `limit` names the memory limit that was set, `memory` the memory of the host or the container.
    """
    lines = [_ESCAPES.sub("", line).rstrip() for line in log.splitlines()]
    raised = uncaught([_GROUP.sub("", line) for line in lines])
    if raised is not None and code >= 0:
        return _of_python(raised, limit)
    found = diagnostic(lines)
    passing = _passing("\n".join(lines), limit)
    if code < 0:
        return _of_signal(tool, -code, found, passing, memory)
    if found and not passing:
        return Diagnosis(_sentence(found, CHOOSE), True)
    said = found or next((x.strip() for x in lines if _MENTIONS.search(x)), "") or _last(lines)
    return Diagnosis(
        _sentence(f"{tool} ended with {code}" + (f": {_cut(said)}" if said else ""), passing or AGAIN), False
    )


# --- Python ------------------------------------------------------------------------------------------------------


def uncaught(lines: list[str]) -> Raised | None:
    """Return the exception whose traceback is the last one that ended the process; None without one."""
    found: Raised | None = None
    link = aside = False
    at = 0
    while at < len(lines):
        line = lines[at].strip()
        if line in (_CAUSE, _CONTEXT):
            link = True
        elif line.startswith(_ASIDE):
            aside = True
        elif line == _BEGIN or line.startswith("Exception Group Traceback"):
            at, raised = _exception(lines, at + 1, found if link and not aside else None)
            found = raised if raised and not aside else found
            link = aside = False
            continue
        at += 1
    return found


def _exception(lines: list[str], at: int, origin: Raised | None) -> tuple[int, Raised | None]:
    """Return the exception that ends the traceback whose frames begin at a line, and the line after it."""
    while at < len(lines):
        line = lines[at]
        match = _RAISED.match(line) if line and not line[0].isspace() else None
        if match:
            sentence = (match[2] or "").strip()
            if match[2] is not None and (not sentence or sentence.endswith(":")):
                sentence = " ".join([sentence, *_paragraph(lines[at + 1 :])]).strip()
            return at + 1, Raised(match[1], _cut(sentence), origin)
        if line and not line[0].isspace() and line.startswith((_BEGIN, _CAUSE, _CONTEXT)):
            return at, None
        at += 1
    return at, None


def _paragraph(lines: list[str]) -> Iterator[str]:
    """Yield the lines of a message whose first line is empty, up to a blank line or a traceback header."""
    for line in lines:
        if not line.strip() or line in (_CAUSE, _CONTEXT, _BEGIN):
            return
        yield line.strip()


def _of_python(raised: Raised, limit: str) -> Diagnosis:
    """Return the diagnosis of an uncaught exception. It is not an importer's refusal, so it is never permanent."""
    chain = raised.chain()
    told = "; from ".join(dict.fromkeys(link.text() for link in chain))
    text = "\n".join(link.text() for link in chain)
    missing = next((link for link in chain if link.kind.rpartition(".")[2] in _PACKAGES), None)
    if missing is not None:
        module = _MODULE.search(missing.sentence)
        advice = f"pip install the package of `{module[1]}`" if module else "install or mend the package that it names"
        return Diagnosis(_sentence(told, f"{advice}; {AGAIN}"), False)
    return Diagnosis(_sentence(told, _passing(text, limit) or AGAIN), False)


# --- the compiler ------------------------------------------------------------------------------------------------


def diagnostic(lines: list[str]) -> str:
    """Return a compiler's first diagnostic, and its operation and dispatch; empty: none.

    A line of source that the compiler shows may hold the word too; a diagnostic begins its line.
    """
    for at, line in enumerate(lines):
        match = _DIAGNOSTIC.match(line)
        if match:
            place = match["place"] or ""
            where = "" if place.startswith("<unknown>") or not place else f"{place.rpartition('/')[2]}: "
            return _cut(f"{where}error: {match['text'].strip()}") + _about(match["text"], lines[at + 1 :])
    return next((_cut(line.strip()) for line in lines if _FATAL.match(line)), "")


def _about(text: str, rest: list[str]) -> str:
    """Return the operation and the dispatch of a diagnostic that does not name them."""
    told = []
    noted = next((m[1] for line in rest[:200] if (m := _OPERATION.match(line))), "")
    if noted and noted.strip()[:60] not in text:
        told.append(f"at {noted.strip()[:160]}")
    dispatch = next((m[1] for line in (text, *rest) if (m := _DISPATCH.search(line))), "")
    if dispatch and dispatch not in text:
        told.append(f"in {dispatch}")
    return f" ({', '.join(told)})" if told else ""


def _of_signal(tool: str, number: int, found: str, passing: str, memory: str) -> Diagnosis:
    name = signal.Signals(number).name if number in signal.valid_signals() else str(number)
    if number == signal.SIGKILL:
        bound = f", and {memory}" if memory else ""
        why = f"the kernel does that where memory runs out{bound}: free some or use a larger machine; {AGAIN}"
        return Diagnosis(f"{tool} crashed with {name}: {why}", False)
    if found and not passing:  # LLVM aborts on an unsupported input after it printed the cause
        return Diagnosis(_sentence(f"{found}, and {tool} crashed with {name}", CHOOSE), True)
    said = f": {found}" if found else ""
    return Diagnosis(_sentence(f"{tool} crashed with {name}{said}", passing or AGAIN), False)


# --- what passes -------------------------------------------------------------------------------------------------


def _passing(text: str, limit: str) -> str:
    """Return what to do about a transient failure; empty where no transient cause is found."""
    if _MEMORY.search(text):
        reached = f"it reached {limit}: " if limit else ""
        return f"{reached}free memory, use a larger machine or a smaller model; {AGAIN}"
    if _DISK.search(text):
        return f"free some space, in $TMPDIR too; {AGAIN}"
    return f"mend that; {AGAIN}" if _SYSTEM.search(text) else ""


def _sentence(told: str, advice: str) -> str:
    return f"{told}; {advice}"


def _last(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "…"

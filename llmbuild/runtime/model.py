"""`load`: from a catalog and an SLO to a model that streams text; all checks precede any execution."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Unpack

from llmbuild import digest
from llmbuild.errors import CatalogError, InputError, LoadRefused, NoVariant, as_our_errors
from llmbuild.runtime import checks, devices, host, lock, ranking, reader, trust
from llmbuild.runtime.choose import HostFacts, choose, nothing_chosen, refusal
from llmbuild.runtime.judged import Judged, Later
from llmbuild.spec.pick import Candidate, Pick
from llmbuild.spec.program import abi_from
from llmbuild.spec.rows import File, Row, present
from llmbuild.spec.slo import Slo, parse_slo

if TYPE_CHECKING:
    from llmbuild.runtime.answers import Answer, Completion
    from llmbuild.runtime.chat import ChatTemplate, Message
    from llmbuild.runtime.sampling import Options, Sampling
    from llmbuild.runtime.session import Session
    from llmbuild.runtime.tokenizer import Encoded, Tokenizer


LOADED: tuple[File, ...] = ("artifact", "parameters", "tokenizer", "chat")
"""The files of a variant that opening it reads."""
_CALLED: dict[File, str] = {"chat": "chat template"}
"""What a file is called where that is not the name of its column."""

LEADERS = 8
"""Number of best rows that are tried before every row is read."""


def host_facts() -> HostFacts:
    """Return the host's facts that decide a pick."""
    return HostFacts(
        arch=host.architecture(),
        features=host.features(),
        runtime=host.runtime_version(),
        memory_bytes=host.available_memory_bytes(),
        machine=digest.of(host.machine()),
        device_lacks=devices.lacks,
    )


@as_our_errors(CatalogError)
def pick(
    catalog: str | Path,
    model: str | None = None,
    slo: Sequence[str] = (),
    objective: str | None = None,
    target: str | None = None,
    workload: str | None = None,
    facts: HostFacts | None = None,
) -> Pick:
    """Return the pick for this host, or for the one that `facts` are of; nothing is opened.

    The database finds the best rows, and the first that may be opened here is chosen; the reasons for the others are
    computed on access.

    Raises:
        InputError: the SLO cannot be read, or the catalog has no such model.
        NoVariant: nothing meets the SLO here; the error carries the pick with the nearest row and its distance.
    """
    folder, bounds = _checked_request(catalog, slo, model=model, objective=objective, target=target, workload=workload)
    asked = parse_slo(bounds, objective)
    name = model or _only_model(folder)
    facts, absent = facts or host_facts(), _absent(folder)
    found: list[Row] = []
    for wanted in dict.fromkeys((asked.preferred, asked)):
        found = found or ranking.leaders(folder, name, target, workload, wanted, facts.machine, LEADERS)
    best = next((row for row in found if not refusal(row, facts) and not absent(row)), None)
    if best is not None:
        chosen = best

        def judged() -> Pick:
            rows = reader.candidates(folder, name, target, workload)
            return choose([chosen if same_place(r, chosen) else r for r in rows], facts, asked, absent)

        whole = Later(judged)
        return Pick(
            asked,
            best,
            Judged(whole, lambda made: made.candidates),
            fallbacks=Judged(whole, lambda made: made.fallbacks),
        )
    rows = reader.candidates(folder, name, target, workload)
    if not rows:
        raise InputError(_no_rows(folder, name, target, workload))
    made = choose(rows, facts, asked, absent)
    made = replace(made, chosen=_whole(folder, made.chosen), nearest=_whole(folder, made.nearest))
    if made.chosen is None:
        raise NoVariant(nothing_chosen(made, asked, name), made)
    return replace(made, candidates=tuple(_with(c, made.chosen) for c in made.candidates))


def _checked_request(catalog: object, slo: object, **names: object) -> tuple[Path, list[str]]:
    """Return the catalog's location and the bounds of an SLO, given as one string or a list.

    Raises:
        InputError: a value has the wrong type, or is not Unicode text.
    """
    if not isinstance(catalog, (str, Path)):
        raise InputError(f"catalog is a {type(catalog).__name__}; it must be a path")
    for name, value in names.items():
        if value is not None:
            checks.text(name, value)
    return Path(catalog), [checks.text("slo", slo)] if isinstance(slo, str) else checks.texts("slo", slo)


def _with(candidate: Candidate, chosen: Row) -> Candidate:
    return replace(candidate, row=chosen) if same_place(candidate.row, chosen) else candidate


def same_place(a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    """Return whether two rows are the same standing."""
    return all(a[name] == b[name] for name in lock.PLACE)


def _whole(folder: Path, row: Row | None) -> Row | None:
    """Return all columns of a row that was read with few."""
    if row is None:
        return None
    return next(r for r in reader.find_variant(folder, row["variant"]) if same_place(r, row))


def _absent(folder: Path) -> Callable[[Row], str]:
    """Return a function that explains a row's missing files: only a partially pulled folder may lack files."""
    source = trust.partial(folder)
    if source is None:
        return lambda row: ""

    def absent(row: Row) -> str:
        names = [name for kind in LOADED if (name := row.get(kind))]
        if all(reader.blob_path(folder, name).is_file() for name in names):
            return ""
        return f"was not pulled: `llmbuild pull {source} -C {folder} --all` fetches it, or `--slo` what you need"

    return absent


@as_our_errors(CatalogError)
def load(
    catalog: str | Path,
    model: str | None = None,
    slo: Sequence[str] = (),
    objective: str | None = None,
    target: str | None = None,
    workload: str | None = None,
    variant: str | None = None,
    *,
    locked: str | Path | None = None,
    trust_keys: str | Path | Sequence[str | Path] | None = None,
    allow_unsigned: bool = False,
    fallback: bool = False,
) -> Model:
    """Open the variant of `model` that meets `slo` on this host and is best in `objective`.

    Order of checks: signature if required, schema, runtime version, CPU features, memory, SLO, digests. `variant`
    names one by (a part of) its digest instead of an SLO, `locked` by a lock file; it is still refused where it
    cannot run. `trust_keys` are files or folders of public keys (else `$LLMBUILD_TRUST`): with any key, an unsigned
    catalog is refused unless `allow_unsigned`. With `fallback`, a variant whose files are refused is replaced by the
    next that meets the SLO; `model.pick` records it.

    Raises:
        CatalogError, InputError, NoVariant, LoadRefused: what is wrong, where, and what to do.
    """
    folder, slo = _checked_request(
        catalog, slo, model=model, objective=objective, target=target, workload=workload, variant=variant
    )
    trust.require(folder, trust.policy(trust_keys, allow_unsigned))
    if locked is not None:
        made = _locked(folder, Path(locked))
    else:
        made = _named(folder, variant) if variant else pick(folder, model, slo, objective, target, workload)
    return Model(folder, _verified(folder, made, fallback))


def _verified(folder: Path, made: Pick, fallback: bool) -> Pick:
    """Return the pick with the first row whose files are intact; without `fallback` only one row is tried."""
    assert made.chosen is not None
    try:
        verify(folder, made.chosen)
        return made
    except LoadRefused as error:
        if not fallback:
            raise
        refused = [(made.chosen, str(error))]
        first = error
    for narrow in made.fallbacks:
        row = _whole(folder, narrow)
        assert row is not None
        try:
            verify(folder, row)
        except LoadRefused as error:
            refused.append((row, str(error)))
            continue
        told = [Candidate(r, False, why) for r, why in refused]
        gone = {r["variant"] for r, _ in refused}
        rest = [_with(c, row) for c in made.candidates if c.row["variant"] not in gone]
        return replace(made, chosen=row, candidates=(*told, *rest))
    raise first


def verify(catalog: Path, row: Row) -> None:
    """Check that every file of a variant exists and matches its digest.

    Raises:
        LoadRefused: a file is missing or modified.
    """
    for kind in LOADED:
        name = row.get(kind)
        if not name:
            continue
        path = reader.blob_path(catalog, name)
        with as_our_errors(LoadRefused):
            there = digest.of_file(path) if path.is_file() else None
        if there is None:
            again = _again(catalog) or "run `llmbuild build` to make it again"
            raise LoadRefused(f"{path}: the {_CALLED.get(kind, kind)} is missing: {again}")
        if there != name:
            again = _again(catalog) or "delete it and run `llmbuild build`"
            raise LoadRefused(f"{path}: the {_CALLED.get(kind, kind)} was changed after it was built: {again}")


def _again(catalog: Path) -> str:
    """Return how to restore a file in a pulled folder; empty for a folder that is built in."""
    pointer = catalog / trust.POINTER
    if not pointer.is_file():
        return ""
    source = trust.pointer_of(pointer.read_bytes(), str(catalog)).get("source")
    if not source:
        return "publish it again from the catalog that it was built in"
    return f"`llmbuild pull {shlex.quote(str(source))} -C {shlex.quote(str(catalog))} --all` fetches it again"


class Model:
    """An opened variant. `pick` holds the reasons for it; `session` is opened on first use.

    Several answers may be interleaved: each has its own KV cache until it ends or is closed. One class: all ways to an
    answer share the session, the tokenizer and the chat template, which are opened on first use.
    """

    def __init__(self, catalog: Path, made: Pick) -> None:
        assert made.chosen is not None
        self.catalog = catalog
        self.pick = made
        self.row = made.chosen
        self._turn = Lock()
        self._closed = False

    def close(self) -> None:
        """Release the artifact, its parameters and its device; unfinished answers raise an error."""
        self._closed = True
        with self._turn:
            if session := self.__dict__.pop("session", None):
                session.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def session(self) -> Session:
        """The opened artifact.

        Raises:
            InputError: the model was closed.
        """
        from llmbuild.runtime.session import Session, Settings

        if self._closed:
            raise InputError(f"model {self.row['model']} is closed: load it again")
        point = self.row["point"]
        return Session(
            reader.blob_path(self.catalog, present(self.row["artifact"])),
            reader.blob_path(self.catalog, present(self.row["parameters"])),
            abi_from(present(self.row["abi"])),
            Settings(str(point["driver"]), int(point["workers"])),
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InputError: the model has none: it is a shape without a tokenizer.
        """
        name = self.row.get("tokenizer")
        if not name:
            raise InputError(f"model {self.row['model']} has no tokenizer: pass token ids to `tokens`")
        from llmbuild.runtime.tokenizer import Tokenizer

        try:
            return Tokenizer(reader.blob_path(self.catalog, name))
        except InputError as error:
            raise LoadRefused(f"{error}: build with one that can") from None

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template; None where the catalog has none."""
        name = self.row.get("chat")
        if not name:
            return None
        from llmbuild.runtime.chat import ChatTemplate

        return ChatTemplate.read(reader.blob_path(self.catalog, name))

    def tokens(self, prompt: Sequence[int], max_new_tokens: int = 64, sampling: Sampling | None = None) -> Answer[int]:
        """Yield the continuation of `prompt` token by token, up to an end token or the end of the context.

        Greedy unless `sampling` has a temperature. The answer has a `finish_reason`.

        Raises:
            InputError: at once, where the prompt is empty, has a token outside the vocabulary or does not fit.
        """
        from llmbuild.runtime import answers

        asked = answers.Asked.of(self.session, "the prompt", prompt, max_new_tokens, sampling)
        return answers.tokens(self.session, self._turn, asked)

    def tokens_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Return the continuation of each prompt, in batches of the variant's batch size.

        Greedy unless `sampling` has a temperature; then each prompt has its own random draws.
        """
        from llmbuild.runtime.together import continued

        with self._turn:
            return [list(one.tokens) for one in continued(self.session, prompts, max_new_tokens, sampling)]

    def generate_batch(self, prompts: Sequence[str], max_new_tokens: int = 64, **options: Unpack[Options]) -> list[str]:
        """Return the continuation of each prompt as text; `options` are those of `generate`."""
        return [one.text for one in self.complete(prompts, max_new_tokens, **options)]

    def complete(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        *,
        stop: str | Sequence[str] = (),
        add_special_tokens: bool = True,
        **sampling: float,
    ) -> list[Completion]:
        """Return the continuation of each prompt: its text, its tokens and its finish reason.

        The text is that of `generate` with the same options.
        """
        from llmbuild.runtime import answers
        from llmbuild.runtime.sampling import Sampling
        from llmbuild.runtime.together import continued

        tokenizer, stops, drawn = self.tokenizer, answers.stop_strings(stop), Sampling.of(sampling)
        ids = [self._encode(text, add_special_tokens).ids for text in checks.texts("prompts", prompts)]
        read = [answers.Reading(tokenizer.decoder(mine), self.session.abi.eos_tokens, stops) for mine in ids]
        with self._turn:
            found = continued(self.session, ids, max_new_tokens, drawn, [one.push for one in read])
        return [one.whole(new.tokens, new.finish_reason) for one, new in zip(read, found, strict=True)]

    def generate(
        self,
        prompt: str | None,
        max_new_tokens: int = 64,
        *,
        stop: str | Sequence[str] = (),
        add_special_tokens: bool = True,
        **sampling: float,
    ) -> Answer[str]:
        """Yield the continuation of `prompt` as pieces of text, each once it is final.

        `temperature`, `top_k`, `top_p` and `seed` are those of `Sampling`; without them the text is greedy. The text
        ends before the first of the `stop` strings. Without `add_special_tokens`, no token is prepended to the
        prompt, as for a chat that its template has rendered. A prompt of None stands for the tokens that a text of
        the model begins with. The answer has a `finish_reason`.

        Raises:
            InputError: at once, where an argument is invalid or the prompt does not fit in the context.
        """
        from llmbuild.runtime import answers
        from llmbuild.runtime.sampling import Sampling

        stops, drawn = answers.stop_strings(stop), Sampling.of(sampling)
        begun = self.beginning() if prompt is None else self._encode(prompt, add_special_tokens)
        asked = answers.Asked.of(self.session, "the prompt", begun.ids, max_new_tokens, drawn)
        text = answers.Text(self.tokenizer.decoder(begun.tokens), self.session.abi.eos_tokens, stops)
        return answers.pieces(answers.tokens(self.session, self._turn, asked), text, begun.before)

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 64,
        *,
        stop: str | Sequence[str] = (),
        **sampling: float,
    ) -> Answer[str]:
        """Yield the model's answer to `messages`, as `generate` does; the chat template makes the prompt of them.

        A message is a mapping with the texts `role` and `content`. The answer ends before the model's end tokens, and
        before the end token that the template names.

        Raises:
            InputError: at once, as `generate` and `encode_chat`.
        """
        from llmbuild.runtime import answers
        from llmbuild.runtime.sampling import Sampling

        stops, drawn = answers.stop_strings(stop), Sampling.of(sampling)
        prompt, template = self.encode_chat(messages).ids, self.chat_template
        more = template.ends(self.tokenizer) if template else ()
        asked = replace(answers.Asked.of(self.session, "the chat", prompt, max_new_tokens, drawn), ends=more)
        text = answers.Text(self.tokenizer.decoder(prompt), (*self.session.abi.eos_tokens, *more), stops)
        return answers.pieces(answers.tokens(self.session, self._turn, asked), text)

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> Encoded:
        """Return the tokens of a chat, up to where the model answers; messages and tools contain no control tokens.

        Raises:
            InputError: the model has no chat template, or it refuses these messages.
        """
        if self.chat_template is None:
            todo = "give `generate` a text, or build again from a folder that has chat_template.jinja"
            raise InputError(f"model {self.row['model']} has no chat template in {self.catalog}: {todo}")
        return self.chat_template.encode(messages, self.tokenizer, tools)

    def beginning(self) -> Encoded:
        """Return the first tokens of a text without a prompt: the tokenizer's, or an end token.

        Raises:
            InputError: the model has neither.
        """
        from llmbuild.runtime.tokenizer import Encoded

        begun = self.tokenizer.encode("")
        if begun.tokens:
            return begun
        ends = self.session.abi.eos_tokens
        if not ends:
            raise InputError(f"model {self.row['model']} has no token that a text begins with: give a prompt")
        return Encoded(ends[:1], (self.tokenizer.name(ends[0]),))

    def _encode(self, prompt: str, add_special_tokens: bool) -> Encoded:
        begun = self.tokenizer.encode(prompt, add_special_tokens)
        if not begun.tokens:
            told = "is empty: give at least one character" if not prompt else "has no token in this vocabulary"
            raise InputError(f"the prompt {told}")
        return begun


def _named(catalog: Path, prefix: str) -> Pick:
    rows = reader.find_variant(catalog, prefix)
    why = refusal(rows[0], host_facts())
    if why:
        raise LoadRefused(f"variant {prefix} {why}")
    return Pick(Slo((), "tpot_s"), rows[0], ())


def _locked(catalog: Path, path: Path) -> Pick:
    pin = lock.read(path)
    row = _whole(catalog, lock.row_of(pin, reader.candidates(catalog, pin["model"]), path))
    assert row is not None
    why = refusal(row, host_facts())
    if why:
        raise LoadRefused(f"{path}: variant {row['variant'][:12]} {why}")
    return Pick(parse_slo(list(pin.get("slo") or ()), pin["objective"]), row, (Candidate(row, True, ""),))


def _only_model(catalog: Path) -> str:
    names = reader.models(catalog)
    if len(names) != 1:
        raise InputError(f"name a model: {catalog} has {', '.join(names) or 'none'}")
    return names[0]


def _no_rows(catalog: Path, model: str, target: str | None, workload: str | None) -> str:
    asked = "".join(f", {k} {v}" for k, v in (("target", target), ("workload", workload)) if v)
    models = reader.models(catalog)
    if model not in models:
        return f"no variant of {model}{asked} in {catalog}: it has models {', '.join(models) or 'none'}"
    rows = reader.variants(catalog, model, everything=True)
    there = sorted({f"target {row['target']}, workload {row['workload']}" for row in rows})
    return f"no variant of {model}{asked} in {catalog}: it has {'; '.join(there)}"

"""`load`: from a catalog and an SLO to a model that streams text, with every check before any byte is executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbuild import digest
from llmbuild.errors import InputError, LoadRefused, NoVariant
from llmbuild.runtime import host, reader
from llmbuild.runtime.choose import HostFacts, choose, refusal
from llmbuild.spec.pick import Pick
from llmbuild.spec.program import abi_from
from llmbuild.spec.slo import Slo, parse_slo

if TYPE_CHECKING:
    from llmbuild.runtime.sampling import Sampling
    from llmbuild.runtime.session import Session


def host_facts() -> HostFacts:
    """Return what of this host decides a pick."""
    return HostFacts(
        arch=host.architecture(),
        features=host.features(),
        runtime=host.runtime_version(),
        memory_bytes=host.available_memory_bytes(),
        machine=digest.of(host.machine()),
    )


def pick(
    catalog: str | Path,
    model: str | None = None,
    slo: Sequence[str] = (),
    objective: str | None = None,
    target: str | None = None,
    workload: str | None = None,
) -> Pick:
    """Return the pick for this host; nothing is opened.

    Raises:
        InputError: the SLO cannot be read, or the catalog has no such model.
        NoVariant: nothing meets the SLO here; the error carries the pick with the nearest row and its distance.
    """
    asked = parse_slo(list(slo), objective)
    folder = Path(catalog)
    name = model or _only_model(folder)
    rows = reader.variants(folder, name, target, workload, everything=True)
    if not rows:
        raise InputError(_no_rows(folder, name, target, workload))
    made = choose(rows, host_facts(), asked)
    if made.chosen is None:
        raise NoVariant(_nothing(made, asked, name), made)
    return made


def load(
    catalog: str | Path,
    model: str | None = None,
    slo: Sequence[str] = (),
    objective: str | None = None,
    target: str | None = None,
    workload: str | None = None,
    variant: str | None = None,
) -> Model:
    """Open the variant of `model` that meets `slo` on this host and is best in `objective`.

    The order of checks: schema, runtime version, CPU features, memory, SLO, digests. `variant` names one by (a part
    of) its digest instead of an SLO; it is still refused where it would not run.

    Raises:
        CatalogError, InputError, NoVariant, LoadRefused: what is wrong, where, and what to do.
    """
    folder = Path(catalog)
    made = _named(folder, variant) if variant else pick(folder, model, slo, objective, target, workload)
    assert made.chosen is not None
    verify(folder, made.chosen)
    return Model(folder, made)


def verify(catalog: Path, row: dict[str, Any]) -> None:
    """Check that every file of a variant is there and is what its digest says.

    Raises:
        LoadRefused: a file is missing or its bytes were changed.
    """
    for kind in ("artifact", "parameters", "tokenizer"):
        name = row.get(kind)
        if not name:
            continue
        path = reader.blob_path(catalog, name)
        if not path.is_file():
            raise LoadRefused(f"{path}: the {kind} is missing: run `llmbuild build` to make it again")
        if digest.of_file(path) != name:
            raise LoadRefused(f"{path}: the {kind} was changed after it was built: delete it and run `llmbuild build`")


class Model:
    """An opened variant. `pick` says why this one; `session` is opened on first use."""

    def __init__(self, catalog: Path, made: Pick) -> None:
        assert made.chosen is not None
        self.catalog = catalog
        self.pick = made
        self.row = made.chosen

    @cached_property
    def session(self) -> Session:
        """The opened artifact."""
        from llmbuild.runtime.session import Session, Settings

        point = self.row["point"]
        return Session(
            reader.blob_path(self.catalog, self.row["artifact"]),
            reader.blob_path(self.catalog, self.row["parameters"]),
            abi_from(self.row["abi"]),
            Settings(str(point["driver"]), int(point["workers"])),
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            InputError: the model has none: it is a bare shape.
        """
        if not self.row.get("tokenizer"):
            raise InputError(f"model {self.row['model']} has no tokenizer: pass token ids to `tokens`")
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(reader.blob_path(self.catalog, self.row["tokenizer"])))

    def tokens(
        self, prompt: Sequence[int], max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield the continuation of `prompt` token by token, up to an end token or the end of the context.

        Greedy unless `sampling` has a temperature.
        """
        session = self.session
        choose = _chooser(session, sampling)
        position = len(prompt)
        token = choose(session.prefill(prompt))
        for left in range(max_new_tokens - 1, -1, -1):
            yield token
            if left == 0 or token in session.abi.eos_tokens or position >= session.abi.context:
                return
            token = choose(session.decode(token, position))
            position += 1

    def generate(self, prompt: str, max_new_tokens: int = 64, **sampling: float) -> Iterator[str]:
        """Yield the continuation of `prompt` as pieces of text, each as soon as it is certain.

        `temperature`, `top_k`, `top_p` and `seed` are those of `Sampling`; without them the text is greedy.
        """
        from tokenizers.decoders import DecodeStream

        from llmbuild.runtime.sampling import Sampling

        tokenizer = self.tokenizer
        ids = tokenizer.encode(prompt).ids
        if not ids:
            raise InputError("the prompt is empty: give at least one character")
        stream = DecodeStream(ids=ids, skip_special_tokens=True)
        for token in self.tokens(ids, max_new_tokens, Sampling(**sampling)):  # type: ignore[arg-type]
            piece = stream.step(tokenizer, token)
            if piece:
                yield piece


def _chooser(session: Session, sampling: Sampling | None) -> Callable[[int], int]:
    """Return what turns the device's greedy token into the one to take."""
    if sampling is None or sampling.greedy:
        return lambda greedy: greedy
    from llmbuild.runtime.sampling import Sampler

    sampler = Sampler(sampling)
    return lambda _: sampler.choose(session.peek())


def _named(catalog: Path, prefix: str) -> Pick:
    rows = reader.find_variant(catalog, prefix)
    why = refusal(rows[0], host_facts())
    if why:
        raise LoadRefused(f"variant {prefix} {why}")
    return Pick(Slo((), "tpot_s"), rows[0], ())


def _only_model(catalog: Path) -> str:
    names = reader.models(catalog)
    if len(names) != 1:
        raise InputError(f"name a model: {catalog} has {', '.join(names) or 'none'}")
    return names[0]


def _no_rows(catalog: Path, model: str, target: str | None, workload: str | None) -> str:
    asked = "".join(f", {k} {v}" for k, v in (("target", target), ("workload", workload)) if v)
    return f"no variant of {model}{asked} in {catalog}: it has models {', '.join(reader.models(catalog)) or 'none'}"


def _nothing(made: Pick, slo: Slo, model: str) -> str:
    bounds = ", ".join(str(b) for b in slo.bounds)
    if made.nearest is None:
        reasons = sorted({c.reason for c in made.candidates})
        return f"no variant of {model} can be used on this host: {'; '.join(reasons[:3])}"
    near = made.nearest
    missed = "; ".join(slo.misses(near)) or f"{slo.objective} is absent"
    return (
        f"no variant of {model} meets {bounds or slo.objective}; the nearest is {digest.short(near['variant'])}: "
        f"{missed} (distance {made.distance:.3g})"
    )

"""The commands of fleets: plan, simulate, orchestrate, nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmbuild.cli.clusters import Backend, cluster_options, manifests, misplaced, on_cluster, on_ray
from llmbuild.cli.listening import ended, listen_options, listens
from llmbuild.cli.options import PATH, Shared, catalog_option
from llmbuild.errors import InputError, NoPlan
from llmbuild.process.rays import is_ray
from llmbuild.system.extras import EXTRAS
from llmbuild.system.strict_json import dumps

if TYPE_CHECKING:
    from llmbuild.fleet.simulate.outcome import Outcome
    from llmbuild.fleet.simulate.run import Failing
    from llmbuild.fleet.simulate.trace import Trace
    from llmbuild.spec.fleet import Fleet, Profile

_FACTOR = re.compile(r"x(\d+(?:\.\d+)?)")
_FAILURE = re.compile(r"([^@]+)@(\d+(?:\.\d+)?)(?:\+(\d+(?:\.\d+)?))?")


class _Factor(click.ParamType):  # type: ignore[type-arg]  # generic in later versions alone
    """A factor as `x2`."""

    name = "factor"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        match = _FACTOR.fullmatch(str(value).strip())
        if not match or not 0 < float(match[1]) <= 1e6:
            self.fail(f"{value!r} is no factor: write x2 or x0.5", param, ctx)
        return float(match[1])


FACTOR = _Factor()


@click.command(short_help="Say which variants run where, how many, for the load of a FLEET.")
@click.argument("fleet", type=PATH)
@click.option("--rate", type=FACTOR, default="x1", metavar="xN", help="Plan for N times the rates of the file.")
@click.option("--without", multiple=True, metavar="NODE", help="A node, as h100-0, or a whole class of them, is gone.")
@click.option("--max-nodes", type=click.IntRange(min=0), metavar="N", help="At most N nodes are on.")
@click.option("--operators", is_flag=True, help="Say what placing operators apart would save, too.")
@catalog_option
@click.option("--json", "form", cls=Shared, flag_value="json", help="JSON on stdout.")
def plan(
    fleet: Path,
    rate: float,
    without: tuple[str, ...],
    max_nodes: int | None,
    operators: bool,
    catalog: str,
    form: str | None,
) -> int:
    """Say which variants run where, how many and at which setting, for the load that a FLEET file states.

    Requests without a place come first, then the objective. Exits with 3, and says what is missing, if some have none.

    --operators compares, for each service and each class of nodes, the fewest devices that whole models take with those
    that attention, feed-forward parts and heads would take apart, by published tables of operators. It takes seconds.
    """
    asked, profiles = _read(fleet, Path(catalog))
    from llmbuild.fleet.operators.services import by_services
    from llmbuild.fleet.plan.load import stated
    from llmbuild.fleet.plan.plan import plan as made
    from llmbuild.report.fleet import plan_json, plan_table, shortage_lines
    from llmbuild.report.operators import operators_json, operators_table

    reduced = _reduced(asked, without).at_rate(rate)
    found = made(reduced, profiles, stated(reduced), max_nodes)
    whole = None
    if any(node.partitions is not None for node in reduced.nodes):
        whole = made(reduced.undivided(), profiles, stated(reduced), max_nodes)
    apart = list(by_services(reduced)) if operators else None
    if form:
        told = plan_json(found, whole) | ({} if apart is None else {"operators": operators_json(apart)})
        click.echo(dumps(told))
    else:
        click.echo(plan_table(found, whole) + ("" if apart is None else f"\n\n{operators_table(apart)}"))
    if not found.feasible:
        raise NoPlan("\n".join(shortage_lines(found)))
    return 0


@click.command(short_help="Run a trace of requests over a FLEET with policies, simulated.")
@click.argument("fleet", type=PATH)
@click.option(
    "--trace",
    "traces",
    multiple=True,
    required=True,
    metavar="[SERVICE=]FILE",
    help="Azure's CSV, Mooncake's JSON lines, or `steady`: Poisson arrivals at the rates of the file.",
)
@click.option("--policy", "policies", multiple=True, metavar="POLICY", help="May be given again; default: the file's.")
@click.option("--rate", type=FACTOR, default="x1", metavar="xN", help="N times the requests of the trace.")
@click.option("--lengths", type=FACTOR, default="x1", metavar="xN", help="N times the lengths of the trace.")
@click.option("--context", type=click.IntRange(min=2), metavar="N", help="Cut prompt and answer to N tokens together.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), metavar="S", help="Only the first S of the trace.")
@click.option("--day", is_flag=True, help="Move the requests as a made-up day does, in the length of the trace.")
@click.option("--seeds", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many are run.")
@click.option("--scheduler", type=click.Choice(("fcfs", "sarathi")), default="fcfs", show_default=True)
@click.option("--fail", "failures", multiple=True, metavar="NODE@S[+S]", help="A node fails at S, for S or for good.")
@catalog_option
@click.option("--json", "form", cls=Shared, flag_value="json", help="JSON on stdout, a document for each run.")
def simulate(fleet: Path, policies: tuple[str, ...], seeds: int, catalog: str, form: str | None, **options: Any) -> int:
    """Run a trace of requests over a FLEET with policies, step by step, with the server's scheduler.

    Every arrival counts: what is rejected or lost has missed its SLO. Figures are simulated; their basis is told.
    """
    asked, profiles = _read(fleet, Path(catalog))
    from llmbuild.fleet.policies.named import ORACLE, policy
    from llmbuild.report.fleet import outcome_json, outcomes_table, trace_lines
    from llmbuild.system.terminal import clear_line

    names = policies or (asked.policy,)
    for name in names:
        policy(name)
    traces = _traces(asked, options)
    for line in trace_lines(traces):
        click.echo(line, err=True)
    found = list(_outcomes(asked, profiles, traces, names, seeds, options))
    clear_line()
    if form:
        click.echo("[\n" + ",\n".join(dumps(outcome_json(one)) for one in found) + "\n]")
    else:
        click.echo(outcomes_table(found, ORACLE))
        for name in names:
            click.echo(f"{name}: knows {policy(name).knows}", err=True)
    return 0


@click.command(short_help="Run a FLEET: start, route, switch and end replicas by a policy.")
@click.argument("fleet", type=PATH)
@click.option(
    "--on",
    "backend",
    type=Backend(),
    default="local",
    show_default=True,
    metavar="BACKEND",
    help="What runs the replicas: local, kubernetes, ray (the cluster at hand), or ray://HOST:PORT.",
)
@click.option("-n", "--dry-run", "dry", is_flag=True, help="Say what would be done first, and why; do nothing.")
@listen_options
@click.option("--policy", metavar="POLICY", help="Who decides what runs; default: the file's.")
@click.option("--period", type=click.FloatRange(0.1, 3600), metavar="S", help="Seconds between two decisions.")
@click.option("--state", type=PATH, metavar="DIR", help="Where what runs is noted.  [default: CATALOG/fleets/NAME]")
@cluster_options
@catalog_option
@click.option("--json", "form", cls=Shared, flag_value="json", help="With -n: JSON on stdout.")
def orchestrate(fleet: Path, backend: str, dry: bool, catalog: str, form: str | None, **options: Any) -> int:
    """Run a FLEET on this machine or in a cluster behind one OpenAI-compatible address, until SIGTERM or Ctrl-C.

    Replicas are `llmbuild serve`: processes on the cores that the file names, on this machine or on nodes of Ray, or
    Deployments of Kubernetes, which -n prints for `kubectl apply -f -`. The address is printed on standard output as
    soon as every service has a replica. What a killed orchestrator has left running is taken over by the next one.
    """
    from dataclasses import replace

    misplaced(options, backend, dry)
    if form and not dry:
        raise InputError("--json goes with -n: a running fleet prints its address")
    from llmbuild.fleet.policies.named import live_policy

    if options["policy"]:
        live_policy(options["policy"])
    asked, profiles = _read(fleet, Path(catalog), serves=True)
    from llmbuild.fleet.actuators.served import DRAIN_S
    from llmbuild.fleet.orchestrate import Setup, local, local_dry, to_stderr
    from llmbuild.fleet.orchestrate import dry as intended
    from llmbuild.fleet.orchestrate import orchestrate as run
    from llmbuild.report.fleet import actions_json, actions_table

    if options["period"]:
        asked = replace(asked, period_s=options["period"])
    name = options["policy"] or asked.policy
    folder = options["state"] or Path(catalog) / "fleets" / asked.name
    place, keys = listens(options, DRAIN_S)
    setup = Setup(asked, profiles, Path(catalog), folder, name, place, keys, options["api_keys"])
    if dry and backend == "kubernetes":
        click.echo(manifests(setup, form, options["picker"], to_stderr))
        _place_for_all(asked, profiles)
        return 0
    if dry:
        found = intended(setup, to_stderr, local_dry if backend == "local" else on_ray(backend, dry=True))
        click.echo(dumps(actions_json(asked, found)) if form else actions_table(asked, found))
        _place_for_all(asked, profiles)
        return 0
    elsewhere = on_ray(backend) if is_ray(backend) else None
    make = elsewhere or (local if backend == "local" else on_cluster(options))
    try:
        _place_for_all(asked, profiles)
    except NoPlan as lacking:  # what has a place is served all the same
        click.echo(f"warning: {lacking}", err=True)
    return ended(run(setup, to_stderr, click.echo, make))


@click.command(short_help="Take nodes of a running FLEET out of service, or give them back.")
@click.argument("fleet", type=PATH)
@click.option("--out", "out", multiple=True, metavar="NODE", help="Replace and drain what runs there; start no more.")
@click.option("--back", "back", multiple=True, metavar="NODE", help="Plan with it again.")
@click.option("--state", type=PATH, metavar="DIR", help="The fleet's state, as its orchestrator has it.")
@catalog_option
@click.option("--json", "form", cls=Shared, flag_value="json", help="JSON on stdout.")
def nodes(
    fleet: Path, out: tuple[str, ...], back: tuple[str, ...], state: Path | None, catalog: str, form: str | None
) -> int:
    """Say which nodes of a FLEET are in service; take some out, or give some back, while it runs.

    A node is named as `core-0`, or a whole class of them as `core`. The orchestrator of the fleet sees it within a
    second: it replaces what runs on a node that is out, elsewhere, before it drains it, as far as there is room.
    """
    from llmbuild.fleet.nodes_out import NodesOut
    from llmbuild.fleet.policies.named import POLICIES
    from llmbuild.report.fleet import nodes_json, nodes_table
    from llmbuild.spec.files.fleet import read_fleet

    asked = read_fleet(fleet, tuple(POLICIES))
    leaving, coming = _named(asked, out, "--out"), _named(asked, back, "--back")
    if both := sorted(leaving & coming):
        raise InputError(f"{both[0]} is in --out and in --back: name it in one of them")
    noted = NodesOut(state or Path(catalog) / "fleets" / asked.name)
    found = noted.change(leaving, coming) if leaving or coming else noted.read()
    click.echo(dumps(nodes_json(asked, found)) if form else nodes_table(asked, found))
    return 0


def _place_for_all(fleet: Fleet, profiles: Sequence[Profile]) -> None:
    """Say what the load of the file lacks.

    Raises:
        NoPlan: some requests have no place.
    """
    from llmbuild.fleet.loop import permitted
    from llmbuild.fleet.plan.load import stated
    from llmbuild.fleet.plan.plan import plan as made
    from llmbuild.report.fleet import shortage_lines

    found = made(permitted(fleet), profiles, stated(fleet))
    if not found.feasible:
        raise NoPlan("\n".join(shortage_lines(found)))


def _outcomes(
    fleet: Fleet,
    profiles: Sequence[Profile],
    traces: dict[str, Trace],
    names: Sequence[str],
    seeds: int,
    options: dict[str, Any],
) -> Iterator[Outcome]:
    """Yield the outcome of every policy under every seed, and tell each on stderr."""
    from llmbuild.fleet.policies.named import policy
    from llmbuild.fleet.simulate.run import Setting, simulate
    from llmbuild.fleet.simulate.trace import asked, steady_trace
    from llmbuild.serve.schedule.named import scheduler

    chosen = scheduler(options["scheduler"], 1, fleet.name)
    failures = tuple(_failing(text) for text in options["failures"])
    for seed in range(seeds):
        if traces:
            requests = asked(fleet, traces, seed)
        else:
            requests = steady_trace(fleet.at_rate(options["rate"]), options["seconds"] or 600.0, seed)
        for name in names:
            made = policy(name)
            setting = Setting(seed, chosen, failures)
            one = simulate(fleet, profiles, requests, name, made.make, made.router(fleet), setting)
            told = f"seed {seed} {name}: {one.arrivals} requests, {one.attainment:.2%} met"
            click.echo(f"{told}, {one.joules_per_token:.3f} J/token; {one.explained}", err=True)
            yield one


def _read(path: Path, catalog: Path, serves: bool = False) -> tuple[Fleet, tuple[Profile, ...]]:
    """Return a fleet and the profiles of its models."""
    extras = ["fleet", *(["serve"] if serves else [])]
    missing = [name for extra in extras for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise InputError(f"fleets need {', '.join(missing)}: pip install 'llmbuild[{','.join(extras)}]'")
    from llmbuild.fleet.policies.named import POLICIES
    from llmbuild.fleet.profiles.gather import profiles_of
    from llmbuild.spec.files.fleet import read_fleet

    fleet = read_fleet(path, tuple(POLICIES))
    return fleet, profiles_of(fleet, catalog)


def _reduced(fleet: Fleet, without: Sequence[str]) -> Fleet:
    """Return the fleet without some nodes."""
    gone = _named(fleet, without, "--without")
    return fleet.with_counts({node.name: sum(name not in gone for name in node.nodes) for node in fleet.nodes})


def _named(fleet: Fleet, names: Sequence[str], option: str) -> set[str]:
    """Return the nodes that are named, by themselves or by their class.

    Raises:
        InputError: there is no such node or class.
    """
    found = set[str]()
    for name in names:
        if any(name == node.name for node in fleet.nodes):
            found |= set(fleet.node_class(name).nodes)
        elif any(name in node.nodes for node in fleet.nodes):
            found.add(name)
        else:
            there = ", ".join(f"{node.name}-0 to {node.name}-{node.count - 1}" for node in fleet.nodes)
            raise InputError(f"{option} {name}: no such node or class: there are {there}")
    return found


def _traces(fleet: Fleet, options: dict[str, Any]) -> dict[str, Trace]:
    """Return the traces by service; none for steady arrivals."""
    from llmbuild.fleet.simulate.trace import STEADY, read_trace

    if STEADY in options["traces"]:
        if len(options["traces"]) > 1:
            raise InputError(f"--trace {STEADY} is for all services: give no other trace with it")
        if options["lengths"] != 1 or options["context"] is not None:
            raise InputError(f"--trace {STEADY} has the lengths of the fleet file: change them there")
        if options["day"]:
            raise InputError(f"--trace {STEADY} has one rate: --day is for other traces")
        return {}
    found: dict[str, Trace] = {}
    services = [service.name for service in fleet.services]
    for text in options["traces"]:
        service, sign, file = text.partition("=")
        name = service if sign and service in services else ""
        if sign and not name and not Path(text).exists():
            raise InputError(f"--trace {text}: no service {service!r}: there are {', '.join(services)}")
        if name in found:
            raise InputError(f"--trace {text}: {name or 'every service'} has a trace already: keep one")
        trace = read_trace(Path(file if name else text)).window(options["seconds"] or math.inf)
        scaled = trace.lengths(options["lengths"], options["context"]).at_rate(options["rate"])
        found[name] = scaled.day() if options["day"] else scaled
    bare = [name for name in services if name not in found and "" not in found]
    if bare:
        raise InputError(f"no trace for {', '.join(bare)}: add --trace {bare[0]}=FILE, or one FILE for all")
    return found


def _failing(text: str) -> Failing:
    from llmbuild.fleet.simulate.run import Failing

    match = _FAILURE.fullmatch(text)
    if not match:
        raise InputError(f"--fail {text}: write NODE@SECONDS, or NODE@SECONDS+SECONDS for a time")
    return Failing(match[1], float(match[2]), float(match[3]) if match[3] else math.inf)


COMMANDS = (plan, simulate, orchestrate, nodes)

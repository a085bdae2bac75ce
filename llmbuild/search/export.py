"""A search as a study in a storage of Optuna's, for `optuna-dashboard` and `optuna.visualization`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from llmbuild.errors import InputError
from llmbuild.search.front import value_of
from llmbuild.search.sampler import POINT
from llmbuild.spec.slo import METRICS
from llmbuild.spec.space import Value
from llmbuild.spec.trial import Trial

DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
VARIANT = "variant"
USUAL = ("tpot_s", "ttft_s", "parameter_bytes", "quality_kl")


@dataclass(frozen=True)
class Exported:
    """The result of an export: numbers of added trials, and of trials that the study already had."""

    study: str
    objectives: tuple[str, ...]
    added: int
    known: int
    failed: int


def objectives_of(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Return the default objectives of an export: those of `USUAL` that any trial has."""
    read = [t for t in trials if t.measurements and t.failure is None]
    return tuple(n for n in USUAL if any(value_of(t, t.measurements[0], n) is not None for t in read))


def export(trials: Sequence[Trial], objectives: Sequence[str], storage: str, name: str) -> Exported:
    """Add the trials that a study does not have yet; values are medians in SI units, as in the catalog.

    A failed point is a failed trial with the reason; a point without a reading, such as one ended by the short screen,
    is a pruned trial.

    Raises:
        InputError: the storage cannot be used, or the study in it has other objectives.
    """
    study = _opened(storage, name, objectives)
    domains = _domains(trials)
    there = {trial.user_attrs.get(VARIANT) for trial in study.get_trials(deepcopy=False)}
    new = [trial for trial in trials if trial.variant not in there]
    study.add_trials([_frozen(trial, objectives, domains) for trial in new])
    failed = sum(trial.failure is not None for trial in new)
    return Exported(name, tuple(objectives), len(new), len(trials) - len(new), failed)


def _opened(storage: str, name: str, objectives: Sequence[str]) -> optuna.Study:
    directions = [DIRECTIONS[METRICS[objective].direction] for objective in objectives]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    except (ImportError, OSError, ValueError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise InputError(f"--storage {storage}: cannot be used: {str(error).splitlines()[0]}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        named = study.metric_names or list(objectives)
        if named != list(objectives):
            raise InputError(f"{storage}: study {name} has the objectives {', '.join(named)}: use another storage")
        study.set_metric_names(list(objectives))
    return study


def _domains(trials: Sequence[Trial]) -> Mapping[str, BaseDistribution]:
    """Return the values of each knob that varies among trials."""
    seen: dict[str, dict[Value, None]] = {}
    for trial in trials:
        for name, value in trial.point.values:
            seen.setdefault(name, {})[value] = None
    return {name: CategoricalDistribution(tuple(of)) for name, of in seen.items() if len(of) > 1}


def _frozen(trial: Trial, objectives: Sequence[str], domains: Mapping[str, BaseDistribution]) -> FrozenTrial:
    point = trial.point.as_dict()
    mine = {name: of for name, of in domains.items() if name in point}
    first = trial.measurements[0] if trial.measurements else None
    found = [None if first is None else value_of(trial, first, name) for name in objectives]
    values = [value for value in found if value is not None]
    whole = trial.failure is None and len(values) == len(objectives)
    state = TrialState.COMPLETE if whole else TrialState.FAIL if trial.failure else TrialState.PRUNED
    notes: dict[str, object] = {VARIANT: trial.variant, POINT: point, "default": trial.is_default}
    if first is not None:
        notes |= {"workload": first.workload.name, **{n: r.median for n, r in first.readings.items()}}
    if trial.failure is not None:
        notes |= {"stage": trial.failure.stage, "reason": trial.failure.reason}
    return optuna.trial.create_trial(
        state=state,
        params={name: point[name] for name in mine},
        distributions=mine,
        values=values if whole else None,
        user_attrs=notes,
    )

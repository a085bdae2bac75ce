"""Rotary positions as a config.json gives them: which kinds are taken, and which values make sense."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from llmbuild.frontend.documents import shown

TYPES = ("default", "linear", "llama3", "yarn")
_READ = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
"""What each kind reads besides its name and `rope_theta`."""
_NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
_MAY_BE_NULL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_LEAST = {"factor": 1.0, "rope_theta": 1.0 + 1e-6}
_MOST = 1e30


def judge(config: Mapping[str, Any], limit: int, layer_types: Any) -> tuple[list[str], list[str]]:
    """Return the faults and notes of rotary positions; `limit` is how many positions the model was made for."""
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(where) or {}
    if not isinstance(given, dict):
        return [f"{where} is {shown(given)}: it must be null or an object"], []
    faults = _partial(config, given, where)
    notes: list[str] = []
    both = config.get("rope_scaling") and config.get("rope_parameters")
    if both and config["rope_scaling"] != config["rope_parameters"]:
        faults.append("rope_scaling and rope_parameters differ: leave one out")
    if isinstance(layer_types, list) and any(key in layer_types for key in given):
        return [*faults, f"{where} is given for each kind of layer: one for all layers is supported"], notes
    if "rope_theta" in config and not _is_number(config["rope_theta"], _LEAST["rope_theta"]):
        faults.append(f"rope_theta is {shown(config['rope_theta'])}: it must be a number above 1")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in TYPES:
        named = kind if isinstance(kind, str) else shown(kind)
        return [*faults, f"{where}: rope type {named} is not supported; taken are {', '.join(TYPES)}"], notes
    faults += _values(given, kind, where)
    if not faults and kind in ("llama3", "yarn"):
        faults += _original(config, given, where, limit)
    unread = sorted({*given} - {"type", "rope_type", "rope_theta", "partial_rotary_factor", *_READ[kind]})
    if unread:
        notes.append(f"{where}: rope type {kind} does not read {', '.join(shown(key)[1:-1] for key in unread)}")
    return faults, notes


def _partial(config: Mapping[str, Any], given: Mapping[str, Any], where: str) -> list[str]:
    """Refuse positions on a part of each head: the classes that are taken rotate all of it, or fail."""
    places = ((config, "partial_rotary_factor"), (given, "partial_rotary_factor"))
    found = [(f"{where}: " if holder is given else "", holder[key]) for holder, key in places if key in holder]
    return [
        f"{inside}partial_rotary_factor is {shown(value)}: heads are rotated whole; leave it out"
        for inside, value in found
        if type(value) not in (int, float) or value != 1
    ]


def _values(given: Mapping[str, Any], kind: str, where: str) -> list[str]:
    missing = [key for key in _NEEDED.get(kind, ()) if key not in given]
    faults = [f"{where}: {key} is missing, which rope type {kind} needs" for key in missing]
    for key in ("rope_theta", *_READ[kind]):
        if key not in given or (given[key] is None and key in _MAY_BE_NULL):
            continue
        value = given[key]
        if key == "truncate":
            fine, wanted = isinstance(value, bool), "true or false"
        elif key == "original_max_position_embeddings":
            fine, wanted = type(value) is int and value >= 1, "a whole number, at least 1"
        else:
            least = _LEAST.get(key, 1e-6)
            fine, wanted = _is_number(value, least), f"a number, at least {least:g}"
        if not fine:
            faults.append(f"{where}: {key} is {shown(value)}: it must be {wanted}")
    if not faults and kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        faults.append(f"{where}: high_freq_factor must be greater than low_freq_factor")
    if not faults and kind == "yarn" and (given.get("beta_fast") or 32) < (given.get("beta_slow") or 1):
        faults.append(f"{where}: beta_fast must not be less than beta_slow")
    return faults


def _original(config: Mapping[str, Any], given: Mapping[str, Any], where: str, limit: int) -> list[str]:
    """Look at how many positions the model had before they were stretched."""
    key = "original_max_position_embeddings"
    outside = config.get(key)
    if key in config and (type(outside) is not int or outside < 1):
        return [f"{key} is {shown(outside)}: it must be a whole number, at least 1"]
    if outside is not None and given.get(key, outside) != outside:
        return [f"{key} is {outside}, but {given[key]} in {where}: leave one out"]
    first = given.get(key, outside or limit)
    return [] if first <= limit else [f"{where}: {key} {first} is more than max_position_embeddings {limit}"]


def _is_number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and isfinite(value) and least <= value <= _MOST

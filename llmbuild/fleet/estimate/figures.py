"""Figures that estimates are made of: machines by data sheet, models by configuration, published batches.

Batches are in `batches.csv` beside this file, all measured by the source that they name. Left out are rows without a
stated precision or SKU, rows of more than 8 devices, and servers with more than 256 clients, whose batch is not known.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from llmbuild.spec.figures import Architecture, Machine

WIDTHS = {"fp16": 2.0, "fp8": 1.0, "mxfp4": 0.56}
"""Bytes of a parameter; those of mxfp4 are the size of gpt-oss-120b's files over its parameters."""
SOURCES = {
    "aiconfigurator": "ai-dynamo/aiconfigurator@095f58a:aic-core/src/aiconfigurator_core/systems/silicon_sample.csv",
    "argonne": "argonne-lcf/LLM-Inference-Bench@4211f5d:Plots/All_results.csv",
    "argonne-power": "argonne-lcf/LLM-Inference-Bench@4211f5d:Plots/Fig_16_a_b/power_results.csv",
    "splitwise": "Mutinifni/splitwise-sim@8f99e7d:data/perf_model.csv",
    "tensorrt-llm": "NVIDIA/TensorRT-LLM@138f96d:docs/source/performance.md",
    "ml-energy": "ml-energy/leaderboard@0cd52da:public/data/models/*.json",
    "a10g-report": "public report, Benchmark: Llama 3 8b Instruct on NVIDIA A10G",
}
_HELD = 0.92
"""Share of the memory that weights and cache may take: a batch beyond it was computed in parts."""


@dataclass(frozen=True)
class Point:
    """A step of an engine on equal devices: of its decoding rows, of what these see, and of prompt tokens in it."""

    machine: Machine
    model: Architecture
    precision: str
    engine: str
    kind: str
    """What was timed: `batch`, `decode`, `prefill`, `serving` or `steady`."""
    devices: int
    rows: float
    context: float
    """The sum of positions that the rows see."""
    prompt: float
    """Tokens of prompts in the step."""


@dataclass(frozen=True)
class Observation:
    """Seconds of a step, and watts of a device where they are known."""

    point: Point
    seconds: float
    watts: float = 0.0
    source: str = ""


@cache
def machines() -> dict[str, Machine]:
    """Return the machines by name."""
    return {
        cells["device"]: Machine(
            name=cells["device"],
            bandwidth=float(cells["bandwidth_gb_s"]) * 1e9,
            fp16=float(cells["fp16_tflops"]) * 1e12,
            fp8=float(cells["fp8_tflops"]) * 1e12,
            memory_bytes=float(cells["memory_gb"]) * 1e9,
            board_w=float(cells["board_w"]),
            source=cells["source"],
        )
        for cells in _cells("machines.csv")
    }


@cache
def models() -> dict[str, Architecture]:
    """Return the models by name."""
    return {
        cells["model"]: Architecture(
            name=cells["model"],
            parameters=float(cells["parameters"]),
            active=float(cells["active"]),
            layers=int(cells["layers"]),
            kv_bytes=float(cells["kv_bytes"]),
            expert_share=float(cells["expert_share"]),
            source=cells["source"],
        )
        for cells in _cells("models.csv")
    }


@cache
def observations() -> tuple[Observation, ...]:
    """Return the published batches that fit into the memory of their devices, each as a mean step."""
    return tuple(_observation(cells) for cells in _cells("batches.csv") if _fits(cells))


def _cells(name: str) -> Iterator[dict[str, str]]:
    with (files(__package__) / name).open(encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _fits(cells: dict[str, str]) -> bool:
    model, machine = models()[cells["model"]], machines()[cells["device"]]
    cached = float(cells["batch"]) * (float(cells["prompt"]) + float(cells["output"])) * model.kv_bytes
    weights = model.parameters * WIDTHS[cells["precision"]]
    return weights + cached <= _HELD * machine.memory_bytes * int(cells["devices"])


def _observation(cells: dict[str, str]) -> Observation:
    """Return a row as a step: a batch, or a server's steady state, computes its prompts in equal parts of each step."""
    kind, devices = cells["kind"], int(cells["devices"])
    rows, prompt, output, seconds = (float(cells[name]) for name in ("batch", "prompt", "output", "seconds"))
    context = rows * (prompt + output / 2)
    if kind == "prefill":
        load = (0.0, 0.0, rows * prompt)
    else:
        seconds = seconds / output if kind == "batch" else seconds
        load = (rows, context, rows * prompt / output if kind in ("batch", "serving") else 0.0)
    point = Point(
        machines()[cells["device"]], models()[cells["model"]], cells["precision"], cells["engine"], kind, devices, *load
    )
    return Observation(point, seconds, float(cells["watts"] or 0) / devices, SOURCES[cells["source"]])

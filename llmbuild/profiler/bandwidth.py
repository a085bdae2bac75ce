"""A device's read bandwidth, by code for the measured target: sums of the rows of a matrix.

python -m llmbuild.profiler.bandwidth ARTIFACT DRIVER SECONDS      -> one JSON line: bytes_per_s, samples
"""

from __future__ import annotations

import json
import sys
from math import inf
from pathlib import Path
from time import monotonic, perf_counter

from llmbuild.process.child import Limits, python, run
from llmbuild.spec.variant import Failure

ROWS, COLUMNS = 16384, 4096
READ_BYTES = 4 * ROWS * COLUMNS
"""256 MiB: larger than any cache of a GPU or desktop CPU."""
LEAST = 5

SOURCE = f"""
func.func public @read(%data: tensor<{ROWS}x{COLUMNS}xf32>) -> tensor<{ROWS}xf32> {{
  %zero = arith.constant 0.0 : f32
  %empty = tensor.empty() : tensor<{ROWS}xf32>
  %init = linalg.fill ins(%zero : f32) outs(%empty : tensor<{ROWS}xf32>) -> tensor<{ROWS}xf32>
  %sums = linalg.reduce ins(%data : tensor<{ROWS}x{COLUMNS}xf32>) outs(%init : tensor<{ROWS}xf32>) dimensions = [1]
    (%in: f32, %out: f32) {{
      %sum = arith.addf %in, %out : f32
      linalg.yield %sum : f32
    }}
  return %sums : tensor<{ROWS}xf32>
}}
"""


def measure(artifact: Path, driver: str, output: Path, seconds: float = 1.0, until: float = inf) -> float | Failure:
    """Return bytes read per second, the median of its calls, in a separate process that is ended at `until`."""
    command = python("llmbuild.profiler.bandwidth", str(artifact.absolute()), driver, str(seconds), str(output))
    failure = run(command, "profile", Limits(60 + 4 * seconds, 0, until), output)
    return failure or float(json.loads(output.read_text())["bytes_per_s"])


def _samples(artifact: Path, driver: str, seconds: float) -> list[float]:
    import iree.runtime as rt
    import numpy as np

    from llmbuild.runtime.code import mapped

    device, instance = rt.get_device(driver), rt.VmInstance()
    module = mapped(instance, artifact)
    context = rt.VmContext(instance, [rt.create_hal_module(instance, device), module])
    data = device.allocator.allocate_buffer_copy(
        memory_type=rt.MemoryType.DEVICE_LOCAL,
        allowed_usage=rt.BufferUsage.DEFAULT,
        device=device,
        buffer=np.ones((ROWS, COLUMNS), np.float32),
        element_type=rt.HalElementType.FLOAT_32,
    )
    function, taken = module.lookup_function("read"), list[float]()
    end = monotonic() + seconds
    while len(taken) <= LEAST or monotonic() < end:
        begin = perf_counter()
        arguments, results = rt.VmVariantList(1), rt.VmVariantList(1)
        arguments.push_ref(data)
        context.invoke(function, arguments, results)
        taken.append(perf_counter() - begin)
        del arguments, results
    return taken[1:]


def _main(artifact: str, driver: str, seconds: str, output: str) -> None:
    taken = sorted(_samples(Path(artifact), driver, float(seconds)))
    told: dict[str, object] = {"bytes_per_s": READ_BYTES / taken[len(taken) // 2], "samples": taken}
    Path(output).write_text(json.dumps(told))


if __name__ == "__main__":
    _main(*sys.argv[1:])

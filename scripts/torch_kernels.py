"""Time the kernels of a decode step by PyTorch's profiler, which sees every kernel of its process, IREE's too.

    python torch_kernels.py REQUEST.json        writes one JSON document: kernels and steps, or the reason for none

REQUEST.json names artifact_path, parameters_path, abi, driver, steps and output. IREE's runtime profiles no CUDA device
by itself (3.13). Needs torch for this GPU, and IREE's runtime and llmbuild on PYTHONPATH, as `run.py` puts them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def kernels(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the kernels of so many decode steps: names, how often they ran, and seconds by the device's clock."""
    try:
        import torch
        from torch.profiler import ProfilerActivity, profile
    except ImportError as error:
        return {"reason": f"PyTorch's profiler is needed on {asked['driver']}: {error}"}
    if not torch.cuda.is_available():
        return {"reason": f"PyTorch's profiler is needed on {asked['driver']}, and PyTorch here sees no GPU"}
    from llmbuild.runtime.session import Session, Settings
    from llmbuild.spec.program import abi_from

    torch.zeros(1, device="cuda")  # a context, before the profiler looks for one
    abi = abi_from(asked["abi"])
    session = Session(Path(asked["artifact_path"]), Path(asked["parameters_path"]), abi, Settings(asked["driver"]))

    def steps() -> None:
        for _ in range(asked["steps"]):
            session.decode(1, abi.context // 2)

    steps()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        steps()
    session.close()
    rows = [(e.key, e.count, e.self_device_time_total * 1e-6) for e in seen.key_averages()]
    found = [{"name": name, "count": count, "seconds": seconds} for name, count, seconds in rows if seconds > 0]
    return {"kernels": found, "steps": asked["steps"]} if found else {"reason": "PyTorch's profiler saw no kernel"}


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(request["output"]).write_text(json.dumps(kernels(request)))

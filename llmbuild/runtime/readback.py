"""Read buffers of a device that does not share memory with this process."""

from __future__ import annotations

from typing import Any, TypeVar

import iree.runtime as rt
import numpy as np
from numpy.typing import NDArray

_STAGING_MEMORY = rt.MemoryType.HOST_LOCAL | rt.MemoryType.DEVICE_VISIBLE
_STAGING_USAGE = rt.BufferUsage.TRANSFER_TARGET | rt.BufferUsage.MAPPING_SCOPED

Kind = TypeVar("Kind", bound=np.generic)


class Readback:
    """Copies buffers through host-visible staging memory, allocated once per size.

    IREE's own `DeviceArray.to_host` hands the driver the memory of a numpy array where the driver imports any; Vulkan
    requires page alignment, which numpy's memory lacks, and CUDA would pin and unpin it for every token.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._done = device.create_semaphore(0)
        self._copies = 0
        self._staging: dict[int, Any] = {}

    def __call__(self, view: Any, kind: type[Kind]) -> NDArray[Kind]:
        """Return a view's elements in the staging memory; valid until the next read of this size."""
        source = view.get_buffer()
        size = view.byte_length
        if size not in self._staging:
            self._staging[size] = self._device.allocator.allocate_buffer(
                memory_type=_STAGING_MEMORY, allowed_usage=_STAGING_USAGE, allocation_size=size
            )
        target = self._staging[size]
        ready = rt.HalFence.create_at(self._done, self._copies)
        self._copies += 1
        self._device.queue_copy(source, target, ready, rt.HalFence.create_at(self._done, self._copies))
        self._done.wait(self._copies)
        found: NDArray[Kind] = target.map().asarray(view.shape, np.dtype(kind))
        return found

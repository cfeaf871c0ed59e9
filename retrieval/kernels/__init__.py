"""Compiled MaxSim: one kernel for the CPU, one for CUDA. `METAEMBED_KERNELS=0` switches both off."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

_KERNELS = {"cpu": ("compiled", ".cpu"), "cuda": ("fused", ".cuda")}  # the backend's name, and the module


class Kernel(Protocol):
    """What scores documents as torch does, faster."""

    instructions: Mapping[str, str]  # for every quantization, what it is multiplied with

    def scores(
        self,
        slabs: Sequence[tuple[Tensor, Tensor | None]],
        queries: Tensor,
        quantization: str,
        index: Tensor | None = None,
        check: bool = False,
    ) -> Tensor:
        """Score queries against documents.

        Args:
            slabs: Of all documents, `(stored [n, used, ...], scales [n, used] or None)`, as `quantization.encode`
                makes them.
            queries: `[Q, r_q, D]` float32, not rounded yet.
            quantization: Of the documents.
            index: `[m]` int64: score only these documents.
            check: Look for NaN and infinity in the documents.

        Returns:
            `[Q, n]`, or `[Q, m]` with an index, float32.

        Raises:
            ValueError: if `check` finds NaN or infinity, or a score overflows.
        """


def kernel_name(device: torch.device) -> str:
    """Return the name of the backend that a device's kernel has, or an empty string if it has none."""
    return _KERNELS.get(device.type, ("", ""))[0]


def choose_kernel(device: torch.device, stored: Sequence[Tensor], r_q: int, dim: int) -> Kernel | str:
    """Return the kernel for these documents, or the reason why there is none. Never raises.

    Args:
        device: Where the documents are.
        stored: Their slabs, as stored.
        r_q: Vectors of a query.
        dim: Dimensions of a query.
    """
    if os.environ.get("METAEMBED_KERNELS") == "0":
        return "kernels are switched off by METAEMBED_KERNELS=0"
    if device.type not in _KERNELS:
        return f"there is none for {device.type}"
    module = importlib.import_module(_KERNELS[device.type][1], __package__)
    if not all(module.takes(slab, r_q) for slab in stored):
        return module.LIMITS
    return module.find_kernel(device, dim)

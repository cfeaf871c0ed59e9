"""Compiled MaxSim: one kernel for the CPU, one for CUDA. `METAEMBED_KERNELS=0` switches both off."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_KERNELS = {"cpu": ("compiled", ".cpu"), "cuda": ("fused", ".cuda")}  # the backend's name, and the module


Slabs = Sequence[tuple[Tensor, Tensor | None]]  # stored vectors and their scales


class Kernel(Protocol):
    """Scores documents like torch, but faster."""

    instructions: Mapping[str, str]  # for every quantization, the instructions that multiply it

    def scores(
        self,
        slabs: Slabs,
        queries: Tensor,
        quantization: str,
        index: Tensor | None = None,
        check: bool = False,
    ) -> Tensor:
        """Score queries against documents.

        Args:
            slabs: Of all documents, `(stored [n, used, ...], scales [n, used] or None)`, as `quantization.encode`
                returns them.
            queries: `[Q, r_q, D]` float32, not rounded yet.
            quantization: Of the documents.
            index: `[m]` int64: score only these documents.
            check: Look for NaN and infinity in the documents.

        Returns:
            `[Q, n]`, or `[Q, m]` with an index, float32.

        Raises:
            ValueError: if `check` finds NaN or infinity, or a score overflows.
        """


@runtime_checkable
class SelectingKernel(Kernel, Protocol):
    """A kernel that also selects the best documents while it scores them."""

    def top_k(
        self,
        segments: Sequence[Slabs],
        queries: Tensor,
        quantization: str,
        k: int,
        index: Tensor | None = None,
        check: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Find the `k` best documents of every query.

        Args:
            segments: Documents, as the slabs of some, the slabs of the next ones, and so on.
            queries: As in `scores`.
            quantization: As in `scores`.
            k: How many to find.
            index: `[m]` int64, ascending: score only these documents.
            check: As in `scores`.

        Returns:
            Scores and places among the documents (with an index: places in the index), each `[Q, min(k, n)]`, best
            first, equal scores by place.
        """

    def rescore(
        self,
        segments: Sequence[Slabs],
        queries: Tensor,
        quantization: str,
        candidates: Tensor,
        counts: Tensor,
        k: int,
        check: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Find the `k` best of every query's own candidates.

        Args:
            segments: As in `top_k`.
            queries: As in `scores`.
            quantization: As in `scores`.
            candidates: `[Q, m]` int64, positions of documents; the first `counts[q]` of a row are ascending.
            counts: `[Q]` int64, how many of a row to score, from the first.
            k: How many to find.
            check: As in `scores`.

        Returns:
            Scores and positions, each `[Q, min(k, m)]`, best first, equal scores by position; a query with fewer
            candidates has -inf and -1 after them.
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
    try:
        module = importlib.import_module(_KERNELS[device.type][1], __package__)
        if not all(module.takes(slab, r_q, dim) for slab in stored):
            return module.LIMITS
        return module.find_kernel(device, dim)
    except Exception as error:  # torch scores as well
        return f"{type(error).__name__}: {error}"

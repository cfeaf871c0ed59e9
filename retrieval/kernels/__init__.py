"""Compiled MaxSim: one kernel for the CPU, one for CUDA. `METAEMBED_KERNELS=0` switches both off."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

_KERNELS = {"cpu": ("compiled", ".cpu"), "cuda": ("fused", ".cuda")}  # the backend's name, and the module

Slabs = Sequence[tuple[Tensor, Tensor | None]]  # stored vectors and their scales


@dataclass(frozen=True)
class Slab:
    """Some consecutive vectors of every document: `stored` `[n, vectors, ...]`, `scales` `[n, vectors]` or `None`."""

    stored: Tensor
    scales: Tensor | None


@dataclass(frozen=True, eq=False)
class Store:
    """Documents of one quantization, as slabs of their first vectors, their next ones, and so on."""

    slabs: Sequence[Slab]
    quantization: str
    dim: int
    checked: bool  # no value is NaN, infinite or so large that scores overflow
    _prefixes: dict[int, Store] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.slabs[0].stored.shape[0]  # len() of a tensor is slow

    @cached_property
    def vectors(self) -> int:
        """How many vectors a document has."""
        return sum(slab.stored.shape[1] for slab in self.slabs)

    @cached_property
    def kinds(self) -> list[Tensor]:
        """One of the stored tensors for every way in which they are stored."""
        return list({(slab.stored.dtype, slab.stored.stride(-1)): slab.stored for slab in self.slabs}.values())

    def prefix(self, r_c: int) -> Store:
        """Return the first `r_c` vectors of every document, without a copy. The result is kept for the next call."""
        if r_c not in self._prefixes:
            slabs, left = [], r_c
            for slab in self.slabs:
                used = min(left, slab.stored.shape[1])
                slabs.append(Slab(slab.stored[:, :used], None if slab.scales is None else slab.scales[:, :used]))
                left -= used
                if not left:
                    break
            self._prefixes[r_c] = Store(slabs, self.quantization, self.dim, self.checked)
        return self._prefixes[r_c]

    def pick(self, which: slice | Tensor) -> Store:
        """Return some of the documents. A slice copies nothing."""
        slabs = [Slab(s.stored[which], None if s.scales is None else s.scales[which]) for s in self.slabs]
        return Store(slabs, self.quantization, self.dim, self.checked)


@dataclass(frozen=True, eq=False)
class Step:
    """A stage of a cascade, prepared: score queries `[Q, r_q, D]` with documents, and keep the best so many."""

    queries: Tensor
    stores: Sequence[Store]
    keep: int


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


class SelectingKernel(Kernel, Protocol):
    """A kernel that also selects the best documents while it scores them, in one call for all stages of a cascade."""

    def cascade(
        self, steps: Sequence[Step], allowed: Tensor | None = None, margin: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score all documents, keep the best, score those again, and so on.

        Args:
            steps: What to score, and how many documents to keep each time; the last one keeps `k`.
            allowed: `[N]` bool: the documents that may be found, or `None` for all.
            margin: As in `cascade.cascade`.

        Returns:
            Scores and positions of documents, each `[Q, min(k, allowed documents)]`, best first, equal scores by
            position; and `[Q, steps]`, how many documents each step scored.

        Raises:
            ValueError: if a step's documents were not checked and hold NaN or infinity, or a score overflows.
        """


def kernel_name(device: torch.device) -> str:
    """Return the name of the backend that a device's kernel has, or an empty string if it has none."""
    return _KERNELS.get(device.type, ("", ""))[0]


@cache
def _import_kernel(device_type: str) -> Any:
    return importlib.import_module(_KERNELS[device_type][1], __package__)


def choose_kernel(device: torch.device, stored: Iterable[Tensor], r_q: int, dim: int) -> Kernel | str:
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
        module = _import_kernel(device.type)
        if not all(module.takes(slab, r_q, dim) for slab in stored):
            return module.LIMITS
        return module.find_kernel(device, dim)
    except Exception as error:  # torch scores as well
        return f"{type(error).__name__}: {error}"

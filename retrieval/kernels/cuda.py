"""The fused CUDA kernel: MaxSim by the library late-interaction-kernels, if it is installed and agrees with torch.

Its version 0.4.5 multiplies float32 as float16, which is not exact, and bfloat16 unchanged, with sums in float32. So
it gets bfloat16 documents only. It needs one contiguous tensor, so prefixes and slabs are copied, a bounded number of
documents at a time; the similarities are never written to the GPU's memory.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...scoring_metaembed import check_finite
from ..quantization import round_queries

LIMITS = "it takes bfloat16 documents only: float32 it would multiply as float16"
_COPIED = 1 << 27  # numbers of documents that are copied at a time
_PACKAGE = "late-interaction-kernels"

MaxSim = Callable[[Tensor, Tensor], Tensor]  # of queries [Q, r_q, D] and documents [n, r_c, D]: scores [Q, n]


def takes(stored: Tensor, r_q: int, dim: int) -> bool:
    """Return whether documents stored like this can be scored with queries of so many vectors and dimensions."""
    return stored.dtype == torch.bfloat16


class FusedKernel:
    """A fused MaxSim, with the interface of the compiled CPU kernel.

    Args:
        maxsim: Scores queries `[Q, r_q, D]` against documents `[n, r_c, D]`, both bfloat16: `[Q, n]` float32.
        version: Of the library, for the name that results carry.
    """

    def __init__(self, maxsim: MaxSim, version: str = ""):
        self._maxsim = maxsim
        self.instructions = {"bfloat16": f"{_PACKAGE} {version}".strip()}

    def scores(
        self,
        slabs: Sequence[tuple[Tensor, Tensor | None]],
        queries: Tensor,
        quantization: str,
        index: Tensor | None = None,
        check: bool = False,
    ) -> Tensor:
        """See `Kernel.scores`. Documents are bfloat16, without scales."""
        q = round_queries(queries, quantization).bfloat16()
        n = len(slabs[0][0]) if index is None else len(index)
        out = torch.empty(len(q), n, device=q.device)
        step = max(1, _COPIED // (sum(stored.shape[1] for stored, _ in slabs) * q.shape[2]))
        for start in range(0, n, step):
            part: slice | Tensor = slice(start, min(start + step, n))
            which = part if index is None else index[part].to(q.device)
            rows = [stored[which] for stored, _ in slabs]
            documents = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)  # [step, r_c, D]
            if check:
                check_finite(documents, "documents")
            out[:, part] = self._maxsim(q, documents)
        return check_finite(out, "scores")


@functools.cache
def load_fused(device: torch.device, dim: int) -> FusedKernel:
    """Import the library and compare it with torch, on a device and at a number of dimensions.

    Raises:
        ImportError: if it is not installed.
        RuntimeError: if it fails there, or its scores differ from torch's.
    """
    module = importlib.import_module("late_interaction_kernels")
    kernel = FusedKernel(module.maxsim, importlib.metadata.version(_PACKAGE))
    check_fused(kernel, device, dim)
    return kernel


def find_kernel(device: torch.device, dim: int) -> FusedKernel | str:
    """Return the fused kernel, or the reason why there is none. Warns if it fails or torch disagrees with it."""
    try:
        return load_fused(device, dim)
    except ImportError as error:
        return f"{_PACKAGE} cannot be imported ({error})"
    except Exception as error:  # a GPU's compiler may raise any error
        warnings.warn(f"{_PACKAGE} is not used: {error}; torch is used instead", RuntimeWarning, stacklevel=2)
        return str(error)


def check_fused(kernel: FusedKernel, device: torch.device, dim: int) -> None:
    """Raise if a kernel's scores differ from the formula, on small examples of all its uses.

    Raises:
        RuntimeError: if they are not.
    """
    generator = torch.Generator().manual_seed(0)
    for count, r_q, n, r_c in ((1, 1, 40, 1), (3, 4, 33, 8), (2, 16, 20, 64)):
        queries, documents = (torch.randn(*shape, dim, generator=generator) for shape in ((count, r_q), (n, r_c)))
        queries = torch.nn.functional.normalize(queries, dim=-1).bfloat16().to(device)
        documents = torch.nn.functional.normalize(documents, dim=-1).bfloat16().to(device)
        expected = torch.einsum("qid,njd->qnij", queries.double(), documents.double()).amax(dim=3).sum(dim=2)
        halves = [(part, None) for part in documents.split([(r_c + 1) // 2, r_c // 2], dim=1) if part.shape[1]]
        error = (kernel.scores(halves, queries.float(), "bfloat16") - expected).abs().max().item()
        if not error < 1e-4:
            raise RuntimeError(f"its scores are off by {error:.1e} on {device} at {dim} dimensions")

"""The compiled CPU kernel: `maxsim.cpp`, built by the system's C++ compiler when first needed, and checked.

A plain shared library loaded by ctypes, because it builds in seconds with no headers of Python or torch, and because
one built on the machine that runs it is built for exactly that processor. It is kept in the user's cache, under a name
made from the source, the compiler and the processor, so a home directory shared by unlike machines is no danger.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..quantization import QUANTIZATIONS, decode, encode, query_levels, round_queries

_MOST_QUERY_VECTORS = 512
LIMITS = f"it takes float32 and bfloat16 on the CPU, and queries of at most {_MOST_QUERY_VECTORS} vectors"
_SOURCE, _HEADER = Path(__file__).with_name("maxsim.cpp"), Path(__file__).with_name("maxsim.h")


def takes(stored: Tensor, r_q: int) -> bool:
    """Whether documents kept like this, and queries of so many vectors, can be scored as they are."""
    known = stored.dtype in (torch.float32, torch.bfloat16, torch.uint8)
    return known and stored.device.type == "cpu" and stored.stride(-1) == 1 and r_q <= _MOST_QUERY_VECTORS


class KernelUnavailable(RuntimeError):
    """The compiled kernel cannot be built or loaded here; the message says why."""


class KernelUntrusted(KernelUnavailable):
    """The compiled kernel does not give torch's answers here."""


class _Slab(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("scales", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("document", "vector", "scale_document", "used")
    ]


class Kernel:
    """A loaded kernel.

    Attributes:
        instructions: For every quantization, the instructions that it is multiplied with.
    """

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        p, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._library.metaembed_scores.argtypes = [p, i64, p, i64, i64, i32, p, p, i64, i64, p, i64, i32, i32]
        self._library.metaembed_instructions.restype = ctypes.c_char_p
        self.instructions = {
            name: self._library.metaembed_instructions(kind).decode() for kind, name in enumerate(QUANTIZATIONS)
        }

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
            slabs: Of all documents, `(stored [n, used, bytes or D], scales [n, used] or None)`, on the CPU, as
                `quantization.encode` makes them; the last dimension contiguous.
            queries: `[Q, r_q, D]` float32, not rounded yet.
            quantization: Of the documents.
            index: `[m]` int64: score only these documents.
            check: Look for NaN and infinity in the documents.

        Returns:
            `[Q, n]`, or `[Q, m]` with an index, float32.

        Raises:
            ValueError: if `check` finds NaN or infinity.
        """
        count, r_q, dim = queries.shape
        n = len(slabs[0][0]) if index is None else len(index)
        out = torch.empty(count, n)
        if out.numel() == 0:
            return out
        scales = None
        if quantization in ("float32", "bfloat16"):
            values = round_queries(queries, quantization).contiguous()
        else:
            values, scales = (x.contiguous() for x in query_levels(queries))
        described = (_Slab * len(slabs))(*(_describe(stored, of) for stored, of in slabs))
        status = self._library.metaembed_scores(
            described,
            len(slabs),
            _address(index),
            n,
            dim,
            QUANTIZATIONS.index(quantization),
            _address(values),
            _address(scales),
            count,
            r_q,
            out.data_ptr(),
            n,
            check,
            torch.get_num_threads(),
        )
        if status == 1:
            raise ValueError("documents hold NaN or infinity, or values too large: is there an overflow?")
        if status:
            raise MemoryError("the compiled kernel ran out of memory; score fewer queries at a time")
        return out


@functools.cache
def load_kernel(architecture: str = "native") -> Kernel:
    """Build the kernel unless it is in the cache, load it, and compare it with torch.

    Args:
        architecture: What the compiler's `-march` takes; others than `"native"` try what other processors run.

    Raises:
        KernelUnavailable: if there is no compiler, or it fails.
        KernelUntrusted: if the kernel's answers are not torch's.
    """
    kernel = Kernel(_build(architecture))
    for quantization in QUANTIZATIONS:
        error = _disagreement(kernel, quantization)
        if not error < 1e-4:
            raise KernelUntrusted(f"the compiled kernel is off by {error:.1e} on {quantization} documents")
    return kernel


def find_kernel(device: torch.device, dim: int) -> Kernel | str:
    """Return the kernel for this machine, or the reason why there is none. Warns if torch disagrees with it."""
    try:
        return load_kernel()
    except KernelUntrusted as error:
        warnings.warn(f"{error}; torch is used instead", RuntimeWarning, stacklevel=2)
        return str(error)
    except KernelUnavailable as error:
        return str(error)


def _disagreement(kernel: Kernel, quantization: str) -> float:
    """The largest difference to the formula in float64, on a little of everything the kernel does."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    shapes = ((1, 1, 61, 3, 70), (2, 4, 30, 3, 600), (1, 16, 100, 5, 128), (1, 9, 20, 3, 2048), (40, 16, 7, 20, 64))
    for count, r_q, n, r_c, dim in shapes:
        queries, documents = (torch.randn(*s, generator=generator) for s in ((count, r_q, dim), (n, r_c, dim)))
        queries, documents = (
            queries / queries.norm(dim=-1, keepdim=True),
            documents / documents.norm(dim=-1, keepdim=True),
        )
        stored, scales = encode(documents, quantization)
        index = torch.randperm(n, generator=generator)[: n // 2]
        q, d = round_queries(queries, quantization).double(), decode(stored, scales, quantization, dim).double()
        expected = torch.einsum("qid,njd->qnij", q, d).amax(dim=3).sum(dim=2)
        for at in (None, index):
            got = kernel.scores([(stored, scales)], queries, quantization, at)
            wanted = expected if at is None else expected[:, at]
            difference = (got - wanted).abs().max().item()
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def _describe(stored: Tensor, scales: Tensor | None) -> _Slab:
    size = stored.element_size()
    if stored.stride(-1) != 1 and stored.shape[-1] > 1:
        raise ValueError("the last dimension of documents must be contiguous")
    if scales is not None and scales.shape[1] > 1 and scales.stride(1) != 1:
        raise ValueError("the scales of a document must lie together")
    used = stored.shape[1]
    return _Slab(
        stored.data_ptr(),
        _address(scales),
        stored.stride(0) * size,
        stored.stride(1) * size,
        scales.stride(0) if scales is not None else 0,
        used,
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _build(architecture: str) -> Path:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if not compiler:
        raise KernelUnavailable("no C++ compiler was found (set CXX, or install g++ or clang++)")
    if os.name == "nt":
        raise KernelUnavailable("the compiled kernel is written for the compilers of Linux and macOS")
    tune = f"-mcpu={architecture}" if platform.machine() in ("arm64", "aarch64") else f"-march={architecture}"
    command = [compiler, "-O3", tune, "-std=c++17", "-shared", "-fPIC", "-pthread"]
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, _HEADER)]
        made_from = "\0".join([*sources, version, _processor(), *command])
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaembed"
        library = cache / f"kernels-{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.so"
        if library.exists():
            return library
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as building:  # so that no one loads a half-written library
            made = Path(building) / "kernels.so"
            done = subprocess.run([*command, str(_SOURCE), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise KernelUnavailable(f"{compiler} failed: {done.stderr.strip()[-500:]}")
            os.replace(made, library)
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelUnavailable(f"the compiled kernel could not be built: {error}") from error
    return library


def _processor() -> str:
    """What tells this processor's abilities from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))

"""The compiled CPU kernel: `maxsim.cpp`, built by the system's C++ compiler when first needed, and checked.

A plain shared library loaded by ctypes, because it builds in seconds with no headers of Python or torch, and because
one built on the machine that runs it is built for exactly that processor. It is kept in the user's cache, under a name
made from the source, the compiler and the processor, so that unlike machines can share a home directory, and from a
checksum of its own, so that a damaged one is never loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantization import QUANTIZATIONS, decode, encode, round_queries
from . import Slab, Slabs, Step, Store

_MOST_QUERY_VECTORS = 512
_MOST_INTEGER_DIMENSIONS = 1 << 16  # 255 * 127 * this fits the 32 bits in which integers are summed
LIMITS = (
    f"it takes float32, bfloat16 and integers of at most {_MOST_INTEGER_DIMENSIONS} dimensions on the CPU, "
    f"and queries of at most {_MOST_QUERY_VECTORS} vectors"
)
_SOURCE, _HEADER = Path(__file__).with_name("maxsim.cpp"), Path(__file__).with_name("maxsim.h")
_PATIENCE = 180  # seconds that a compiler may take
_BUILDING = "building-"  # prefix of the folders in which libraries are built
_LOCK = threading.Lock()  # threads that search for the first time build one library
_MOST_DOCUMENTS = (1 << 32) - 1  # positions are kept in 32 bits


def takes(stored: Tensor, r_q: int, dim: int) -> bool:
    """Return whether documents stored like this can be scored with queries of so many vectors and dimensions."""
    if stored.device.type != "cpu" or stored.stride(-1) != 1 or r_q > _MOST_QUERY_VECTORS:
        return False
    if stored.dtype == torch.uint8:
        return dim <= _MOST_INTEGER_DIMENSIONS
    return stored.dtype in (torch.float32, torch.bfloat16)


class KernelUnavailable(RuntimeError):
    """The compiled kernel cannot be built or loaded here; the message says why."""


class NoCompiler(KernelUnavailable):
    """No compiler was found to build the kernel."""


class KernelUntrusted(KernelUnavailable):
    """The scores of the compiled kernel differ from those of torch."""


class _Slab(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("scales", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("document", "vector", "scale_document", "used")
    ]


class _Stage(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("slabs", "sizes")),
        *((name, ctypes.c_int64) for name in ("slab_count", "segment_count", "dim", "kind", "check")),
        ("queries", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("query_stride", "r_q", "keep")),
    ]


class CpuKernel:
    """A loaded kernel.

    Args:
        library: The file to load.

    Attributes:
        instructions: For every quantization, the instructions that it is multiplied with.

    Raises:
        KernelUnavailable: if the file cannot be loaded or is not the kernel.
    """

    def __init__(self, library: Path):
        p, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        try:
            loaded = ctypes.CDLL(str(library))
            self._scores, self._cascade = loaded.metaembed_scores, loaded.metaembed_cascade
            self._encode = loaded.metaembed_encode
            instructions = loaded.metaembed_instructions
        except (OSError, AttributeError) as error:
            hint = "set XDG_CACHE_HOME to a folder of a file system from which programs may be run (not noexec)"
            raise KernelUnavailable(f"{library} cannot be loaded ({error}); {hint}") from error
        self._scores.argtypes = [p, i64, p, i64, i32, p, i64]
        self._cascade.argtypes = [p, i64, i64, p, ctypes.c_float, i32, p, p, i64, p]
        self._encode.argtypes = [p, i64, i64, i64, i64, p, i64]
        instructions.restype = ctypes.c_char_p
        self.instructions = {name: instructions(kind).decode() for kind, name in enumerate(QUANTIZATIONS)}

    def scores(
        self,
        slabs: Slabs,
        queries: Tensor,
        quantization: str,
        index: Tensor | None = None,
        check: bool = False,
    ) -> Tensor:
        """See `Kernel.scores`. Documents are on the CPU, the last dimension contiguous."""
        n = len(slabs[0][0]) if index is None else len(index)
        out = torch.empty(len(queries), n)
        if out.numel():
            queries, index = _rows(queries), None if index is None else index.contiguous()
            stage = _Stages(1)
            stage.describe(0, queries, [_describe_all(slabs)], [len(slabs[0][0])], quantization, check, n)
            options = torch.get_num_threads(), out.data_ptr(), n
            _raise(self._scores(stage.stages, len(queries), _address(index), n, *options))
        return out

    def cascade(
        self, steps: Sequence[Step], allowed: Tensor | None = None, margin: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `SelectingKernel.cascade`."""
        count, n = len(steps[0].queries), sum(map(len, steps[0].stores))
        if n > _MOST_DOCUMENTS:
            raise ValueError(f"the compiled kernel takes at most {_MOST_DOCUMENTS} documents, not {n}: split them")
        width = min(steps[-1].keep, n if count or allowed is None else int(allowed.sum()))
        values, positions = torch.empty(count, width), torch.empty(count, width, dtype=torch.int64)
        scored = torch.zeros(count, len(steps), dtype=torch.int64)
        if not values.numel():
            return values, positions, scored
        stages = _Stages(len(steps))
        for i, step in enumerate(steps):
            stores = step.stores
            sizes = [len(store) for store in stores]
            check = not all(store.checked for store in stores)
            stages.describe(i, step.queries, map(_described, stores), sizes, stores[0].quantization, check, step.keep)
        options = math.nan if margin is None else margin, torch.get_num_threads()
        into = values.data_ptr(), positions.data_ptr(), width, scored.data_ptr()
        _raise(self._cascade(stages.stages, len(steps), count, _address(allowed), *options, *into))
        found = int(scored[0, 0])  # fewer may be allowed than are asked for
        return (values, positions, scored) if found >= width else (values[:, :found], positions[:, :found], scored)

    def encode_int8(self, vectors: Tensor, slabs: Slabs) -> bool:
        """Encode documents in int8, exactly as `quantization.encode` does.

        Args:
            vectors: `[n, r, D]` float32 on the CPU.
            slabs: Where to write, contiguous: stored vectors `[n, used, D]` uint8 and scales `[n, used]` float32, for
                the first vectors, the next ones, and so on; `r` or fewer together.

        Returns:
            Whether all numbers pass `check_finite`. If not, what was written is arbitrary.
        """
        vectors = vectors if vectors.stride(2) == 1 else vectors.contiguous()
        n, _, dim = vectors.shape
        into = _describe_all(slabs)
        return not self._encode(vectors.data_ptr(), n, *vectors.stride()[:2], dim, ctypes.addressof(into), len(into))


class _Stages:
    """Descriptions of stages, with the memory that they point to."""

    def __init__(self, count: int):
        self.stages = (_Stage * count)()
        self._alive: list[Any] = []

    def describe(
        self,
        at: int,
        queries: Tensor,
        slabs: Iterable[ctypes.Array[_Slab]],
        sizes: list[int],
        quantization: str,
        check: bool,
        keep: int,
    ) -> None:
        """Fill in one of them: queries `[Q, r_q, D]`, and the slabs and the number of documents of every segment."""
        queries, segments = _rows(queries), list(slabs)
        of_segments = (ctypes.c_void_p * len(segments))(*map(ctypes.addressof, segments))
        all_sizes = (ctypes.c_int64 * len(sizes))(*sizes)
        self._alive.append((queries, segments, of_segments, all_sizes))
        self.stages[at] = (
            *(ctypes.addressof(of_segments), ctypes.addressof(all_sizes), len(segments[0]), len(segments)),
            *(queries.shape[2], QUANTIZATIONS.index(quantization), check),
            *(queries.data_ptr(), queries.stride(0), queries.shape[1], keep),
        )


_DESCRIBED: weakref.WeakKeyDictionary[Store, ctypes.Array[_Slab]] = weakref.WeakKeyDictionary()


def _described(store: Store) -> ctypes.Array[_Slab]:
    """The slabs of a store, which are described once."""
    found = _DESCRIBED.get(store)
    if found is None:
        found = _DESCRIBED[store] = _describe_all([(slab.stored, slab.scales) for slab in store.slabs])
    return found


def _describe_all(slabs: Slabs) -> ctypes.Array[_Slab]:
    return (_Slab * len(slabs))(*(_describe(stored, scales) for stored, scales in slabs))


def _rows(queries: Tensor) -> Tensor:
    """Queries `[Q, r_q, D]` whose vectors lie together; a prefix of more of them is not copied."""
    _, r_q, dim = queries.shape
    together = queries.stride(2) == 1 and (r_q == 1 or queries.stride(1) == dim)
    return queries if together and queries.dtype == torch.float32 else queries.float().contiguous()


def _raise(status: int) -> None:
    if status == 1:
        raise ValueError("documents hold NaN or infinity, or values too large: look for an overflow")
    if status == 3:
        raise ValueError("scores hold NaN or infinity, or values beyond 1e+15: look for an overflow")
    if status:
        raise MemoryError("the compiled kernel ran out of memory; score fewer queries at a time")


@functools.cache
def load_kernel(architecture: str = "native") -> CpuKernel:
    """Build the kernel unless it is in the cache, load it, and compare it with torch.

    Args:
        architecture: What the compiler's `-march` takes; other values than `"native"` test code for other processors.

    Raises:
        KernelUnavailable: if there is no compiler, or it fails, or its library cannot be loaded.
        KernelUntrusted: if the kernel's scores differ from torch's.
    """
    kernel = CpuKernel(_build(architecture))
    for quantization in QUANTIZATIONS:
        error = _disagreement(kernel, quantization)
        if not error < 1e-4:
            raise KernelUntrusted(f"the compiled kernel is off by {error:.1e} on {quantization} documents")
    return kernel


def find_kernel(device: torch.device, dim: int) -> CpuKernel | str:
    """Return the kernel for this machine, or the reason why there is none."""
    with _LOCK:
        return _find()


@functools.cache
def _find() -> CpuKernel | str:
    """Try once, and warn once if something fails. A missing compiler is no reason to warn."""
    try:
        return load_kernel()
    except NoCompiler as error:
        return str(error)
    except Exception as error:  # torch scores after any failure
        reason = str(error) or type(error).__name__
    warnings.warn(f"no compiled kernel: {reason}. torch is used instead", RuntimeWarning, stacklevel=2)
    return reason


def _disagreement(kernel: CpuKernel, quantization: str) -> float:
    """Return the largest difference from the formula in float64, on small examples of everything the kernel does."""
    generator = torch.Generator().manual_seed(0)
    errors = [0.0]

    def compare(got: Tensor, expected: Tensor) -> None:
        if got.numel():
            errors.append((got - expected).abs().max().nan_to_num(torch.inf).item())

    shapes = ((1, 1, 61, 3, 70), (2, 4, 130, 3, 600), (1, 16, 100, 5, 128), (1, 9, 20, 3, 2048), (40, 16, 7, 20, 64))
    for count, r_q, n, r_c, dim in shapes:
        queries, documents = (torch.randn(*s, generator=generator) for s in ((count, r_q, dim), (n, r_c, dim)))
        queries, documents = (x / x.norm(dim=-1, keepdim=True) for x in (queries, documents))
        store = Store(
            [Slab(*encode(x, quantization)) for x in documents.split([1, r_c - 1], 1)], quantization, dim, True
        )
        index = torch.randperm(n, generator=generator)[: n // 2]
        q = round_queries(queries, quantization).double()
        d = torch.cat([decode(slab.stored, slab.scales, quantization, dim) for slab in store.slabs], dim=1).double()
        expected = {}
        for budget in ((1, 1), (r_q, r_c)):
            part, used = q[:, : budget[0]], [(slab.stored, slab.scales) for slab in store.prefix(budget[1]).slabs]
            every = expected[budget] = torch.einsum("qid,njd->qnij", part, d[:, : budget[1]]).amax(dim=3).sum(dim=2)
            for at in (None, index):
                found = kernel.scores(used, queries[:, : budget[0]], quantization, at)
                compare(found, every if at is None else every[:, at])
        for allowed in (None, torch.arange(n) % 3 > 0, torch.arange(n) % 9 == 0):
            left = expected[1, 1] if allowed is None else expected[1, 1].masked_fill(~allowed, -torch.inf)
            steps = [Step(queries[:, :1], [store.prefix(1)], 6), Step(queries, [store], 2)]
            for taken in (steps, steps[:1]):
                kept = left.topk(min(6, int(left[0].isfinite().sum()))).indices
                if len(taken) > 1:
                    best = expected[r_q, r_c].gather(1, kept).topk(min(2, kept.shape[1])).values
                else:
                    best = left.gather(1, kept)
                values, places, _ = kernel.cascade(taken, allowed)
                compare(values, best)
                compare(expected[(r_q, r_c) if len(taken) > 1 else (1, 1)].gather(1, places), best)
    if quantization == "int8":
        vectors = torch.randn(9, 5, 70, generator=generator) * 10 ** torch.arange(-4.0, 5.0)[:, None, None]
        vectors[0, 0] = 0
        expected_slabs = [encode(x, quantization) for x in vectors.split([1, 4], 1)]
        written = [tuple(torch.empty_like(x.contiguous()) for x in slab) for slab in expected_slabs]
        errors.append(0.0 if kernel.encode_int8(vectors, written) else math.inf)
        for slab, reference in zip(written, expected_slabs, strict=True):
            errors += [0.0 if torch.equal(a, b) else math.inf for a, b in zip(slab, reference, strict=True)]
    return max(errors)


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
    """Return the library, from the cache or built now."""
    if os.name == "nt":
        raise NoCompiler("the compiled kernel is written for the compilers of Linux and macOS")
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [
            *filter(None, map(shutil.which, ("c++", "g++", "clang++"))),
        ][:1]
    )
    if not compiler:
        raise NoCompiler("no C++ compiler was found (set CXX, or install g++ or clang++)")
    tune = f"-mcpu={architecture}" if platform.machine() in ("arm64", "aarch64") else f"-march={architecture}"
    command = [*compiler, "-O3", tune, "-std=c++17", "-shared", "-fPIC", "-pthread"]
    try:
        sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, _HEADER)]
        made_from = "\0".join([*sources, _run([*compiler, "--version"]), _processor(), *command])
        name = f"kernels-{hashlib.sha256(made_from.encode()).hexdigest()[:24]}"
        cache = _open_cache()
        for library in cache.glob(f"{name}-*.so"):
            if _is_whole(library):
                return library
            library.unlink()  # cut short or damaged: loading it could kill the process
        _remove_leftovers(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=_BUILDING) as building:
            made = Path(building) / "kernels.so"
            _run([*command, str(_SOURCE), "-o", str(made)])
            made.chmod(0o700)
            library = cache / f"{name}-{_checksum(made)}.so"
            os.replace(made, library)  # in one step, so that no one loads a half-written library
    except OSError as error:
        raise KernelUnavailable(f"the compiled kernel could not be built: {error}") from error
    return library


def _run(command: list[str]) -> str:
    """Run a compiler and return what it prints. It is stopped with all its children if it takes too long."""
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            printed = process.communicate(timeout=_PATIENCE)[0].decode(errors="replace")
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise KernelUnavailable(f"{command[0]} took longer than {_PATIENCE} seconds") from None
            raise
    if process.returncode:
        raise KernelUnavailable(f"{command[0]} failed: {printed.strip()[-500:]}")
    return printed


def _open_cache() -> Path:
    """Return the folder of the user's cache, made if need be, in which only the user can write."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # as its specification asks for: "consider the path invalid and ignore it"
        try:
            cache = Path.home() / ".cache"
        except RuntimeError as error:
            raise KernelUnavailable(f"there is no place for the kernel (set XDG_CACHE_HOME): {error}") from error
    cache = cache / "metaembed"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(cache)
    return cache


def _check_owner(path: Path) -> None:
    """Raise unless a file or folder is the user's (or root's) own, and nobody else may write to it."""
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KernelUnavailable(
            f"{path} could have been changed by other users; make it your own (chown) and only yours to write "
            "(chmod go-w), or set XDG_CACHE_HOME to another folder"
        )


def _is_whole(library: Path) -> bool:
    """Return whether a library has the checksum in its name, and raise if others could have written it."""
    _check_owner(library)
    return library.stem.rpartition("-")[2] == _checksum(library)


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:32]


def _remove_leftovers(cache: Path) -> None:
    """Remove the folders of builds that were killed."""
    for folder in cache.glob(f"{_BUILDING}*"):
        if time.time() - folder.stat().st_mtime > 2 * _PATIENCE:
            shutil.rmtree(folder, ignore_errors=True)


def _processor() -> str:
    """Return a description of this processor's abilities."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))

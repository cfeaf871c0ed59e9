"""Files of vectors: one for every group of vectors, appended to, memory-mapped, and checked.

The first vector of every document is stored apart from the next three, these from the next four, and so on at the
edges of the usual budgets, so that a budget reads only what it needs. Each such group (a *part*) is one file with one
row per document. Adding documents appends rows, so there is one array per part however often documents were added.
Rows are never changed. The catalog (see `metadata.py`) stores how many rows are valid, and its transaction is the
commit: rows after the valid ones come from an interrupted `add`, and the next writer truncates them.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import mmap
import os
import re
import secrets
import socket
import stat
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from ..scoring_metaembed import check_finite
from .kernels import choose_kernel
from .quantization import bytes_per_vector, check_quantization, encode
from .search import Slab, Store

ROLES = ("first", "main", "exact")  # what a copy of the vectors is for; "main" always exists
LOCK, QUEUE, HOLDER = "index.lock", "index.lock.queue", "index.lock.holder"

_EDGES = (1, 4, 8, 16, 64)  # of DEFAULT_BUDGETS, whose module imports transformers: an index needs none
_HEADER = 4096  # bytes in front of the rows, so that they begin at a page
_WRITTEN_AT_ONCE = 1 << 22  # numbers
_ENCODED_AT_ONCE = 1 << 18  # numbers, few enough for a processor's cache, where encoding is 5 times as fast
_WORTH_COMPILING = 1 << 20  # numbers that are encoded by the compiled kernel, which has to be built once
_NAME = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"vectors-([0-9a-f]{16})\.[a-z]+\.[0-9]+\.(vectors|scales)")


class DamagedIndexError(ValueError):
    """A file of the index is missing or damaged."""


@dataclass(frozen=True)
class Part:
    """An array with one row per document: some consecutive vectors of one copy, or their scales."""

    role: str
    slab: int
    kind: str  # "vectors" or "scales"
    dtype: torch.dtype
    shape: tuple[int, ...]  # of a row

    @property
    def row_bytes(self) -> int:
        """Bytes of a document."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def file_name(self, segment: str) -> str:
        """Return the name of the part's file in a segment."""
        return f"vectors-{segment}.{self.role}.{self.slab}.{self.kind}"

    def header(self, segment: str) -> bytes:
        """Return the first bytes of the file. They differ between files, so `open` notices swapped ones."""
        described = {"metaembed": "vectors", "format": 2, "file": self.file_name(segment)}
        described |= {"dtype": str(self.dtype).removeprefix("torch."), "row": self.shape}
        return json.dumps(described).encode().ljust(_HEADER)

    def view(self, raw: np.ndarray, rows: int) -> Tensor:
        """Return bytes as a tensor `[rows, *shape]`, without a copy."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
            return torch.from_numpy(raw).view(self.dtype).view(rows, *self.shape)


@dataclass(frozen=True)
class Layout:
    """How a document is stored: for every role the quantization and the number of vectors, of `dim` dimensions."""

    kept: Mapping[str, tuple[str, int]]
    dim: int

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The arrays, in the order in which they are written."""
        parts = []
        for role, (quantization, vectors) in self.kept.items():
            for slab, n in enumerate(_slabs(vectors)):
                stored, scales = encode(torch.zeros(1, n, self.dim), quantization)
                parts.append(Part(role, slab, "vectors", stored.dtype, tuple(stored.shape[1:])))
                if scales is not None:
                    parts.append(Part(role, slab, "scales", scales.dtype, tuple(scales.shape[1:])))
        return tuple(parts)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that a document's vectors take, all copies together."""
        return sum(vectors * bytes_per_vector(q, self.dim) for q, vectors in self.kept.values())

    def blocks(self, stack: Tensor) -> Iterator[Tensor]:
        """Split documents `[n, r, dim]` into blocks, which are written one at a time."""
        yield from _split(stack, _WRITTEN_AT_ONCE)

    def encode(self, stack: Tensor) -> list[Tensor]:
        """Return documents `[n, r, dim]` float32 in their stored form: one tensor per part."""
        encoded = [torch.empty(len(stack), *part.shape, dtype=part.dtype) for part in self.parts]
        if self._encode_compiled(stack, encoded):
            return encoded
        start = 0
        for some in _split(stack, _ENCODED_AT_ONCE):
            for out, tensor in zip(encoded, self._encode(check_finite(some, "embeddings")), strict=True):
                out[start : start + len(some)] = tensor
            start += len(some)
        return encoded

    def _encode_compiled(self, stack: Tensor, encoded: Sequence[Tensor]) -> bool:
        """Fill the tensors by the compiled kernel, which gives the same bytes. Return whether it did."""
        if stack.numel() < _WORTH_COMPILING or {name for name, _ in self.kept.values()} != {"int8"}:
            return False
        kernel = choose_kernel(stack.device, (), 1, self.dim)
        if isinstance(kernel, str) or not hasattr(kernel, "encode_int8"):
            return False
        at = iter(encoded)
        return all(
            kernel.encode_int8(stack, [(next(at), next(at)) for _ in _slabs(vectors)])
            for _, vectors in self.kept.values()
        )  # not with NaN or infinity: the error is raised where torch encodes

    def _encode(self, stack: Tensor) -> Iterator[Tensor]:
        for quantization, vectors in self.kept.values():
            stored, scales = encode(stack[:, :vectors], quantization)
            both = [stored.split(_slabs(vectors), dim=1)]
            both += [] if scales is None else [scales.split(_slabs(vectors), dim=1)]
            for slab in zip(*both, strict=True):
                yield from slab

    def stores(self, tensors: Sequence[Tensor]) -> dict[str, Store]:
        """Return what `search` takes for every role, given one tensor per part."""
        of = {(part.role, part.slab, part.kind): tensor for part, tensor in zip(self.parts, tensors, strict=True)}
        return {
            role: Store(
                [Slab(of[role, i, "vectors"], of.get((role, i, "scales"))) for i in range(len(_slabs(vectors)))],
                quantization,
                self.dim,
                checked=True,
            )
            for role, (quantization, vectors) in self.kept.items()
        }

    def pack(self, tensors: Sequence[Tensor]) -> bytes:
        """Return the bytes of some documents, part after part."""
        return b"".join(_bytes(tensor).tobytes() for tensor in tensors)

    def unpack(self, packed: bytes, rows: int) -> list[Tensor]:
        """Undo `pack`."""
        raw, tensors, start = np.frombuffer(packed, np.uint8), [], 0
        for part in self.parts:
            stop = start + rows * part.row_bytes
            tensors.append(part.view(raw[start:stop].copy(), rows))
            start = stop
        return tensors


def check_kept(quantization: Any, vectors: int) -> dict[str, tuple[str, int]]:
    """Return `{role: (quantization, vectors)}` for `"int8"` or `{"main": "int8", "first": ...}`."""
    given = {"main": quantization} if isinstance(quantization, str) else quantization
    if not isinstance(given, Mapping) or "main" not in given or not set(given) <= set(ROLES):
        raise ValueError(
            'quantization must be a name such as "int8", or a dict with "main", and "first" or "exact", such as '
            f'{{"first": ("binary", 1), "main": "int8", "exact": "float32"}}, not {quantization!r}'
        )
    kept = {}
    for role in ROLES:
        if role not in given:
            continue
        name, n = (given[role], vectors) if isinstance(given[role], str) else _pair(given[role])
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= vectors or (role != "first" and n < vectors):
            raise ValueError(
                f"quantization keeps {n!r} vectors as {role!r}: only 'first' may keep fewer than {vectors}"
            )
        kept[role] = (check_quantization(name), n)
    return kept


def _pair(value: Any) -> tuple[str, int]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f'a quantization must be a name such as "int8" or (name, vectors), not {value!r}')
    return value[0], value[1]


def _split(stack: Tensor, numbers: int) -> Sequence[Tensor]:
    """Split documents `[n, r, dim]` into pieces of about so many numbers."""
    return stack.split(max(1, numbers // max(1, stack.shape[1] * stack.shape[2])))


def _slabs(vectors: int) -> list[int]:
    edges = [0, *(edge for edge in _EDGES if edge < vectors), vectors]
    return [stop - start for start, stop in itertools.pairwise(edges)]


class Buffers:
    """Growing arrays in memory, one per part. Rows are only appended, so tensors taken from them never change."""

    def __init__(self, layout: Layout):
        self._layout, self._capacity = layout, 0
        self._tensors = [torch.empty(0, *part.shape, dtype=part.dtype) for part in layout.parts]
        self.rows = 0

    def append(self, tensors: Sequence[Tensor], at: int) -> None:
        """Write documents after the first `at` ones."""
        rows = at + len(tensors[0])
        if rows > self._capacity:
            self._capacity = max(rows, self._capacity * 3 // 2)
            for i, old in enumerate(self._tensors):
                self._tensors[i] = torch.empty(self._capacity, *old.shape[1:], dtype=old.dtype)
                self._tensors[i][:at] = old[:at]
        for mine, new in zip(self._tensors, tensors, strict=True):
            mine[at:rows] = new
        self.rows = rows

    def take(self, rows: int) -> list[Tensor]:
        """Return the first rows, without a copy."""
        return [tensor[:rows] for tensor in self._tensors]


def new_segment() -> str:
    """Return a name that no other segment has."""
    return secrets.token_hex(8)


def append_rows(
    folder: Path, segment: str, layout: Layout, at: int, blocks: Iterable[Sequence[Tensor]]
) -> tuple[int, list[int]]:
    """Write documents after the first `at` ones of a segment, and flush them to disk.

    Args:
        folder: Of the index.
        segment: Its name; its files are created if `at` is 0.
        layout: What the files hold.
        at: How many rows are valid; the file is truncated after them.
        blocks: Tensors for every part, some documents at a time.

    Returns:
        How many rows were written, and the CRC-32 of the rows of every part.
    """
    with contextlib.ExitStack() as opened:
        files = []
        for part in layout.parts:
            if at:
                open_part(folder, segment, part, at).close()
            flags = os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            flags |= os.O_CREAT | os.O_TRUNC if at == 0 else 0
            file = opened.enter_context(
                open(os.open(folder / part.file_name(segment), flags, 0o666), "wb", buffering=0)
            )
            file.truncate(_HEADER + at * part.row_bytes)
            if at == 0:
                _write(file, part.header(segment))
            file.seek(_HEADER + at * part.row_bytes)
            files.append(file)
        try:
            with ThreadPoolExecutor(len(files)) as threads:
                rows, sums = _write_blocks(files, blocks, threads)
                list(threads.map(lambda file: os.fsync(file.fileno()), files))
        except BaseException:
            for part, file in zip(layout.parts, files, strict=True):
                with contextlib.suppress(OSError):
                    file.truncate(_HEADER + at * part.row_bytes)
            raise
    if at == 0:
        flush_folder(folder)
    return rows, sums


def _write_blocks(
    files: Sequence[Any], blocks: Iterable[Sequence[Tensor]], threads: ThreadPoolExecutor
) -> tuple[int, list[int]]:
    """Write a block while the next one is encoded; return how many rows there were, and the CRC-32 of every file."""
    sums, rows = [0] * len(files), 0

    def write(i: int, tensor: Tensor) -> None:
        raw = _bytes(tensor)
        _write(files[i], raw)
        sums[i] = zlib.crc32(raw, sums[i])

    writing: Iterator[None] = iter(())
    for block in blocks:
        list(writing)  # waits
        writing = threads.map(write, range(len(files)), block)
        rows += len(block[0])
    list(writing)
    return rows, sums


def map_rows(folder: Path, segment: str, layout: Layout, rows: int) -> list[Tensor]:
    """Check the headers and sizes of a segment's files and map their first rows into memory.

    Raises:
        FileNotFoundError: if a file is missing.
        DamagedIndexError: if a file has another header or is too short.
    """
    tensors = []
    for part in layout.parts:
        with open_part(folder, segment, part, rows) as file:
            mapped = mmap.mmap(file.fileno(), _HEADER + rows * part.row_bytes, access=mmap.ACCESS_READ)
            tensors.append(part.view(np.frombuffer(mapped, np.uint8, offset=_HEADER), rows))
    return tensors


def open_part(folder: Path, segment: str, part: Part, rows: int) -> Any:
    """Check the header and size of a part's file and return it open for reading, at its first row."""
    path = folder / part.file_name(segment)
    file = open_regular(path)
    try:
        header, size = file.read(_HEADER), os.fstat(file.fileno()).st_size
        if header != part.header(segment):
            raise DamagedIndexError(
                f"{path} is damaged: its header is not that of the {part.role} {part.kind} of this index"
            )
        if size < _HEADER + rows * part.row_bytes:
            raise DamagedIndexError(
                f"{path} is damaged: {rows} documents need {_HEADER + rows * part.row_bytes} bytes, but it has {size}"
            )
    except BaseException:
        file.close()
        raise
    return file


def check_rows(folder: Path, segment: str, layout: Layout, chunks: Sequence[tuple[int, int, list[int]]]) -> list[str]:
    """Read all rows and return what is wrong with them.

    Args:
        folder: Of the index.
        segment: Its name.
        layout: What the files hold.
        chunks: What was written at a time: the first row, how many, and for every part the CRC-32.
    """
    wrong, rows = [], sum(count for _, count, _ in chunks)
    with contextlib.ExitStack() as opened:  # all at once, since others may delete them meanwhile
        files = [opened.enter_context(open_part(folder, segment, part, rows)) for part in layout.parts]
        for i, (part, file) in enumerate(zip(layout.parts, files, strict=True)):
            for first, count, sums in chunks:
                total, sound = _read_chunk(part, file, count)
                if total != sums[i]:
                    wrong.append(f"{file.name}: documents {first} to {first + count - 1} do not match their checksum")
                elif not sound:
                    wrong.append(f"{file.name}: documents {first} to {first + count - 1} contain NaN or infinity")
    return wrong


def _read_chunk(part: Part, file: Any, count: int) -> tuple[int, bool]:
    """Return the CRC-32 of the next rows, and whether they are free of NaN and infinity."""
    total, sound = 0, True
    step = max(1, (1 << 24) // part.row_bytes)
    for at in range(0, count, step):
        rows = min(step, count - at)
        raw = bytearray(file.read(rows * part.row_bytes))
        total, sound = zlib.crc32(raw, total), sound and finite(part, np.frombuffer(raw, np.uint8), rows)
    return total, sound


def finite(part: Part, raw: np.ndarray, rows: int) -> bool:
    """Return whether the bytes of a part are free of NaN and infinity."""
    return not part.dtype.is_floating_point or bool(part.view(raw, rows).isfinite().all())


def segment_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of every segment in the folder, valid or not."""
    found: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        if match := _FILE.fullmatch(path.name):
            found.setdefault(match[1], []).append(path)
    return found


def is_segment(name: Any) -> bool:
    """Return whether this is a valid name of a segment, which cannot lead out of the folder."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def remove(paths: Iterable[Path]) -> None:
    """Delete files. A file that is still mapped on Windows is left for the next writer."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.unlink()


def check_regular(path: Path) -> None:
    """Raise if the path is a link, a FIFO or the like, which could lead out of the folder or block forever."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise DamagedIndexError(f"{path} is not a regular file")


def open_regular(path: Path) -> Any:
    """Open a regular file for reading, and nothing else."""
    check_regular(path)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, flags))


def flush_folder(folder: Path) -> None:
    """Flush the names of a folder's files to disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def writer_lock(folder: Path, timeout: float) -> Iterator[None]:
    """Hold the write lock of a folder.

    Raises:
        TimeoutError: if another writer holds it for longer than the timeout; the message says who.
        PermissionError: if the folder is not writable.
    """
    queue, lock = (_file_lock(folder / name, timeout) for name in (QUEUE, LOCK))
    try:
        with queue:  # a waiting writer holds the queue, so that a busy writer does not get the lock twice in a row
            lock.acquire()
    except filelock.Timeout:
        raise TimeoutError(
            f"{folder} is locked by {_holder(folder)}; this process waited for {timeout:g} seconds. "
            "Try again later, or open the index with a longer timeout"
        ) from None
    except OSError as error:
        raise _explained(error, folder) from error
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        check_regular(folder / HOLDER)
        with contextlib.suppress(OSError):  # a full disk must not keep anyone from deleting
            (folder / HOLDER).write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink()
        lock.release()


def _file_lock(path: Path, timeout: float) -> filelock.BaseFileLock:
    check_regular(path)
    return filelock.FileLock(path, timeout=timeout, thread_local=False, poll_interval=0.01)


def _holder(folder: Path) -> str:
    try:
        with open_regular(folder / HOLDER) as file:
            holder = json.loads(file.read(1 << 12))
        return f"process {int(holder['pid'])} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn errors of the operating system into errors about the index."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _explained(error, folder) from error


def _explained(error: OSError, folder: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(error.errno, f"the disk of {folder} is full; the operation was rolled back")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionError(error.errno, f"{folder} is not writable for this process; nothing was changed")
    return error


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _write(file: Any, raw: Any) -> None:
    """Write everything: a single call may write less, for instance when the disk is nearly full."""
    left = memoryview(raw)
    while left:
        left = left[file.write(left) :]

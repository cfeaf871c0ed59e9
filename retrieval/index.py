"""An index of documents to add, delete, filter and search, in memory or durably in a folder."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..scoring_metaembed import Budget, as_stack, check_finite
from .cascade import Stage
from .format_1 import MANIFEST, FormatOne, read_format_1
from .metadata import DATABASE, Catalog, to_json
from .pooling import check_pooling, pool
from .snapshot import Document, Manifest, Snapshot, check_ids
from .storage import (
    HOLDER,
    LOCK,
    QUEUE,
    Buffers,
    DamagedIndexError,
    append_rows,
    check_kept,
    explained,
    new_segment,
    remove,
    segment_files,
    writer_lock,
)

__all__ = ["DamagedIndexError", "Document", "MultiVectorIndex", "SearchHits", "Stage"]

_SMALL = 1 << 22  # small adds go to the catalog until they have so many bytes together; then they go to the files
_LONG_LOG = 1 << 22  # a writer checkpoints SQLite's write-ahead log when it has more bytes than this


@dataclass(frozen=True, eq=False)
class SearchHits:
    """What a search found.

    Attributes:
        ids: For every query the ids of its hits, best first.
        scores: `[Q, k]` float32; fewer than `k` columns if fewer documents match.
        metadata: For every query the metadata of its hits.
    """

    ids: list[list[str]]
    scores: Tensor
    metadata: list[list[dict[str, Any]]]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"SearchHits(queries={len(self.ids)}, k={self.scores.shape[1]})"


class MultiVectorIndex:
    """Documents of several vectors each, with ids and metadata, searched by late interaction at any budget.

    Create one with `create`, or open a folder with `open`.

    Several processes may use one folder: one writes at a time and the others wait. A reader sees the state of the
    folder when it opened it, or last called `refresh` or wrote, even if others write meanwhile. When `add`, `upsert`,
    `delete` or `compact` returns, the change is on disk; when it raises, nothing has changed. Threads may share an
    index.

    Attributes:
        folder: Folder of the index; `None` if it is in memory.
        timeout: Seconds that a writer waits for another one.

    Example:
        >>> index = MultiVectorIndex.create(None, vectors=2, dim=4, quantization="float32")
        >>> index.add(torch.eye(4).view(2, 2, 4), ids=["a", "b"], metadata=[{"lang": "en"}, {"lang": "fr"}])
        >>> index.search(torch.eye(4)[None, 2:3], k=1).ids
        [['b']]
        >>> index.search(torch.eye(4)[None, 2:3], k=1, where={"lang": "en"}).ids
        [['a']]
    """

    folder: Path | None
    timeout: float
    _mutex: threading.RLock
    _pid: int
    _writer: Catalog | None
    _snapshot: Snapshot
    _compacted: Buffers | None  # set by `compact`: the new vectors of an index in memory

    def __init__(self) -> None:
        raise TypeError("use MultiVectorIndex.create to create an index, or MultiVectorIndex.open to open one")

    @classmethod
    def _new(cls, folder: Path | None, timeout: float) -> MultiVectorIndex:
        self = object.__new__(cls)
        self.folder, self.timeout = folder, timeout
        self._mutex, self._pid = threading.RLock(), os.getpid()
        self._writer = self._compacted = None
        return self

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str] | None,
        vectors: int = 64,
        dim: int = 128,
        quantization: str | Mapping[str, str | tuple[str, int]] = "int8",
        *,
        pca: Tensor | None = None,
        pooling: str | None = None,
        timeout: float = 60.0,
    ) -> MultiVectorIndex:
        """Create an empty index.

        Args:
            folder: A new or empty folder. `None` keeps the index in memory.
            vectors: How many vectors of a document are kept: its first ones.
            dim: Dimensions of documents and queries.
            quantization: `"float32"`, `"bfloat16"`, `"int8"`, `"int4"` or `"binary"`. Or several copies of the vectors
                under one set of ids, `{"first": ("binary", 1), "main": "int8", "exact": "float32"}`: the first
                stage of a cascade reads `"first"` (with that many vectors, if a number is given), and `"exact"`
                decides between the last few documents.
            pca: `[dim, kept]`, as `fit_pca` returns it, applied to documents and queries, to keep fewer dimensions.
            pooling: How documents of any number of vectors become documents of `vectors`, see `pool`: for embeddings
                of ColBERT, ColPali and their like. `None` takes documents that have at least `vectors` already.
            timeout: Seconds that a writer waits for another one.

        Raises:
            ValueError: if a number, a quantization or the PCA does not fit, or the folder is not empty.
            PermissionError: if the folder is not writable.
        """
        for name, value in (("vectors", vectors), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
                raise ValueError(f"{name} must be a whole number from 1 to {1 << 20}, not {value!r}")
        raw, kept_dim = None, dim
        if pca is not None:
            if not isinstance(pca, Tensor) or pca.ndim != 2 or len(pca) != dim or not 1 <= pca.shape[1] <= dim:
                raise ValueError(f"pca must be a tensor [{dim}, kept dimensions], not {getattr(pca, 'shape', pca)}")
            check_finite(pca, "pca")
            raw, kept_dim = pca.detach().float().cpu().contiguous().numpy().tobytes(), pca.shape[1]
        if pooling is not None:
            check_pooling(pooling)
        manifest = Manifest(vectors, dim, kept_dim, check_kept(quantization, vectors), pooling)
        self = cls._new(None if folder is None else Path(folder), timeout)
        if self.folder is None:
            self._writer = Catalog.create_in_memory(manifest.as_json(), raw)
            self._snapshot = Snapshot(self._writer, buffers=Buffers(manifest.layout))
        else:
            made = self.folder
            _begin(made, timeout, lambda: Catalog.create(made, manifest.as_json(), raw, lambda catalog: None))
            self._snapshot = self._read()
        return self

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, timeout: float = 60.0) -> MultiVectorIndex:
        """Open a folder. Vectors are memory-mapped: read from disk when they are scored, and only so far.

        Folders of format 1, which `EmbeddingCollection` wrote, are opened too, and migrated by the first write.

        Args:
            folder: Where the index is. It may be read-only.
            timeout: Seconds that a writer waits for another one.

        Raises:
            FileNotFoundError: if the folder contains no index.
            DamagedIndexError: (a `ValueError`) if a file is missing or damaged.
        """
        self = cls._new(Path(folder), timeout)
        self._snapshot = self._read()
        return self

    # Writing

    def add(
        self, embeddings: Any, ids: Sequence[str], metadata: Sequence[Mapping[str, Any] | None] | None = None
    ) -> None:
        """Add documents. When this returns, they are on disk.

        Args:
            embeddings: `[n, r, dim]` with `r >= vectors`, of which the first are kept, or a list of such `[r, dim]`;
                an index with pooling takes a list of `[r, dim]` of any lengths.
            ids: One new, unique id per document.
            metadata: One dict per document, with values that JSON can represent.

        Raises:
            TypeError: if embeddings are not of floating point, an id is not text, or metadata is not a dict.
            ValueError: if shapes do not match, a value is NaN or infinite, or an id is already in the index.
            TimeoutError: if another process holds the write lock for too long; the message says which.
            OSError: if the disk is full or the folder is not writable.
        """
        self._insert(embeddings, ids, metadata, replacing=False)

    def upsert(
        self, embeddings: Any, ids: Sequence[str], metadata: Sequence[Mapping[str, Any] | None] | None = None
    ) -> None:
        """Add documents, and replace those whose ids are already in the index. Takes the same arguments as `add`."""
        self._insert(embeddings, ids, metadata, replacing=True)

    def delete(self, ids: Sequence[str] | None = None, where: Mapping[str, Any] | None = None) -> int:
        """Delete documents, by id or by a filter, and return their number.

        Ids that are not in the index are ignored. `compact` frees the space of the vectors.

        Args:
            ids: Their ids.
            where: A filter, as in `search`; `{}` selects all documents.

        Raises:
            TypeError: unless one of the two is given.
        """
        if (ids is None) == (where is None):
            raise TypeError("pass either ids or where to delete")
        ids = None if ids is None else check_ids(ids)
        with self._writing() as (catalog, _):
            slots = self._snapshot.matching(where or {}) if ids is None else list(catalog.slots(ids).values())
            catalog.bury(slots)
        return len(slots)

    def compact(self) -> None:
        """Rewrite the index without the deleted documents to free their space. Other processes can keep reading."""
        with self._writing() as (catalog, manifest):
            old = self._snapshot
            if not old.dead_count and manifest.base == manifest.rows and len(catalog.chunks()) <= 1:
                return
            rows, sums = 0, [0] * len(old.layout.parts)
            new = replace(manifest, segment=None, base=0, rows=len(old), compactions=manifest.compactions + 1)
            buffers = Buffers(old.layout)
            if self.folder is None:
                for block in old.blocks():
                    buffers.append(block, buffers.rows)
            elif len(old):
                segment = new_segment()
                rows, sums = append_rows(self.folder, segment, old.layout, 0, old.blocks())
                new = replace(new, segment=segment, base=rows)
            catalog.renumber()
            catalog.forget_vectors()
            if rows:
                catalog.add_chunk(0, rows, sums)
            catalog.set_manifest(new.as_json())
            self._compacted = buffers

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the index to a new or empty folder, which `open` can read.

        Raises:
            ValueError: if the folder is not empty.
            OSError: if the disk is full or the folder is not writable.
        """
        with self._reading() as snapshot:
            _begin(Path(folder), self.timeout, lambda: _write_folder(Path(folder), snapshot))

    def _insert(self, embeddings: Any, ids: Any, metadata: Any, *, replacing: bool) -> None:
        stack = self._as_documents(embeddings)
        ids = check_ids(ids)
        if metadata is None:
            metadata = [None] * len(ids)
        if isinstance(metadata, Mapping | str) or not isinstance(metadata, Sequence):
            raise TypeError(f"metadata must be a list with one dict per document, not {type(metadata).__name__}")
        if not len(ids) == len(metadata) == len(stack):
            raise ValueError(f"got {len(stack)} documents, but {len(ids)} ids and {len(metadata)} metadata")
        if len(set(ids)) < len(ids):
            raise ValueError("ids must be unique")
        texts = [to_json(one) for one in metadata]
        if not ids:
            return
        with self._writing() as (catalog, manifest):
            there = catalog.slots(ids)
            if there and not replacing:
                raise ValueError(
                    f"{len(there)} ids are already in the index, such as {list(there)[:3]}; "
                    "use upsert to replace documents"
                )
            catalog.bury(list(there.values()))
            catalog.add(manifest.rows, zip(ids, texts, strict=True))
            catalog.set_manifest(self._keep(catalog, manifest, stack).as_json())

    def _keep(self, catalog: Catalog, manifest: Manifest, stack: Tensor) -> Manifest:
        """Write the vectors of new documents. They become part of the index when the transaction commits."""
        layout, new = manifest.layout, replace(manifest, rows=manifest.rows + len(stack))
        blocks = (layout.encode(self._snapshot.project(block.float())) for block in layout.blocks(stack))
        if self.folder is None:
            rows = manifest.rows
            for block in blocks:
                self._snapshot.buffers.append(block, rows)
                rows += len(block[0])
            return new
        if (new.rows - manifest.base) * layout.row_bytes < _SMALL:
            for block in blocks:
                catalog.add_tail(manifest.rows, len(block[0]), layout.pack(block))
                manifest = replace(manifest, rows=manifest.rows + len(block[0]))
            return new
        small = (layout.unpack(packed, count) for _, count, packed in catalog.tail(manifest.base))
        segment = manifest.segment or new_segment()
        both = (block for source in (small, blocks) for block in source)
        rows, sums = append_rows(self.folder, segment, layout, manifest.base, both)
        catalog.add_chunk(manifest.base, rows, sums)
        return replace(new, segment=segment, base=new.rows)

    def _as_documents(self, embeddings: Any) -> Tensor:
        """Return the vectors to keep: `[n, vectors, dim]`."""
        manifest = self._snapshot.manifest
        if isinstance(embeddings, list | tuple) and not len(embeddings):
            return torch.empty(0, manifest.vectors, manifest.dim)
        if manifest.pooling is not None:
            stack = pool(embeddings, manifest.vectors, manifest.pooling)
        else:
            lengths = {len(one) for one in embeddings} if isinstance(embeddings, list | tuple) else set()
            if len(lengths) > 1:
                raise ValueError(
                    f"documents have between {min(lengths)} and {max(lengths)} vectors; create the index with "
                    "pooling='nested' to pool them to the same number"
                )
            stack = as_stack(embeddings, "embeddings")
        if stack.shape[1] < manifest.vectors or stack.shape[2] != manifest.dim:
            raise ValueError(
                f"embeddings must be [n, {manifest.vectors} or more, {manifest.dim}] for this index, "
                f"not {list(stack.shape)}"
            )
        return stack[:, : manifest.vectors].detach().cpu()  # encoding looks for NaN

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[Catalog, Manifest]]:
        """Take the write lock, load the latest state, and commit everything the block does or nothing."""
        with self._mutex:
            self._compacted = None
            with self._writing_memory() if self.folder is None else self._writing_folder(self.folder) as state:
                yield state

    @contextlib.contextmanager
    def _writing_memory(self) -> Iterator[tuple[Catalog, Manifest]]:
        assert self._writer is not None
        with self._writer.transaction() as catalog:
            yield catalog, self._snapshot.manifest
        buffers = self._snapshot.buffers if self._compacted is None else self._compacted
        self._snapshot = Snapshot(self._writer, None, self._snapshot, buffers=buffers)

    @contextlib.contextmanager
    def _writing_folder(self, folder: Path) -> Iterator[tuple[Catalog, Manifest]]:
        with writer_lock(folder, self.timeout), explained(folder):
            self._after_fork()
            if not (folder / DATABASE).exists():
                self._migrate()
            if self._writer is None:
                self._writer = Catalog(folder)
            try:
                with self._writer.transaction() as catalog:
                    manifest = Manifest.read(catalog.manifest(), folder)
                    if manifest != self._snapshot.manifest:  # another process has written
                        self.refresh()
                    self._clean()
                    manifest = replace(manifest, writes=manifest.writes + 1)
                    catalog.set_manifest(manifest.as_json())
                    yield catalog, manifest
                if self._compacted is not None:
                    self._writer.vacuum()
                self.refresh()
            finally:
                self._clean()
            if self._compacted is not None or self._writer.log_size() > _LONG_LOG:
                self._shorten_log(self._writer)

    def _shorten_log(self, writer: Catalog) -> None:
        """Empty SQLite's write-ahead log, which works once no reader needs it: not even our own, hence the refresh."""
        writer.checkpoint()
        self.refresh()
        writer.checkpoint("TRUNCATE")

    def _clean(self) -> None:
        """Delete the files of interrupted writes and of earlier compactions. Call it only under the lock."""
        assert self.folder is not None
        segment = self._snapshot.manifest.segment
        for name, paths in segment_files(self.folder).items():
            if name != segment:
                remove(paths)
        remove(self.folder.glob(f"{DATABASE}.*.new*"))
        if (self.folder / DATABASE).exists() and (self.folder / MANIFEST).exists():
            with contextlib.suppress(DamagedIndexError):
                files = read_format_1(self.folder).files
                remove([*files[1:], files[0]])

    def _migrate(self) -> None:
        """Convert the folder from format 1 to format 2. The database is written last and completes the conversion."""
        assert self.folder is not None
        if not (self.folder / MANIFEST).exists():
            raise FileNotFoundError(f"{self.folder} no longer contains an index")
        self._snapshot = self._read()
        _write_folder(self.folder, self._snapshot)

    # Reading

    def search(
        self,
        queries: Any,
        k: int = 10,
        budget: Budget | None = None,
        stages: Any = "auto",
        where: Mapping[str, Any] | None = None,
        include_ids: Sequence[str] | None = None,
        exclude_ids: Sequence[str] | None = None,
        *,
        backend: str = "auto",
    ) -> SearchHits:
        """Find the best documents of every query.

        Args:
            queries: `[Q, r, dim]`, or one query `[r, dim]`, or a list of equal `[r, dim]`.
            k: How many documents to return for a query; fewer if fewer match.
            budget: `(query vectors, document vectors)` of the final scores. All of them by default.
            stages: `"auto"` narrows large indexes down with small budgets first; `None` scores every document.
                Or the stages before the final scores: a list of `Stage`, of `(budget, keep)` or of
                `(budget, quantization, keep)`.
            where: Only documents whose metadata this filter selects: `{"lang": "en", "page": {"$lt": 10}}`, with
                `$eq`, `$ne`, `$lt`, `$lte`, `$gt`, `$gte`, `$in`, `$nin`, `$exists`, and `$and` and `$or` of filters.
                A dot leads into nested metadata, `"author.name"`; see `parse_where` for the rules.
            include_ids: Only these documents. Ids that are not in the index are ignored.
            exclude_ids: None of these.
            backend: As in `maxsim`.

        Raises:
            TypeError: if an argument is not of its type.
            ValueError: if shapes, the budget, a stage or the filter does not fit.
        """
        with self._reading() as snapshot, torch.no_grad():
            scores, slots = snapshot.search(queries, k, budget, stages, where, include_ids, exclude_ids, backend)
            rows = slots.tolist()
            found = snapshot.documents(list({slot for row in rows for slot in row}))
        return SearchHits([[found[s][0] for s in r] for r in rows], scores, [[found[s][1] for s in r] for r in rows])

    def copies(self) -> tuple[dict[str, Any], Tensor | None]:
        """The copies of the vectors as `search`, `cascade` and `tune_cascade` take documents, for every role.

        Positions in them are not ids: the second value says for every position whether a document is there that was
        not deleted, and is `None` if none was.
        """
        with self._reading() as snapshot:
            return snapshot.copies(), snapshot.allowed(None, None, None)

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Return the documents with these ids, in their order.

        Raises:
            ValueError: if an id is not in the index.
        """
        ids = check_ids(ids)
        with self._reading() as snapshot:
            slots = snapshot.slots(ids)
            missing = [i for i in ids if i not in slots]
            if missing:
                raise ValueError(f"{len(missing)} ids are not in the index, such as {missing[:3]}")
            return snapshot.get([slots[i] for i in ids])

    def __contains__(self, id: object) -> bool:
        with self._reading() as snapshot:
            return isinstance(id, str) and bool(snapshot.slots([id]))

    def __len__(self) -> int:
        with self._reading() as snapshot:
            return len(snapshot)

    def __iter__(self) -> Iterator[Document]:
        """Yield all documents in insertion order, as of the start (in memory: without those deleted meanwhile)."""
        with self._reading() as snapshot:
            end = snapshot.manifest.rows
        at = 0
        while True:
            with self._reading() if self.folder is None else contextlib.nullcontext(snapshot) as seen:
                slots = [slot for slot in seen.after(at, 256) if slot < end]
                documents = seen.get(slots) if slots else []
            yield from documents
            if not slots:
                return
            at = slots[-1] + 1

    @property
    def ids(self) -> list[str]:
        """The ids of all documents, in insertion order."""
        with self._reading() as snapshot:
            return snapshot.ids()

    @property
    def vectors(self) -> int:
        """How many vectors of a document are kept."""
        return self._snapshot.manifest.vectors

    @property
    def dim(self) -> int:
        """Dimensions of documents and queries."""
        return self._snapshot.manifest.dim

    @property
    def quantization(self) -> dict[str, tuple[str, int]]:
        """The quantization and the number of vectors of each copy: `"first"`, `"main"` and `"exact"`."""
        return dict(self._snapshot.manifest.kept)

    @property
    def pca(self) -> Tensor | None:
        """`[dim, kept]`, by which documents and queries are multiplied, or `None`."""
        return self._snapshot.pca

    @property
    def pooling(self) -> str | None:
        """How documents of any number of vectors are pooled, or `None`."""
        return self._snapshot.manifest.pooling

    def embeddings(self) -> Tensor:
        """Return the vectors of all documents, in insertion order: `[n, vectors, kept]`, see `Document`."""
        with self._reading() as snapshot:
            slots = torch.arange(snapshot.manifest.rows)
            return snapshot.embeddings(slots if snapshot.dead is None else slots[~snapshot.dead])

    @property
    def bytes_per_document(self) -> int:
        """Bytes that the vectors of a document take, all copies together."""
        return self._snapshot.layout.row_bytes

    def __repr__(self) -> str:
        manifest = self._snapshot.manifest
        kept = ", ".join(f"{role}: {n} of {name}" for role, (name, n) in manifest.kept.items())
        where = "in memory" if self.folder is None else f"in {self.folder}"
        return f"MultiVectorIndex({len(self)} documents, {manifest.dim} dimensions, vectors {kept}, {where})"

    def refresh(self) -> None:
        """Load the latest state of the folder, with what other processes have written."""
        if self.folder is not None:
            with self._mutex:
                self._after_fork()
                self._snapshot = self._read()

    def verify(self) -> None:
        """Read the whole index in its latest state and check every checksum.

        Raises:
            DamagedIndexError: (a `ValueError`) if something is damaged; the message says what.
        """
        wrong = None
        while wrong is None:
            with self._reading() as seen:
                snapshot = seen if self.folder is None else self._read()
                with contextlib.suppress(FileNotFoundError):  # another process compacted the index into other files
                    wrong = snapshot.verify()
        if wrong:
            raise DamagedIndexError(f"the index in {self.folder} is damaged: " + "; ".join(wrong[:10]))

    def close(self) -> None:
        """Close the files. An index without references closes them too."""
        with self._mutex:
            for catalog in (self._writer, self._snapshot.catalog):
                if catalog is not None:
                    catalog.close()

    def __enter__(self) -> MultiVectorIndex:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        if self.folder is None:
            raise TypeError("an index in memory cannot be pickled; save it to a folder first")
        return _reopen, (self.folder, self.timeout)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Snapshot]:
        """Yield the current snapshot. An index in memory has only one state, so it stays locked meanwhile."""
        if self.folder is None:
            with self._mutex:
                yield self._snapshot
            return
        if self._pid != os.getpid():
            self.refresh()
        yield self._snapshot

    def _read(self) -> Snapshot:
        """Return the latest state of the folder."""
        folder, before = self.folder, getattr(self, "_snapshot", None)
        assert folder is not None
        for _ in range(100):
            if not (folder / DATABASE).exists():
                return _read_old(folder)
            catalog = Catalog(folder, read=True)
            try:
                return Snapshot(catalog, folder, before)
            except FileNotFoundError as error:  # it was compacted since the catalog was opened; or it is lost
                seen = catalog.manifest().get("segment")
                catalog.close()
                if Catalog(folder, read=True).manifest().get("segment") == seen:
                    raise DamagedIndexError(f"{error.filename} is missing") from None
        raise DamagedIndexError(f"{folder} could not be opened, because another process keeps compacting it")

    def _after_fork(self) -> None:
        """Drop the connection in a child process, which must neither use nor close the parent's."""
        if self._pid != os.getpid():
            self._writer, self._pid = None, os.getpid()


def _reopen(folder: Path, timeout: float) -> MultiVectorIndex:
    return MultiVectorIndex.open(folder, timeout=timeout)


def _begin(folder: Path, timeout: float, make: Callable[[], None]) -> None:
    """Call `make` to create an index in a new or empty folder, under the lock."""

    def check() -> None:
        known = {LOCK, QUEUE, HOLDER} | {path.name for paths in segment_files(folder).values() for path in paths}
        names = {path.name for path in folder.iterdir() if not path.name.startswith(f"{DATABASE}.")} - known
        if names & {DATABASE, MANIFEST}:
            raise ValueError(f"{folder} already contains an index; open it with MultiVectorIndex.open")
        if names:
            raise ValueError(f"{folder} is not empty: it contains {sorted(names)[0]!r}")

    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check()
    with writer_lock(folder, timeout), explained(folder):
        check()
        for paths in segment_files(folder).values():  # of a `save` that was killed
            remove(paths)
        make()


def _write_folder(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot to a folder. The database is written last and makes the index valid."""
    manifest = replace(snapshot.manifest, segment=None, base=0, rows=len(snapshot))
    manifest = replace(manifest, compactions=manifest.compactions + 1)
    segment, rows, sums = new_segment(), 0, [0]
    try:
        if manifest.rows:
            rows, sums = append_rows(folder, segment, snapshot.layout, 0, snapshot.blocks())
            manifest = replace(manifest, segment=segment, base=rows)

        def fill(catalog: Catalog) -> None:
            catalog.add(0, snapshot.catalog.all())
            if rows:
                catalog.add_chunk(0, rows, sums)

        Catalog.create(folder, manifest.as_json(), snapshot.catalog.pca(), fill)
    except BaseException:
        remove(segment_files(folder).get(segment, []))
        raise


def _read_old(folder: Path) -> Snapshot:
    """Return the state of a folder of format 1."""
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"{folder} contains no index: {DATABASE} is missing")
    old: FormatOne = read_format_1(folder)
    catalog = Catalog.create_in_memory(old.manifest.as_json(), old.pca)
    catalog.add(0, ((i, "{}") for i in old.ids))
    return Snapshot(catalog, folder, pieces=old.pieces)

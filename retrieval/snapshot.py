"""A snapshot: one consistent state of an index, which a reader keeps seeing while others write."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..scoring_metaembed import Budget, cut_queries
from .cascade import Stage, check_stages
from .filters import Column, conditions, evaluate, parse_where
from .kernels import Step, Store
from .metadata import Catalog
from .quantization import decode
from .search import check_k, prepare, run
from .storage import ROLES, Buffers, DamagedIndexError, Layout, check_kept, check_rows, is_segment, map_rows

_FEW_DOCUMENTS = 4096  # are scored in full, which is faster than a cascade
_MANY_DOCUMENTS = 100_000  # of which the first stage keeps 1,000; of four times as many, twice as many
_MOST_PLANS = 64  # prepared stages that a snapshot remembers
_BLOCK_BYTES = 1 << 26  # that are copied at a time


@dataclass(frozen=True)
class Manifest:
    """The settings of an index, and how many rows of its files are valid.

    Attributes:
        vectors: Number of vectors stored per document.
        dim: Dimensions of the embeddings and queries that are passed in.
        kept_dim: Dimensions that are stored, after the PCA.
        kept: Quantization and number of vectors of each role.
        pooling: Method that pools documents of any number of vectors, or `None`.
        segment: Name of the vector files, or `None` if there are none yet.
        base: Number of valid rows in the files.
        rows: Number of slots: `base`, plus the small adds that are still in the catalog.
        compactions: Number of compactions, each of which renumbers the slots.
        writes: Number of writes of any kind.
        format: Version of the format.
    """

    vectors: int
    dim: int
    kept_dim: int
    kept: Mapping[str, tuple[str, int]]
    pooling: str | None = None
    segment: str | None = None
    base: int = 0
    rows: int = 0
    compactions: int = 0
    writes: int = 0
    format: int = 2

    @classmethod
    def read(cls, given: Mapping[str, Any], where: Any) -> Manifest:
        """Validate a manifest completely, before it is used to open or allocate anything."""
        if given.get("format") != 2:
            raise DamagedIndexError(
                f"{where} is of format {given.get('format')!r}; this version reads formats 1 and 2"
            )
        try:
            self = cls(**given)
            for name, least, most in (
                ("vectors", 1, 1 << 20),
                ("dim", 1, 1 << 20),
                ("kept_dim", 1, self.dim),
                ("base", 0, self.rows),
                ("rows", 0, 1 << 48),
                ("compactions", 0, 1 << 62),
                ("writes", 0, 1 << 62),
            ):
                value = getattr(self, name)
                if type(value) is not int or not least <= value <= most:
                    raise ValueError(f"{name} is {value!r}")
            if (self.segment is None) != (self.base == 0) or not (self.segment is None or is_segment(self.segment)):
                raise ValueError(f"segment is {self.segment!r}")
            if not (self.pooling is None or isinstance(self.pooling, str)):
                raise ValueError(f"pooling is {self.pooling!r}")
            kept = check_kept({role: tuple(kept) for role, kept in self.kept.items()}, self.vectors)
        except (TypeError, ValueError, AttributeError) as error:
            raise DamagedIndexError(f"{where} is damaged: its manifest is invalid ({error})") from None
        return cls(**{**given, "kept": kept})

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as `read` takes it."""
        return asdict(self)

    @property
    def layout(self) -> Layout:
        """How documents are stored."""
        return _layout(tuple(self.kept.items()), self.kept_dim)


@cache
def _layout(kept: tuple[tuple[str, tuple[str, int]], ...], dim: int) -> Layout:
    return Layout(dict(kept), dim)


@dataclass(frozen=True)
class Document:
    """A document of an index.

    Attributes:
        id: The id.
        metadata: The metadata.
        embedding: `[vectors, dim]` float32, as stored: quantized, and after the PCA.
    """

    id: str
    metadata: dict[str, Any]
    embedding: Tensor


class Snapshot:
    """One consistent state of an index.

    Args:
        catalog: A connection that sees this state.
        folder: Folder of the index, or `None` if it is in memory.
        before: An earlier snapshot, whose unchanged parts are reused.
        buffers: The vectors of an index in memory.
        pieces: The vectors of a folder of format 1.
    """

    def __init__(
        self,
        catalog: Catalog,
        folder: Path | None = None,
        before: Snapshot | None = None,
        *,
        buffers: Buffers | None = None,
        pieces: list[list[Tensor]] | None = None,
    ):
        self.catalog, self.folder, self._lock = catalog, folder, threading.RLock()
        with catalog.errors():
            self.manifest = Manifest.read(catalog.manifest(), folder)
            self.layout = self.manifest.layout
            self.pca = _read_pca(catalog.pca(), self.manifest, folder)
            same = before is not None and before.manifest.compactions == self.manifest.compactions
            before = before if same else None
            self._base: list[Tensor] | None = None
            self.dead: Tensor | None = None
            self.dead_count: int
            self._dead_number: int
            self.buffers = Buffers(self.layout) if buffers is None else buffers
            if buffers is not None:
                self.pieces = [buffers.take(self.manifest.rows)] if self.manifest.rows else []
            else:
                self.pieces = self._find_pieces(before) if pieces is None else pieces
            self._find_dead(before)
        stores = [self.layout.stores(piece) for piece in self.pieces]
        self.stores: dict[str, list[Store]] = {role: [of[role] for of in stores] for role in self.manifest.kept}
        self._alive = None if self.dead is None else ~self.dead
        self._columns: dict[str, Column] = dict(before._columns) if before else {}  # of metadata, for filters
        self._plans: dict[Any, list[tuple[int, list[Store], int]]] = {}

    def __len__(self) -> int:
        return self.manifest.rows - self.dead_count

    def _find_pieces(self, before: Snapshot | None) -> list[list[Tensor]]:
        manifest, pieces = self.manifest, []
        if manifest.base:
            assert self.folder is not None and manifest.segment is not None
            if before is not None and before.manifest.base == manifest.base:
                self._base = before._base
            if self._base is None:
                self._base = map_rows(self.folder, manifest.segment, self.layout, manifest.base)
            pieces.append(self._base)
        behind = manifest.rows - manifest.base
        if behind:
            there = 0
            if before is not None and before.manifest.base == manifest.base:
                self.buffers, there = before.buffers, before.manifest.rows - manifest.base
            self._check_tail()
            for first, count, packed in self.catalog.tail(manifest.base + there):
                self.buffers.append(self.layout.unpack(packed, count), first - manifest.base)
            pieces.append(self.buffers.take(behind))
        return pieces

    def _check_tail(self) -> None:
        expected = self.manifest.base
        for first, count, size in self.catalog.tail_sizes():
            if first != expected or type(count) is not int or count < 1 or size != count * self.layout.row_bytes:
                break
            expected += count
        if expected != self.manifest.rows:
            raise DamagedIndexError(f"{self.folder} is damaged: the vectors of small adds are incomplete")

    def _find_dead(self, before: Snapshot | None) -> None:
        """Set `dead`, a bool per slot, or `None` if no document was deleted."""
        rows = self.manifest.rows
        slots, self._dead_number = self.catalog.dead(before._dead_number if before else 0)
        self.dead_count = len(slots) + (before.dead_count if before else 0)
        if len(slots) and not (slots.min() >= 0 and slots.max() < rows):
            raise DamagedIndexError(f"{self.folder} is damaged: a deleted document does not exist")
        if self.dead_count:
            self.dead = torch.zeros(rows, dtype=torch.bool)
            if before is not None and before.dead is not None:
                self.dead[: len(before.dead)] = before.dead
            self.dead[torch.from_numpy(slots)] = True

    # Reading

    def allowed(
        self, where: Mapping[str, Any] | None, include: Sequence[str] | None, exclude: Sequence[str] | None
    ) -> Tensor | None:
        """Return a bool per slot, whether a search may return it, or `None` if it may return all."""
        mask = self._alive
        if where is include is exclude is None:
            return mask
        with self._lock, self.catalog.errors():
            if where is not None:
                selected = self._selected(where)
                mask = selected if mask is None else mask & selected
            for ids, wanted in ((include, True), (exclude, False)):
                if ids is not None:
                    slots = torch.tensor(list(self.catalog.slots(check_ids(ids)).values()), dtype=torch.int64)
                    chosen = torch.full((self.manifest.rows,), not wanted).index_fill_(0, slots, wanted)
                    mask = chosen if mask is None else mask & chosen
        return mask

    def matching(self, where: Mapping[str, Any]) -> list[int]:
        """Return the slots of the documents that a filter selects, in order."""
        mask = self.allowed(where, None, None)
        assert mask is not None
        return mask.nonzero()[:, 0].tolist()

    def _selected(self, where: Mapping[str, Any]) -> Tensor:
        """Return a bool per slot, whether the filter selects it. Those of dead slots are arbitrary."""
        tree, rows = parse_where(where), self.manifest.rows
        for path in {condition.path for condition in conditions(tree)}:
            column = self._columns.setdefault(path, Column())
            known = len(column.kinds)
            if known < rows:
                self._columns[path] = column.extended(self.catalog.values(path, known), rows)
        return torch.from_numpy(evaluate(tree, self._columns, rows))

    def documents(self, slots: Sequence[int]) -> dict[int, tuple[str, dict[str, Any]]]:
        """Return the ids and metadata of those slots that are not dead."""
        with self._lock, self.catalog.errors():
            return self.catalog.documents(slots)

    def slots(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the slots of those ids that are in the index."""
        with self._lock, self.catalog.errors():
            return self.catalog.slots(ids)

    def after(self, slot: int, count: int) -> list[int]:
        """Return the next `count` slots from `slot` on that are not dead."""
        with self._lock, self.catalog.errors():
            return self.catalog.after(slot, count)

    def ids(self) -> list[str]:
        """Return all ids, in order of slots."""
        with self._lock, self.catalog.errors():
            return [i for i, _ in self.catalog.all()]

    def get(self, slots: Sequence[int]) -> list[Document]:
        """Return the documents of slots, none of which may be dead."""
        texts = self.documents(slots)
        embeddings = self.embeddings(slots)
        return [Document(*texts[slot], embedding) for slot, embedding in zip(slots, embeddings, strict=True)]

    def embeddings(self, slots: Sequence[int] | Tensor) -> Tensor:
        """Return the most exact stored vectors of documents: `[n, vectors, kept_dim]` float32."""
        store, dim = self.layout.stores(self.take(slots))[self.best_role], self.manifest.kept_dim
        return torch.cat([decode(s.stored, s.scales, store.quantization, dim) for s in store.slabs], dim=1)

    def verify(self) -> list[str]:
        """Read everything, check it, and return what is wrong."""
        manifest, parts = self.manifest, self.layout.parts
        with self._lock, self.catalog.errors():
            wrong = self.catalog.verify(manifest.rows)
            chunks = self.catalog.chunks()
            if manifest.segment is not None:
                for _ in self.catalog.tail(manifest.base):  # which looks at the sums
                    pass
        starts = np.cumsum([0, *(count for _, count, _ in chunks)]).tolist()
        sound = all(len(sums) == len(parts) and count > 0 for _, count, sums in chunks)
        if not sound or starts != [*(first for first, _, _ in chunks), manifest.base]:
            wrong.append("the recorded checksums do not cover the documents")
        elif manifest.segment is not None:
            assert self.folder is not None
            wrong += check_rows(self.folder, manifest.segment, self.layout, chunks)
        for piece in self.pieces:
            if piece is not self._base and not all(t.isfinite().all() for t in piece if t.dtype.is_floating_point):
                wrong.append("some vectors contain NaN or infinity")
        return wrong

    def take(self, slots: Sequence[int] | Tensor) -> list[Tensor]:
        """Return the vectors of slots, in any order: one tensor per part."""
        at, start = torch.as_tensor(slots, dtype=torch.int64), 0
        out = [torch.empty(len(at), *part.shape, dtype=part.dtype) for part in self.layout.parts]
        for piece in self.pieces:
            here = (at >= start) & (at < start + len(piece[0]))
            index = at[here] - start
            for mine, theirs in zip(out, piece, strict=True):
                mine[here] = theirs[index]
            start += len(piece[0])
        return out

    def blocks(self) -> Iterator[list[Tensor]]:
        """Yield the vectors of all documents that are not dead, in order, in blocks."""
        step = max(1, _BLOCK_BYTES // self.layout.row_bytes)
        start = 0
        for piece in self.pieces:
            for at in range(0, len(piece[0]), step):
                block = [tensor[at : at + step] for tensor in piece]
                if self.dead is not None:
                    alive = ~self.dead[start + at : start + at + len(block[0])]
                    block = [tensor[alive] for tensor in block]
                if len(block[0]):
                    yield block
            start += len(piece[0])

    @property
    def best_role(self) -> str:
        """The role of the most exact copy of the vectors."""
        return "exact" if "exact" in self.manifest.kept else "main"

    # Searching

    def search(
        self,
        queries: Any,
        k: int,
        budget: Budget | None,
        stages: Any,
        where: Mapping[str, Any] | None,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Scores and slots `[Q, k]`, best first, equal scores by lower slot."""
        check_k(k)
        allowed = self.allowed(where, include, exclude)
        q, _ = cut_queries(queries, None, (self.manifest.vectors, self.manifest.dim), "cpu")
        rows = self.manifest.rows
        narrows = rows > _FEW_DOCUMENTS and (allowed is None or np.count_nonzero(allowed.numpy()) > _FEW_DOCUMENTS)
        plan = self._plan(q, k, budget, stages, narrows)
        q = self.project(q)
        steps = [Step(q[:, :r_q], stores, keep) for r_q, stores, keep in plan]
        scores, slots, _, _ = run(steps, allowed, backend=backend)
        return scores, slots

    def _plan(
        self, queries: Tensor, k: int, budget: Budget | None, stages: Any, narrows: bool
    ) -> list[tuple[int, list[Store], int]]:
        """For every stage, the final one included: query vectors, stores and documents to keep."""
        key = (queries.shape[1], k, _hashable(budget), _hashable(stages), narrows)
        try:
            known = self._plans.get(key)
        except TypeError:  # not a stage, which `_stages` says
            known, key = None, None
        if known is None:
            checked = self._stages(queries.shape[1], k, budget, stages, narrows)
            last = Stage(budget or (queries.shape[1], self.manifest.vectors), k, self.best_role)
            known, sides = [], self.copies()
            for stage in (*checked, last):
                q, stores = prepare(queries[:1], sides[stage.quantization], stage.budget)
                known.append((q.shape[1], stores, stage.keep))
            if key is not None:
                if len(self._plans) >= _MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = known
        return known

    def _stages(self, r_q: int, k: int, budget: Budget | None, stages: Any, narrows: bool) -> list[Stage]:
        """Check stages, or choose them."""
        if isinstance(stages, str):
            if stages != "auto":
                raise ValueError(f"stages must be 'auto', None, or a list of Stage, not {stages!r}")
            stages = self._auto_stages(r_q, budget, k) if narrows else ()
        kept, checked = self.manifest.kept, list[Stage]()
        for stage in check_stages(stages or (), k):
            role = next((r for r in ROLES if r in kept and stage.quantization in (r, kept[r][0])), None)
            if role is None:
                raise ValueError(f"{stage}: the index keeps {dict(kept)}, not {stage.quantization!r}")
            checked.append(replace(stage, quantization=role))
        return checked

    def _auto_stages(self, r_q: int, budget: Budget | None, k: int) -> list[Stage]:
        r_q, r_c = budget or (r_q, self.manifest.vectors)
        kept, stages = self.manifest.kept, list[Stage]()
        # The more documents there are, the more of them have a first vector that is as good as those of the best ones.
        most = 1000 * max(1, round((self.manifest.rows / _MANY_DOCUMENTS) ** 0.5))
        chosen = [((1, 1), max(most, 100 * k)), ((2, 4), max(500, most // 4, 40 * k)), ((4, 8), max(150, 15 * k))]
        if "first" in kept and kept["first"][0] == "binary":  # rounded so much that three times as many are needed
            chosen.insert(0, (chosen[0][0], 3 * chosen[0][1]))
        for (q, c), keep in chosen:
            if self.manifest.pooling is not None:
                q = r_q  # the vectors of such queries are not ordered by importance
            if q <= r_q and c < r_c:
                small = not stages and "first" in kept and c <= kept["first"][1]
                stages.append(Stage((q, c), keep, "first" if small else "main"))
        if "exact" in kept:
            stages.append(Stage((r_q, r_c), max(50, 4 * k), "main"))
        return stages

    def copies(self) -> dict[str, Any]:
        """The copies of the documents, for every role, as `search` and `cascade` take documents."""
        return {
            role: SimpleNamespace(
                stores=self.stores[role],
                project=self.project,
                vectors=self.manifest.kept[role][1],
                input_dim=self.manifest.dim,
                device=torch.device("cpu"),
            )
            for role in self.manifest.kept
        }

    def project(self, x: Tensor) -> Tensor:
        """Do to queries what was done to the documents."""
        return x if self.pca is None else x @ self.pca


def _hashable(given: Any) -> Any:
    """Return lists as tuples, at any depth."""
    return tuple(map(_hashable, given)) if isinstance(given, list | tuple) else given


def check_ids(ids: Any) -> list[str]:
    """Return the ids as a list, after checking them.

    Raises:
        TypeError: if they are not a list of text.
        ValueError: if one is empty, or contains NUL or a lone surrogate.
    """
    if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Iterable):
        raise TypeError(f"ids must be a list of str, not {ids!r}")
    ids = list(ids)
    for i in ids:
        if not isinstance(i, str):
            raise TypeError(f"ids must be str, not {i!r}: a position is no id; index.ids has the id at each position")
        if not i or "\0" in i or (not i.isprintable() and not _encodable(i)):
            raise ValueError(f"an id must not be empty, nor contain the character NUL or a lone surrogate: {i!r}")
    return ids


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_pca(raw: bytes | None, manifest: Manifest, folder: Path | None) -> Tensor | None:
    expected = 4 * manifest.dim * manifest.kept_dim
    if raw is None and manifest.dim == manifest.kept_dim:
        return None
    if raw is None or len(raw) != expected:
        raise DamagedIndexError(
            f"{folder} is damaged: its PCA is not a matrix of {manifest.dim} x {manifest.kept_dim}"
        )
    pca = torch.from_numpy(np.frombuffer(raw, np.float32).copy()).view(manifest.dim, manifest.kept_dim)
    if not pca.isfinite().all():
        raise DamagedIndexError(f"{folder} is damaged: its PCA contains NaN or infinity")
    return pca

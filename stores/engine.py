"""What the stores of all engines share: prefixes, checks of what is added and asked for, and waiting for an engine."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from ..retrieval.cascade import Stage, check_stages
from ..retrieval.filters import parse_where
from ..retrieval.index import Document, SearchHits
from ..retrieval.metadata import to_json
from ..retrieval.search import check_k
from ..retrieval.snapshot import check_ids
from ..scoring_metaembed import Budget, as_stack, check_finite, cut_queries

_Result = TypeVar("_Result")
_LONGEST_WAIT = 30.0  # seconds between two attempts
FILTER_KINDS = ("text", "number", "boolean")


@dataclass(frozen=True)
class Step:
    """One step of a search, ready for an engine.

    Attributes:
        queries: `[Q, r_q, dim]` float32.
        prefix: How many vectors of a document are compared.
        keep: How many documents are kept.
    """

    queries: Tensor
    prefix: int
    keep: int


@dataclass(frozen=True)
class Selection:
    """Which documents a search, a count or a deletion is about: those that all of it selects."""

    where: Mapping[str, Any] | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None


@dataclass(frozen=True)
class Hit:
    """A document that an engine found."""

    id: str
    score: float
    metadata: dict[str, Any]


class EngineStore(ABC):
    """A store in an engine, which keeps some prefixes of every document as vectors of their own.

    The first prefix is one vector and has the engine's index. The others are lists of vectors that rescore what the
    ones before them found.

    Attributes:
        vectors: How many vectors of a document are kept.
        dim: Dimensions of documents and queries.
        prefixes: The numbers of document vectors that a budget can name, ascending; the last one is `vectors`.
    """

    vectors: int
    dim: int
    prefixes: tuple[int, ...]

    # Writing

    def add(
        self, embeddings: Any, ids: Sequence[str], metadata: Sequence[Mapping[str, Any] | None] | None = None
    ) -> None:
        """Add documents, as `MultiVectorIndex.add` does.

        Raises:
            TypeError: if embeddings are not of floating point, an id is not text, or metadata is not a dict.
            ValueError: if shapes do not fit, an id is there already, or a document is beyond a limit of the engine.
            ConnectionError: if the engine does not answer.
        """
        self._write(embeddings, ids, metadata, replacing=False)

    def upsert(
        self, embeddings: Any, ids: Sequence[str], metadata: Sequence[Mapping[str, Any] | None] | None = None
    ) -> None:
        """Add documents, and replace those whose ids are there already. To send it again does no harm."""
        self._write(embeddings, ids, metadata, replacing=True)

    def delete(self, ids: Sequence[str] | None = None, where: Mapping[str, Any] | None = None) -> int:
        """Delete documents, by id or by a filter (`{}` selects all), and return their number."""
        if (ids is None) == (where is None):
            raise TypeError("delete needs either ids or where")
        if where is not None:
            parse_where(where)
        return self._delete(Selection(where, None if ids is None else check_ids(ids)))

    def _write(self, embeddings: Any, ids: Any, metadata: Any, *, replacing: bool) -> None:
        stack = self._as_documents(embeddings)
        ids = check_ids(ids)
        metadata = [None] * len(ids) if metadata is None else metadata
        if isinstance(metadata, Mapping | str) or not isinstance(metadata, Sequence):
            raise TypeError(f"metadata must be a list with a dict for every document, not {type(metadata).__name__}")
        if not len(ids) == len(metadata) == len(stack):
            raise ValueError(f"there are {len(stack)} documents, but {len(ids)} ids and {len(metadata)} metadata")
        if len(set(ids)) < len(ids):
            raise ValueError("ids must be unique")
        for one in metadata:
            to_json(one)
        if not ids:
            return
        self._put(stack, ids, [dict(one or {}) for one in metadata], replacing=replacing)

    def _as_documents(self, embeddings: Any) -> Tensor:
        """Return the vectors to keep: `[n, vectors, dim]` float32."""
        if isinstance(embeddings, list | tuple) and not len(embeddings):
            return torch.empty(0, self.vectors, self.dim)
        stack = as_stack(embeddings, "embeddings")
        if stack.shape[1] < self.vectors or stack.shape[2] != self.dim:
            raise ValueError(
                f"embeddings must be [n, {self.vectors} or more, {self.dim}] for this store, not {list(stack.shape)}"
            )
        return check_finite(stack[:, : self.vectors].detach().float().cpu(), "embeddings")

    # Reading

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Return the documents with these ids, in their order.

        Raises:
            ValueError: if an id is not in the store.
        """
        ids = check_ids(ids)
        found = {document.id: document for document in self._get(list(dict.fromkeys(ids)))} if ids else {}
        missing = [i for i in ids if i not in found]
        if missing:
            raise ValueError(f"{len(missing)} ids are not in the store, such as {missing[:3]}")
        return [found[i] for i in ids]

    def search(
        self,
        queries: Any,
        k: int = 10,
        budget: Budget | None = None,
        stages: Any = "auto",
        where: Mapping[str, Any] | None = None,
        include_ids: Sequence[str] | None = None,
        exclude_ids: Sequence[str] | None = None,
    ) -> SearchHits:
        """Find the best documents of every query, in one request for all of them where the engine has such requests.

        Args:
            queries: `[Q, r, dim]`, or one query `[r, dim]`, or a list of equal `[r, dim]`.
            k: How many documents to return for a query; fewer if fewer match.
            budget: `(query vectors, document vectors)` of the final scores; the second must be one of `prefixes`.
            stages: `"auto"` begins with the engine's index of first vectors and rescores with ever larger prefixes;
                `None` scores every document. Or a list of `Stage` or of `(budget, keep)`.
            where: Only documents that this filter selects, with the rules of `MultiVectorIndex.search`.
            include_ids: Only these documents.
            exclude_ids: None of these.

        Raises:
            TypeError: if an argument is not of its type.
            ValueError: if shapes, the budget, a stage or the filter does not fit, or the engine has no such filter.
        """
        check_k(k)
        stack = cut_queries(queries, None, (self.vectors, self.dim), "cpu")[0]
        steps = [self._step(stack, stage) for stage in self._stages(stack.shape[1], budget, stages, k)]
        if where is not None:
            parse_where(where)  # which raises the same errors for all stores
        ids = [None if some is None else check_ids(some) for some in (include_ids, exclude_ids)]
        rows = self._find(steps, Selection(where, *ids)) if len(stack) else []
        scores = torch.full((len(rows), max(map(len, rows), default=0)), -torch.inf)
        for row, hits in zip(scores, rows, strict=True):
            row[: len(hits)] = torch.tensor([hit.score for hit in hits])
        return SearchHits([[hit.id for hit in hits] for hits in rows], scores, [[h.metadata for h in r] for r in rows])

    def _step(self, queries: Tensor, stage: Stage) -> Step:
        q, prefix = cut_queries(queries, stage.budget, (self.vectors, self.dim), "cpu")
        if prefix not in self.prefixes:
            raise ValueError(
                f"budget {stage.budget!r}: this store keeps prefixes of {', '.join(map(str, self.prefixes))} vectors; "
                f"use one of them, or create the store with prefixes={tuple(sorted({*self.prefixes, prefix}))}"
            )
        return Step(q, prefix, stage.keep)

    def _stages(self, r_q: int, budget: Budget | None, stages: Any, k: int) -> list[Stage]:
        """The stages of a search, of which the last one gives the final scores."""
        last = Stage((r_q, self.vectors) if budget is None else budget, k)
        if isinstance(stages, str):
            if stages != "auto":
                raise ValueError(f"stages must be 'auto', None, or a list of Stage, not {stages!r}")
            cut_queries(torch.zeros(1, r_q, self.dim), last.budget, (self.vectors, self.dim), "cpu")
            return [*self._auto_stages(last.budget, k), last]
        checked = check_stages(stages or (), k)
        for stage in checked:
            if stage.quantization != "main":
                raise ValueError(f"{stage}: an engine decides itself about quantization; leave it out of the stage")
        return [*checked, last]

    def _auto_stages(self, budget: Budget, k: int) -> Iterator[Stage]:
        """Every smaller prefix, with half as many query vectors: (1, 1), (4, 8), (8, 16), ..."""
        keeps = iter((max(1000, 10 * k), max(200, 4 * k)))
        keep = next(keeps)
        for prefix in self.prefixes:
            if prefix < budget[1]:
                yield Stage((min(budget[0], max(1, prefix // 2)), prefix), keep)
                keep = next(keeps, keep)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and bool(id) and self._count(Selection(include=[id])) > 0

    def __len__(self) -> int:
        return self._count(Selection())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What an engine does

    @abstractmethod
    def _put(self, stack: Tensor, ids: list[str], metadata: list[dict[str, Any]], *, replacing: bool) -> None:
        """Write checked documents."""

    @abstractmethod
    def _delete(self, selection: Selection) -> int:
        """Delete what is selected and return how much that was."""

    @abstractmethod
    def _get(self, ids: list[str]) -> list[Document]:
        """Return those of the documents that are there, in any order."""

    @abstractmethod
    def _find(self, steps: list[Step], selection: Selection) -> list[list[Hit]]:
        """Return the hits of every query, best first. The selection holds from the first step on."""

    @abstractmethod
    def _count(self, selection: Selection) -> int:
        """Return how many documents are selected."""

    @abstractmethod
    def close(self) -> None:
        """Close files and connections."""


def check_prefixes(vectors: Any, dim: Any, prefixes: Sequence[int] | None) -> tuple[int, ...]:
    """Return the prefixes of documents to keep: by default the first vector, eight, and all.

    Raises:
        ValueError: if a number does not fit.
    """
    for name, value in (("vectors", vectors), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
            raise ValueError(f"{name} must be a whole number from 1 to {1 << 20}, not {value!r}")
    given = (1, 8) if prefixes is None else tuple(prefixes)
    if prefixes is not None and not all(type(p) is int and 1 <= p <= vectors for p in given):
        raise ValueError(f"prefixes must be whole numbers from 1 to {vectors}, such as (1, 8), not {prefixes!r}")
    return tuple(sorted({1, vectors, *(p for p in given if p < vectors)}))


def check_filters(filters: Mapping[str, str] | None) -> dict[str, str]:
    """Return for every key of the metadata with an index of its own the kind of its values.

    Raises:
        TypeError: if it is not a mapping.
        ValueError: if a key or a kind does not fit.
    """
    if filters is None:
        return {}
    if not isinstance(filters, Mapping):
        raise TypeError(f'filters must be a dict such as {{"lang": "text", "page": "number"}}, not {filters!r}')
    parse_where(dict.fromkeys(filters))
    for key, kind in filters.items():
        if kind not in FILTER_KINDS:
            raise ValueError(f"filters: {key!r} must be {', '.join(map(repr, FILTER_KINDS))}, not {kind!r}")
    return dict(filters)


def retry(call: Callable[[], _Result], passes: Callable[[Exception], float | None], attempts: int) -> _Result:
    """Call until it succeeds, and wait ever longer in between.

    Args:
        call: What to do. To do it twice must do no harm.
        passes: For an error the least number of seconds to wait, or `None` if it will not pass.
        attempts: How often to try.

    Raises:
        ConnectionError: if the last attempt failed too.
    """
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            least = passes(error)
            if least is None:
                raise
            if attempt + 1 == attempts:
                raise ConnectionError(f"the engine did not answer in {attempts} attempts: {error}") from error
            time.sleep(min(_LONGEST_WAIT, max(least, 0.2 * 2**attempt * random.uniform(0.75, 1.25))))
    raise ValueError(f"attempts must be at least 1, not {attempts}")

"""Qdrant in this process (Edge), or a server or a cluster of it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import UUID, uuid5

import torch
from torch import Tensor

from ..retrieval.index import Document
from .engine import EngineStore, Hit, Selection, Step, check_filters, check_prefixes, retry
from .qdrant_filters import MARKS, METADATA, Conditions, marks, payload_key, translate

_Result = TypeVar("_Result")
_IDS = UUID("3f0b7b0c-3d0a-5b5e-9a57-6c0d8f3f2b11")  # names every id of ours as a UUID, which Qdrant asks for
_MOST_NUMBERS = 1 << 20  # of a list of vectors
_MOST_DIM = 1 << 16
_BATCH_BYTES = 16 << 20  # of a request; a server takes 32 MB unless told otherwise
_MOST_BYTES = 30 << 20
_NUMBER_BYTES = 12  # of a number as JSON
QUANTIZATIONS = ("float32", "float16", "int8", "binary")


def point_id(id: str) -> str:
    """Return the UUID under which Qdrant keeps a document: always the same for an id."""
    return str(uuid5(_IDS, id))


def vector_name(prefix: int) -> str:
    """Return the name of the vectors that hold a prefix."""
    return f"v{prefix}"


class _Qdrant(EngineStore):
    """What a server and Edge have in common."""

    conditions: Conditions

    def _put(self, stack: Tensor, ids: list[str], metadata: list[dict[str, Any]], *, replacing: bool) -> None:
        if not replacing:
            there = [i for some in _parts(ids, 1000) for i in self._known(some)]
            if there:
                raise ValueError(
                    f"{len(there)} ids are in the store already, such as {there[:3]}; replace with upsert"
                )
        payloads = [_payload(i, one) for i, one in zip(ids, metadata, strict=True)]
        numbers = sum(self.prefixes) * self.dim * _NUMBER_BYTES
        sizes = [numbers + len(json.dumps(payload)) for payload in payloads]
        self._check_sizes(ids, sizes)
        start, total = 0, 0
        for at, size in enumerate([*sizes, _MOST_BYTES]):
            if total + size > _BATCH_BYTES and at > start:
                part = slice(start, at)
                self._send_points(
                    [
                        (point_id(i), self._as_vectors(one), payload)
                        for i, one, payload in zip(ids[part], stack[part], payloads[part], strict=True)
                    ]
                )
                start, total = at, 0
            total += size

    def _check_sizes(self, ids: list[str], sizes: list[int]) -> None:
        """Refuse documents that the engine would refuse."""

    def _as_vectors(self, document: Tensor) -> dict[str, Any]:
        first = {vector_name(1): document[0].tolist()}
        return first | {vector_name(p): document[:p].tolist() for p in self.prefixes[1:]}

    def _get(self, ids: list[str]) -> list[Document]:
        name, documents = vector_name(self.vectors), []
        for some in _parts(ids, max(1, _BATCH_BYTES // (self.vectors * self.dim * _NUMBER_BYTES))):
            for record in self._retrieve([point_id(i) for i in some], [name]):
                embedding = torch.tensor(record.vector[name]).view(self.vectors, self.dim)
                documents.append(Document(record.payload["id"], record.payload[METADATA], embedding))
        return documents

    def _known(self, ids: Sequence[str]) -> list[str]:
        return [record.payload["id"] for record in self._retrieve([point_id(i) for i in ids], False)]

    def _filter(self, selection: Selection) -> Any:
        """The filter of a selection, or `None` for all documents."""
        c, must, must_not = self.conditions, [], []
        if selection.where:
            must.append(translate(selection.where, c))
        if selection.include is not None:
            must.append(c.has_id([point_id(i) for i in selection.include]))
        if selection.exclude:
            must_not.append(c.has_id([point_id(i) for i in selection.exclude]))
        return c.filter(must, [], must_not) if must or must_not else None

    def _delete(self, selection: Selection) -> int:
        found, chosen = 0, selection.include
        parts = [selection] if chosen is None else [Selection(include=some) for some in _parts(chosen, 1000)]
        for part in parts:
            count = self._count(part)
            if count:
                self._delete_points(self._filter(part) or self.conditions.filter([], [], []))
            found += count
        return found

    @staticmethod
    def _as_query(step: Step, at: int) -> Any:
        """The query vectors of a step. One document vector is compared with their sum, which gives the same score."""
        rows = step.queries[at]
        return rows.sum(dim=0).tolist() if step.prefix == 1 else rows.tolist()

    @abstractmethod
    def _send_points(self, points: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
        """Write points: `(id, vectors, payload)`."""

    @abstractmethod
    def _retrieve(self, points: list[str], vectors: Any) -> list[Any]:
        """Return the records of points that are there."""

    @abstractmethod
    def _delete_points(self, selected: Any) -> None:
        """Delete what a filter selects."""


class QdrantStore(_Qdrant):
    """A collection of a Qdrant server or cluster.

    The vectors are named after their prefixes, `v1`, `v8`, ..., and only `v1` has an HNSW graph. A search of all its
    stages is one request. Documents of more than 16 MB together are sent in several requests.

    Args:
        client: A `qdrant_client.QdrantClient`.
        collection: The name of the collection.
        attempts: How often a request is tried, with ever longer waits, if the server does not answer or is busy.

    Raises:
        FileNotFoundError: if there is no such collection.
        ValueError: if it is not one that `create` made.
    """

    def __init__(self, client: Any, collection: str, attempts: int = 6):
        from qdrant_client import models

        self.client, self.collection, self.attempts, self._models = client, collection, attempts, models
        self.conditions = _ClientConditions(models)
        if not self._send(lambda: client.collection_exists(collection)):
            raise FileNotFoundError(f"the Qdrant server has no collection {collection!r}; make it with create_store")
        vectors = self._send(lambda: client.get_collection(collection)).config.params.vectors
        names = vectors if isinstance(vectors, Mapping) else {}
        prefixes = sorted(int(name[1:]) for name in names if name[:1] == "v" and name[1:].isdecimal())
        if not prefixes or prefixes[0] != 1 or len(prefixes) != len(names):
            raise ValueError(
                f"the collection {collection!r} holds the vectors {sorted(names)}, not v1 and others as create_store "
                "makes them"
            )
        self.prefixes, self.vectors, self.dim = tuple(prefixes), prefixes[-1], names["v1"].size

    @classmethod
    def create(
        cls,
        address: str,
        vectors: int,
        dim: int,
        *,
        client: Any = None,
        prefixes: Sequence[int] | None = None,
        quantization: str = "float32",
        disk: str = "float32",
        filters: Mapping[str, str] | None = None,
        shards: int | None = None,
        replicas: int | None = None,
        write_consistency: int | None = None,
        on_disk: bool = True,
        m: int = 16,
        ef_construct: int = 100,
        attempts: int = 6,
        **options: Any,
    ) -> QdrantStore:
        """Create a collection.

        Args:
            address: `http(s)://HOST:PORT/COLLECTION`.
            vectors: How many vectors of a document are kept.
            dim: Dimensions of documents and queries.
            client: A client to use instead of a new one; then the address may be the name of the collection alone.
            prefixes: The numbers of document vectors that budgets can name, 1, 8 and all by default.
            quantization: `"float32"`; `"float16"`, half the disk; or `"int8"` or `"binary"`, a copy of the first
                vectors in memory, with which the graph is searched. Scores of later stages are not quantized.
            disk: `"float32"` or `"float16"`: how vectors lie on disk beside a copy of `"int8"` or `"binary"`.
            filters: Keys of the metadata to index, with the kind of their values, `{"lang": "text", "page":
                "number"}`. Filters work without, but slowly.
            shards: Into how many parts documents are split; a node of the cluster can hold several.
            replicas: How many copies of every shard the cluster keeps.
            write_consistency: How many of the copies must confirm a write.
            on_disk: Whether vectors are read from disk (and cached) instead of being held in memory.
            m: Links of a document in the HNSW graph of first vectors.
            ef_construct: Candidates for a link while the graph is built.
            attempts: As for `QdrantStore`.
            **options: For `qdrant_client.QdrantClient`, such as `api_key`, `prefer_grpc` or `timeout`.

        Raises:
            ValueError: if the collection exists already, or a number is beyond a limit of Qdrant.
            ConnectionError: if the server does not answer.
            ImportError: if qdrant-client is not installed.
        """
        prefixes = _check_limits(vectors, dim, prefixes, quantization, disk)
        filters = check_filters(filters)
        client, collection = _connect(address, client, options)
        from qdrant_client import models

        if _attempt(lambda: client.collection_exists(collection), attempts):
            raise ValueError(f"the Qdrant server has a collection {collection!r} already; open it with open_store")
        quantized = {
            "int8": models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
            ),
            "binary": models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True)),
        }.get(quantization)

        def params(prefix: int) -> Any:
            first = prefix == 1
            return models.VectorParams(
                size=dim,
                distance=models.Distance.DOT,
                on_disk=on_disk,
                datatype=models.Datatype.FLOAT16 if "float16" in (quantization, disk) else None,
                quantization_config=quantized if first else None,
                hnsw_config=models.HnswConfigDiff(m=m if first else 0, ef_construct=ef_construct if first else None),
                multivector_config=None
                if first
                else models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            )

        _attempt(
            lambda: client.create_collection(
                collection,
                vectors_config={vector_name(prefix): params(prefix) for prefix in prefixes},
                shard_number=shards,
                replication_factor=replicas,
                write_consistency_factor=write_consistency,
                on_disk_payload=True,
            ),
            attempts,
        )
        kinds = {payload_key(key): kind for key, kind in filters.items()} | {MARKS: "text"}
        schemas = {"text": models.PayloadSchemaType.KEYWORD, "number": models.PayloadSchemaType.FLOAT}
        for key, kind in kinds.items():
            if kind in schemas and not _is_local(client):  # booleans are found by their marks
                _attempt(lambda k=key, s=schemas[kind]: client.create_payload_index(collection, k, s), attempts)
        return cls(client, collection, attempts)

    @classmethod
    def open(cls, address: str, *, client: Any = None, attempts: int = 6, **options: Any) -> QdrantStore:
        """Open a collection by its address, with arguments as for `create`."""
        client, collection = _connect(address, client, options)
        return cls(client, collection, attempts)

    def _send(self, call: Callable[[], _Result]) -> _Result:
        return _attempt(call, self.attempts)

    def _check_sizes(self, ids: list[str], sizes: list[int]) -> None:
        for i, size in zip(ids, sizes, strict=True):
            if size > _MOST_BYTES:
                raise ValueError(
                    f"document {i!r} takes about {size >> 20} MB, but a Qdrant server takes requests of 32 MB: keep "
                    "less metadata, fewer vectors, prefixes or dimensions"
                )

    def _send_points(self, points: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
        made = [self._models.PointStruct(id=i, vector=vectors, payload=payload) for i, vectors, payload in points]
        self._send(lambda: self.client.upsert(self.collection, made, wait=True))

    def _retrieve(self, points: list[str], vectors: Any) -> list[Any]:
        return self._send(
            lambda: self.client.retrieve(self.collection, points, with_payload=True, with_vectors=vectors)
        )

    def _delete_points(self, selected: Any) -> None:
        selector = self._models.FilterSelector(filter=selected)
        self._send(lambda: self.client.delete(self.collection, selector, wait=True))

    def _count(self, selection: Selection) -> int:
        chosen = self._filter(selection)
        return self._send(lambda: self.client.count(self.collection, chosen, exact=True)).count

    def _find(self, steps: list[Step], selection: Selection) -> list[list[Hit]]:
        chosen = self._filter(selection)
        requests = [self._request(steps, at, chosen) for at in range(len(steps[0].queries))]
        answers = self._send(lambda: self.client.query_batch_points(self.collection, requests))
        return [[_hit(point) for point in answer.points] for answer in answers]

    def _request(self, steps: list[Step], at: int, chosen: Any) -> Any:
        """The whole cascade of a query: the first step is the innermost prefetch, and has the filter."""
        models, *rest = self._models, *steps
        nested = None
        for step in rest[:-1]:
            nested = models.Prefetch(
                query=self._as_query(step, at),
                using=vector_name(step.prefix),
                limit=step.keep,
                prefetch=nested,
                filter=None if nested else chosen,
            )
        last = rest[-1]
        ignore = models.QuantizationSearchParams(ignore=True)  # the final scores are exact
        return models.QueryRequest(
            query=self._as_query(last, at),
            using=vector_name(last.prefix),
            limit=last.keep,
            prefetch=nested,
            filter=None if nested else chosen,
            params=models.SearchParams(quantization=ignore, exact=None if nested else True),
            with_payload=True,
        )

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def __repr__(self) -> str:
        return f"QdrantStore({self.collection!r}, prefixes {self.prefixes}, {self.dim} dimensions)"


class EdgeStore(_Qdrant):
    """Qdrant in this process, in a folder, with the same vectors, filters and cascades as a server.

    A folder is open in one process at a time. What `add` returned from is there after a crash.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        edge = self._edge = _import_edge()
        try:
            given = json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} holds no store of Qdrant Edge; make it with create_store") from None
        self.prefixes, self.dim = tuple(given["prefixes"]), given["dim"]
        self.vectors, self.conditions, self._lock = self.prefixes[-1], _EdgeConditions(edge), threading.RLock()
        try:
            self._shard = edge.EdgeShard.load(str(self.folder / "shard"))
        except Exception as error:
            if "WouldBlock" in str(error):
                raise BlockingIOError(
                    f"{folder} is open already, here or in another process; close it there"
                ) from None
            raise ValueError(f"{folder} cannot be opened by Qdrant Edge: {error}") from error

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        vectors: int,
        dim: int,
        *,
        prefixes: Sequence[int] | None = None,
        quantization: str = "float32",
        disk: str = "float32",
        filters: Mapping[str, str] | None = None,
        m: int = 16,
        ef_construct: int = 100,
    ) -> EdgeStore:
        """Create a store in a new or empty folder, with arguments as for `QdrantStore.create`.

        Raises:
            ValueError: if the folder is not empty, or a number is beyond a limit of Qdrant.
            ImportError: if qdrant-edge-py is not installed.
        """
        edge, folder = _import_edge(), Path(folder)
        prefixes = _check_limits(vectors, dim, prefixes, quantization, disk)
        filters = check_filters(filters)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; open what is there with open_store, or take another folder")
        quantized = {
            "int8": lambda: edge.ScalarQuantizationConfig(edge.ScalarType.Int8, always_ram=True),
            "binary": lambda: edge.BinaryQuantizationConfig(always_ram=True),
        }.get(quantization, lambda: None)

        def params(prefix: int) -> Any:
            first = prefix == 1
            return edge.EdgeVectorParams(
                size=dim,
                distance=edge.Distance.Dot,
                datatype=edge.VectorStorageDatatype.Float16 if "float16" in (quantization, disk) else None,
                quantization_config=quantized() if first else None,
                hnsw_config=edge.HnswIndexConfig(m if first else 0, ef_construct, 10_000),
                multivector_config=None if first else edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
            )

        (folder / "shard").mkdir()
        shard = edge.EdgeShard.create(
            str(folder / "shard"), edge.EdgeConfig({vector_name(prefix): params(prefix) for prefix in prefixes})
        )
        kinds = {payload_key(key): kind for key, kind in filters.items()} | {MARKS: "text"}
        schemas = {"text": edge.PayloadSchemaType.Keyword, "number": edge.PayloadSchemaType.Float}
        for key, kind in kinds.items():
            if kind in schemas:
                shard.update(edge.UpdateOperation.create_field_index(key, schemas[kind]))
        shard.flush()
        shard.close()
        settings = folder / f"{_SETTINGS}.new"
        settings.write_text(json.dumps({"format": 1, "prefixes": prefixes, "dim": dim}), encoding="utf-8")
        settings.rename(folder / _SETTINGS)  # the last one: it makes the folder a store
        return cls(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> EdgeStore:
        """Open a folder."""
        return cls(folder)

    def optimize(self) -> None:
        """Build the HNSW graph and the quantized copies of what was added, and free what was deleted."""
        with self._lock:
            self._shard.optimize()

    def _send_points(self, points: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
        made = [self._edge.Point(i, vectors, payload) for i, vectors, payload in points]
        with self._lock:
            self._shard.update(self._edge.UpdateOperation.upsert_points(made))

    def _put(self, stack: Tensor, ids: list[str], metadata: list[dict[str, Any]], *, replacing: bool) -> None:
        with self._lock:
            super()._put(stack, ids, metadata, replacing=replacing)
            self._shard.flush()

    def _retrieve(self, points: list[str], vectors: Any) -> list[Any]:
        with self._lock:
            return self._shard.retrieve(points, with_payload=True, with_vector=vectors)

    def _delete_points(self, selected: Any) -> None:
        with self._lock:
            self._shard.update(self._edge.UpdateOperation.delete_points_by_filter(selected))
            self._shard.flush()

    def _count(self, selection: Selection) -> int:
        with self._lock:
            return self._shard.count(self._edge.CountRequest(exact=True, filter=self._filter(selection)))

    def _find(self, steps: list[Step], selection: Selection) -> list[list[Hit]]:
        chosen = self._filter(selection)
        requests = [self._request(steps, at, chosen) for at in range(len(steps[0].queries))]
        with self._lock:
            answers = self._shard.query_batch(self._edge.QueryBatchRequest(requests))
        return [[_hit(point) for point in answer] for answer in answers]

    def _request(self, steps: list[Step], at: int, chosen: Any) -> Any:
        edge, nested = self._edge, []

        def nearest(step: Step) -> Any:
            return edge.Query.Nearest(self._as_query(step, at), using=vector_name(step.prefix))

        for step in steps[:-1]:
            nested = [edge.Prefetch(step.keep, nearest(step), prefetches=nested, filter=None if nested else chosen)]
        last = steps[-1]
        ignore = edge.QuantizationSearchParams(ignore=True)
        return edge.QueryRequest(
            limit=last.keep,
            query=nearest(last),
            prefetches=nested,
            filter=None if nested else chosen,
            params=edge.SearchParams(quantization=ignore, exact=not nested),
            with_payload=True,
        )

    def close(self) -> None:
        """Close the folder, which another process may open then."""
        with self._lock:
            self._shard.close()

    def __repr__(self) -> str:
        return f"EdgeStore({str(self.folder)!r}, prefixes {self.prefixes}, {self.dim} dimensions)"


_SETTINGS = "metaembed.json"


class _ClientConditions:
    """Conditions of qdrant-client."""

    def __init__(self, models: Any):
        self._m = models

    def any_of(self, key: str, values: list[str]) -> Any:
        return self._m.FieldCondition(key=key, match=self._m.MatchAny(any=values))

    def between(self, key: str, **bounds: float) -> Any:
        return self._m.FieldCondition(key=key, range=self._m.Range(**bounds))

    def empty(self, key: str) -> Any:
        return self._m.IsEmptyCondition(is_empty=self._m.PayloadField(key=key))

    def null(self, key: str) -> Any:
        return self._m.IsNullCondition(is_null=self._m.PayloadField(key=key))

    def has_id(self, points: list[str]) -> Any:
        return self._m.HasIdCondition(has_id=points)

    def filter(self, must: list[Any], should: list[Any], must_not: list[Any]) -> Any:
        return self._m.Filter(must=must or None, should=should or None, must_not=must_not or None)


class _EdgeConditions:
    """Conditions of qdrant-edge-py."""

    def __init__(self, edge: Any):
        self._e = edge

    def any_of(self, key: str, values: list[str]) -> Any:
        return self._e.FieldCondition(key, match=self._e.MatchAny(values))

    def between(self, key: str, **bounds: float) -> Any:
        return self._e.FieldCondition(key, range=self._e.RangeFloat(**bounds))

    def empty(self, key: str) -> Any:
        return self._e.IsEmptyCondition(key)

    def null(self, key: str) -> Any:
        return self._e.IsNullCondition(key)

    def has_id(self, points: list[str]) -> Any:
        return self._e.HasIdCondition(set(points))

    def filter(self, must: list[Any], should: list[Any], must_not: list[Any]) -> Any:
        return self._e.Filter(must=must or None, should=should or None, must_not=must_not or None)


def _payload(id: str, metadata: dict[str, Any]) -> dict[str, Any]:
    payload = {"id": id, METADATA: metadata}
    found = list(marks(metadata))
    return payload | {MARKS: found} if found else payload


def _hit(point: Any) -> Hit:
    return Hit(point.payload["id"], point.score, point.payload[METADATA])


def _parts(items: Sequence[_Result], size: int) -> Iterator[Sequence[_Result]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _check_limits(
    vectors: Any, dim: Any, prefixes: Sequence[int] | None, quantization: str, disk: str
) -> tuple[int, ...]:
    """Refuse what Qdrant would refuse, before anything is sent."""
    checked = check_prefixes(vectors, dim, prefixes)
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)} for Qdrant, not {quantization!r}")
    if disk not in ("float32", "float16"):
        raise ValueError(f"disk must be 'float32' or 'float16', not {disk!r}")
    if dim > _MOST_DIM:
        raise ValueError(f"Qdrant takes {_MOST_DIM} dimensions at most, not {dim}; keep fewer with fit_pca")
    if vectors * dim >= _MOST_NUMBERS and vectors > 1:
        most = (_MOST_NUMBERS - 1) // dim
        raise ValueError(
            f"Qdrant takes less than {_MOST_NUMBERS:,} numbers for the vectors of a document, not {vectors} x {dim} = "
            f"{vectors * dim:,}; keep {most} vectors, or {(_MOST_NUMBERS - 1) // vectors} dimensions with fit_pca"
        )
    return checked


def _connect(address: str, client: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """The client and the name of the collection of an address."""
    if client is not None and "://" not in address:
        return client, address
    parts = urlsplit(address)
    prefix, _, name = parts.path.strip("/").rpartition("/")
    if not name:
        raise ValueError(f"{address!r} names no collection; write http://HOST:6333/COLLECTION")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "the address of a Qdrant collection is http(s)://HOST:PORT/COLLECTION; give an API key as "
            "api_key=..., or in the environment variable QDRANT_API_KEY"
        )
    if client is not None:
        return client, unquote(name)
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise ImportError("a Qdrant server needs qdrant-client: pip install 'metaembed[qdrant]'") from None
    port = parts.port or (443 if parts.scheme == "https" else 6333)
    options = {"timeout": 60, "api_key": os.environ.get("QDRANT_API_KEY"), "check_compatibility": False} | options
    url = f"{parts.scheme}://{parts.hostname}:{port}"
    return QdrantClient(url=url, port=port, prefix=prefix or None, **options), unquote(name)


def _is_local(client: Any) -> bool:
    """Whether a client keeps the vectors itself. Such a one has no payload indexes, and warns of them."""
    return type(getattr(client, "_client", None)).__name__ == "QdrantLocal"


def _import_edge() -> Any:
    try:
        import qdrant_edge
    except ImportError:
        raise ImportError("Qdrant Edge needs qdrant-edge-py: pip install 'metaembed[qdrant]'") from None
    return qdrant_edge


def _attempt(call: Callable[[], _Result], attempts: int) -> _Result:
    """Send a request, again while the server does not answer or is busy."""
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    def passes(error: Exception) -> float | None:
        if isinstance(error, UnexpectedResponse):
            if error.status_code not in (429, 500, 502, 503, 504):
                return None
            with contextlib.suppress(TypeError, ValueError):
                return float(error.headers.get("retry-after"))
            return 0.0
        code = getattr(error, "code", None)  # of gRPC
        busy = callable(code) and getattr(code(), "name", "") in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
        return 0.0 if busy or isinstance(error, ResponseHandlingException | ConnectionError | TimeoutError) else None

    return retry(call, passes, attempts)

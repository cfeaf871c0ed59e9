"""An HTTP server for an index: encode, search, add and delete documents."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..inputs_metaembed import InputPolicy, check_text, read_image
from ..retrieval.index import DamagedIndexError
from .batching import Batcher, Busy
from .encoder import Encoder, load_encoder

__all__ = ["API_KEY", "Limits", "create_app", "serve"]

API_KEY = "METAEMBED_API_KEY"
_OPEN = ("/health",)  # needs no key: what watches a server has none
_LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more of it is refused with a status of 4xx.

    Attributes:
        body_bytes: Bytes of a request's body.
        inputs: Queries or documents of a request.
        images: Pictures of one query or document.
        image_bytes: Bytes of a picture's file.
        pixels: Width times height of a picture, checked before it is decoded.
        characters: Of one text.
        k: Hits of a query.
        seconds: Time for an answer; after it the status is 504. A write that had begun is completed all the same.
        waiting: Inputs of all requests that wait for the model; with more of them the status is 503.
    """

    body_bytes: int = 32 << 20
    inputs: int = 64
    images: int = 8
    image_bytes: int = 16 << 20
    pixels: int = 25_000_000
    characters: int = 100_000
    k: int = 1000
    seconds: float = 60
    waiting: int = 1024


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Parts(_Strict):
    """A text, pictures, or both."""

    text: str | None = None
    image: str | list[str] | None = Field(None, description="Base64 or data URL of a picture, or several.")


Input = Annotated[str | Parts, Field(description="A text, or an object with `text` and/or `image`.")]
Id = Annotated[str, Field(min_length=1, max_length=1000)]
Size = Annotated[int, Field(ge=1, strict=True)]
Filter = dict[str, Any]


class EncodeRequest(_Strict):
    """What to encode."""

    inputs: list[Input] = Field(min_length=1)
    side: Literal["query", "document"] = "query"
    num_meta: Size | None = Field(None, description="Vectors of each; all by default.")


class EncodeResponse(BaseModel):
    """Unit vectors."""

    embeddings: list[list[list[float]]] = Field(description="[inputs, vectors, dimensions]")


class SearchRequest(_Strict):
    """What to search for."""

    queries: list[Input] = Field(min_length=1)
    k: Size = 10
    budget: tuple[Size, Size] | None = Field(None, description="Vectors of a query and of a document; all by default.")
    exact: bool = Field(False, description="Score every document instead of narrowing them down first.")
    where: Filter | None = Field(None, description='Filter, as {"lang": "en", "page": {"$lt": 10}}.')
    include_ids: list[Id] | None = None
    exclude_ids: list[Id] | None = None


class Hit(BaseModel):
    """A document that was found."""

    id: str
    score: float
    metadata: dict[str, Any]


class SearchResponse(BaseModel):
    """What was found, best first, for every query."""

    results: list[list[Hit]]
    milliseconds: dict[str, float] = Field(description="`encode` and `search`.")


class NewDocument(_Strict):
    """A document to add."""

    id: Id
    input: Input
    metadata: dict[str, Any] = {}


class AddRequest(_Strict):
    """Documents to add."""

    documents: list[NewDocument] = Field(min_length=1)
    replace: bool = Field(False, description="Replace documents that have these ids; otherwise they are an error.")


class DeleteRequest(_Strict):
    """Documents to delete: by ids or by a filter."""

    ids: list[Id] | None = None
    where: Filter | None = None


class Count(BaseModel):
    """How many documents were added, replaced or deleted."""

    documents: int


class StoredDocument(BaseModel):
    """A document of the index."""

    id: str
    metadata: dict[str, Any]


class Health(BaseModel):
    """What is served."""

    status: Literal["ok"]
    documents: int
    model: str
    budgets: list[tuple[int, int]]


class _Service:
    """What the routes do, apart from HTTP."""

    def __init__(self, store: Any, encoder: Encoder, limits: Limits, metrics: _Metrics):
        self.store, self.encoder, self.limits = store, encoder, limits
        self.batcher = Batcher(self._encode_batch, most_waiting=limits.waiting, observe=metrics.batch.observe)
        self._readers, self._searchers = CapacityLimiter(4), CapacityLimiter(2)
        self._refreshed = 0.0

    def _encode_batch(self, key: tuple[str, int], inputs: list[Any]) -> Any:
        side, num_meta = key
        encode = self.encoder.encode_queries if side == "query" else self.encoder.encode_documents
        return encode(inputs, num_meta)

    async def encode(self, side: str, inputs: list[Any], num_meta: int | None = None) -> Any:
        """Encode inputs of a request as `[N, r, D]`. What is wrong with one of them is found before it is queued."""
        most = self.encoder.query_vectors if side == "query" else self.encoder.document_vectors
        if num_meta is not None and num_meta > most:
            raise ValueError(f"a {side} has at most {most} vectors, not {num_meta}")
        if len(inputs) > self.limits.inputs:
            raise ValueError(f"a request may have {self.limits.inputs} inputs, not {len(inputs)}")
        read = [await to_thread.run_sync(self._read, i, one, limiter=self._readers) for i, one in enumerate(inputs)]
        return await self.batcher.encode((side, num_meta or most), read)

    def _read(self, index: int, given: str | Parts) -> str | dict[str, Any]:
        """Check an input, and read its pictures."""
        limits = self.limits
        parts = Parts(text=given) if isinstance(given, str) else given
        images = [parts.image] if isinstance(parts.image, str) else parts.image or []
        try:
            text = None if parts.text is None else check_text("the text", parts.text)
            if text is None and not images:
                raise ValueError("it has neither a text nor a picture")
            if text is not None and len(text) > limits.characters:
                raise ValueError(f"it has {len(text)} characters; at most {limits.characters} are taken")
            if len(images) > limits.images:
                raise ValueError(f"it has {len(images)} pictures; at most {limits.images} are taken")
            if images and not self.encoder.takes_images:
                raise ValueError("this model takes no pictures")
            read: dict[str, Any] = {"image": [read_image(image, self.encoder.policy) for image in images]}
        except (TypeError, ValueError) as error:
            raise ValueError(f"input {index}: {error}") from None
        if text is not None and not images:
            return text
        return read if text is None else {"text": text, **read}

    async def search(self, wanted: SearchRequest) -> SearchResponse:
        if wanted.k > self.limits.k:
            raise ValueError(f"k must be at most {self.limits.k}, not {wanted.k}")
        r_q, r_c = wanted.budget or (self.encoder.query_vectors, self.store.vectors)
        if r_c > self.store.vectors:
            raise ValueError(f"documents of this index have {self.store.vectors} vectors, not {r_c}")
        times = [time.perf_counter()]
        queries = await self.encode("query", wanted.queries, r_q)
        times.append(time.perf_counter())
        options = {name: getattr(wanted, name) for name in ("where", "include_ids", "exclude_ids")}
        find = partial(self._search, queries, wanted.k, (r_q, r_c), None if wanted.exact else "auto", **options)
        found = await to_thread.run_sync(find, limiter=self._searchers, abandon_on_cancel=True)
        times.append(time.perf_counter())
        rows = zip(found.ids, found.scores.tolist(), found.metadata, strict=True)
        results = [[Hit(id=i, score=s, metadata=m) for i, s, m in zip(*row, strict=False)] for row in rows]
        spent = {name: 1000 * (b - a) for name, a, b in zip(("encode", "search"), times, times[1:], strict=False)}
        return SearchResponse(results=results, milliseconds=spent)

    def _search(self, queries: Any, k: int, budget: Any, stages: Any, **options: Any) -> Any:
        self.refresh()
        return self.store.search(queries, k, budget, stages, **options)

    def refresh(self) -> None:
        """See what others wrote to a folder, within a second."""
        now = time.monotonic()
        if now - self._refreshed > 1 and hasattr(self.store, "refresh"):
            self.store.refresh()
            self._refreshed = now

    async def add(self, wanted: AddRequest) -> Count:
        embeddings = await self.encode("document", [one.input for one in wanted.documents])
        write = self.store.upsert if wanted.replace else self.store.add
        ids = [one.id for one in wanted.documents]
        await to_thread.run_sync(write, embeddings, ids, [one.metadata for one in wanted.documents])
        return Count(documents=len(ids))

    async def delete(self, wanted: DeleteRequest) -> Count:
        if (wanted.ids is None) == (wanted.where is None):
            raise ValueError("give either ids or where")
        if wanted.where == {}:
            raise ValueError("an empty filter would delete every document; name what to delete")
        return Count(documents=await to_thread.run_sync(lambda: self.store.delete(wanted.ids, wanted.where)))

    async def get(self, id: str) -> StoredDocument:
        def find() -> Any:
            self.refresh()
            return self.store.get([id])[0] if id in self.store else None

        document = await to_thread.run_sync(find)
        if document is None:
            raise HTTPException(404, f"no document has the id {id!r}")
        return StoredDocument(id=document.id, metadata=document.metadata)


class _Metrics:
    """What `/metrics` shows."""

    def __init__(self, documents: Callable[[], int]):
        self.registry = CollectorRegistry()
        make = partial(dict, registry=self.registry)
        self.requests = Counter("metaembed_requests", "Requests answered", ["path", "status"], **make())
        self.seconds = Histogram("metaembed_request_seconds", "Time to answer a request", ["path"], **make())
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch = Histogram(
            "metaembed_batch_inputs", "Inputs that the model encoded at once", buckets=sizes, **make()
        )
        Gauge("metaembed_documents", "Documents of the index", **make()).set_function(documents)


def create_app(
    store: Any,
    encoder: Encoder,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: list[str] | None = None,
    read_only: bool = False,
) -> FastAPI:
    """Return the application. It closes the store when it is shut down.

    Args:
        store: A `MultiVectorIndex`, or another store of `metaembed.stores`.
        encoder: The model that the documents were encoded with. Its policy says what may be read and fetched for a
            request: `serve` lets it read nothing.
        limits: `Limits()` by default.
        api_key: What `Authorization: Bearer KEY` must hold, for everything but `/health`. None: no key is asked for.
        hosts: Names that the server answers to, against pages that have their own name point to it. None: any.
        read_only: Leave out the routes that add and delete.

    Example:
        >>> app = create_app(MultiVectorIndex.open("my-index"), load_encoder("you/your-metaembed"))
    """
    limits = limits or Limits()
    metrics = _Metrics(lambda: len(store))
    service = _Service(store, encoder, limits, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.batcher:
            yield
        store.close()

    app = FastAPI(
        title="metaembed",
        description="Multi-vector search whose budget is a parameter of a request.",
        lifespan=lifespan,
        max_body_size=limits.body_bytes,
        docs_url=None,  # its page would load scripts of others
        redoc_url=None,
        responses={"4XX": {"description": "What was wrong, in a sentence.", "model": dict[Literal["error"], str]}},
    )
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    _handle_errors(app)

    app.add_middleware(_Guard, api_key=api_key, seconds=limits.seconds, metrics=metrics)

    @app.get("/health")
    async def health() -> Health:
        """Whether the server answers, and what it serves."""
        return Health(status="ok", documents=len(store), model=encoder.name, budgets=encoder.budgets)

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/encode")
    async def encode(wanted: EncodeRequest) -> EncodeResponse:
        """Encode queries or documents."""
        embeddings = await service.encode(wanted.side, wanted.inputs, wanted.num_meta)
        return EncodeResponse(embeddings=np.asarray(embeddings).tolist())

    @app.post("/search")
    async def search(wanted: SearchRequest) -> SearchResponse:
        """Find the best documents of every query."""
        return await service.search(wanted)

    @app.get("/documents/{id:path}")
    async def get_document(id: str) -> StoredDocument:
        """Return a document's metadata."""
        return await service.get(id)

    if not read_only:

        @app.post("/documents", status_code=201)
        async def add(wanted: AddRequest) -> Count:
            """Encode documents and add them: all or none. When it answers, they are on disk."""
            return await service.add(wanted)

        @app.post("/documents/delete")
        async def delete(wanted: DeleteRequest) -> Count:
            """Delete documents."""
            return await service.delete(wanted)

    return app


class _Guard:
    """Asks for the key, keeps the time, and counts."""

    def __init__(self, app: ASGIApp, api_key: str | None, seconds: float, metrics: _Metrics):
        self.app, self.api_key, self.seconds, self.metrics = app, api_key, seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if self.api_key is None or scope["path"] in _OPEN or _has_key(scope, self.api_key):
                async with asyncio.timeout(self.seconds):
                    await self.app(scope, receive, note)
            else:
                await _error(401, f"send the API key, as in 'Authorization: Bearer KEY' ({API_KEY})")(
                    scope, receive, note
                )
        except TimeoutError:
            if status:
                raise
            await _error(504, f"there was no answer within {self.seconds:g} seconds")(scope, receive, note)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # not what a stranger made up
            self.metrics.requests.labels(path, status or 500).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)


def _has_key(scope: Scope, api_key: str) -> bool:
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode())


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    message = message.encode("utf-8", "backslashreplace").decode()  # it may quote half a character
    return JSONResponse({"error": message}, status, headers)


def _handle_errors(app: FastAPI) -> None:
    """Answer every error with `{"error": a sentence}`."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        wrong = [f"{'.'.join(map(str, one['loc'][1:])) or 'the body'}: {one['msg']}" for one in error.errors()]
        return _error(422, "; ".join(wrong[:5]))

    @app.exception_handler(AnyHTTPException)
    async def http(request: Request, error: AnyHTTPException) -> Response:
        return _error(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(ValueError)
    @app.exception_handler(TypeError)
    async def bad_input(request: Request, error: Exception) -> Response:
        _log.info("%s %s was refused", request.method, request.url.path, exc_info=error)  # or it is a fault of ours
        return _error(400, str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Exception) -> Response:
        return _error(503, str(error), {"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _error(500, "the server failed; its log says why")

    @app.exception_handler(DamagedIndexError)
    async def damaged(request: Request, error: Exception) -> Response:
        _log.error("%s", error)
        return _error(500, "the index is damaged; the log says how")


def serve(
    index: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: Any = None,
    device: str | None = None,
    limits: Limits | None = None,
    read_only: bool = False,
    allow_hosts: tuple[str, ...] = (),
    allow_folders: tuple[str, ...] = (),
) -> None:
    """Serve an index until SIGTERM or SIGINT, and then finish what was accepted.

    The key of the API is read from the environment variable `METAEMBED_API_KEY`. Requests may contain pictures, but
    no path and no URL is read for them, except what `allow_hosts` and `allow_folders` name.

    Args:
        index: Folder of an index, or address of a store.
        host: Where to listen. Anything but loopback needs a key.
        port: Where to listen.
        model: Instead of the model that the index was made with.
        device: Where the model computes.
        limits: `Limits()` by default.
        read_only: Whether requests cannot add or delete.
        allow_hosts: Patterns of hosts whose pictures a request may name by URL, such as `"*.example.com"`.
        allow_folders: Folders whose pictures a request may name by path.

    Raises:
        ValueError: if the host is not loopback and there is no key.
        FileNotFoundError: if there is no index.
    """
    import uvicorn

    from .settings import open_index, read_settings

    api_key = os.environ.get(API_KEY) or None
    if api_key is None and not _is_loopback(host):
        raise ValueError(f"{host} can be reached by others: set the environment variable {API_KEY} to a key")
    limits = limits or Limits()
    trust = False
    revision = None
    if model is None:
        settings = read_settings(index)
        model, revision, trust = settings.model, settings.revision, settings.trust_remote_code
    policy = InputPolicy.server(max_bytes=limits.image_bytes, max_pixels=limits.pixels, folders=allow_folders)
    if allow_hosts:
        policy = replace(policy, schemes=("http", "https"), hosts=allow_hosts)
    encoder = load_encoder(model, device=device, revision=revision, trust_remote_code=trust, policy=policy)
    app = create_app(
        open_index(index),
        encoder,
        limits=limits,
        api_key=api_key,
        hosts=_LOOPBACK if _is_loopback(host) else None,
        read_only=read_only,
    )
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=int(limits.seconds) + 1, server_header=False)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""PostgreSQL with pgvector: one table, HNSW on the first vectors, and exact MaxSim of the candidates in SQL."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import torch
from torch import Tensor

from ..retrieval.index import Document
from .engine import EngineStore, Hit, Selection, Step, check_filters, check_prefixes, retry
from .pgvector_filters import COLUMN_TYPES, check_name, column_name, expression, translate

_Result = TypeVar("_Result")
TYPES = {"float32": "vector", "float16": "halfvec"}
_MOST_DIM = 16_000
_MOST_INDEXED = {"vector": 2_000, "halfvec": 4_000}  # dimensions of an HNSW graph
_MOST_BYTES = 1 << 30  # of a value
_MOST_METADATA = 255 << 20  # of a document
_MOST_EF = 1_000
_MARK = "metaembed store 1 "  # begins the comment of a table that is a store


class PgvectorStore(EngineStore):
    """A table of PostgreSQL, with pgvector 0.8 or later.

    Its columns are `id`, `metadata` (JSONB), `v1` (the first vector, with an HNSW graph), and for every other prefix
    an array of vectors, `v8`, `v64`, ... Each `add`, `upsert` and `delete` is one transaction.

    Args:
        address: `postgresql://USER:PASSWORD@HOST:PORT/DATABASE?table=TABLE`, or `SCHEMA.TABLE`; other parameters are
            those of libpq.
        timeout: Seconds that a statement may take.
        attempts: How often reading and `upsert` are tried, with ever longer waits, if the server does not answer.

    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: if it is not one that `create` made, or the address names no table.
        ConnectionError: if the server does not answer.
        ImportError: if psycopg or pgvector is not installed.
    """

    def __init__(self, address: str, *, timeout: float = 60.0, attempts: int = 6):
        self._psycopg, self._pgvector = _import()
        self._dsn, self._path = _split(address)
        self._timeout, self._attempts = timeout, attempts
        self._lock, self._connection = threading.RLock(), None
        sql = self._psycopg.sql
        self._table = sql.Identifier(*self._path)
        try:
            settings = self._again(self._settings)
            self.prefixes, self.dim, self.kind = tuple(settings["prefixes"]), settings["dim"], settings["type"]
            self.vectors, self.filters = self.prefixes[-1], settings["filters"]
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        address: str,
        vectors: int,
        dim: int,
        *,
        prefixes: Sequence[int] | None = None,
        quantization: str = "float32",
        filters: Mapping[str, str] | None = None,
        m: int = 16,
        ef_construction: int = 64,
        timeout: float = 60.0,
        attempts: int = 6,
    ) -> PgvectorStore:
        """Create the table, and the extension `vector` where it is missing.

        Args:
            address: As for `PgvectorStore`.
            vectors: How many vectors of a document are kept.
            dim: Dimensions of documents and queries.
            prefixes: The numbers of document vectors that budgets can name, 1, 8 and all by default.
            quantization: `"float32"`, or `"float16"`, half the disk. From 2,000 dimensions on, the graph of the first
                vectors is always of float16.
            filters: Keys of the metadata that get an ordinary column `meta_KEY` with an index, with the kind of their
                values: `{"lang": "text", "page": "number"}`. Filters on others read the JSON.
            m: Links of a document in the HNSW graph.
            ef_construction: Candidates for a link while the graph is built.
            timeout: As for `PgvectorStore`.
            attempts: As for `PgvectorStore`.

        Raises:
            ValueError: if the table exists already, or a number is beyond a limit of pgvector.
            ConnectionError: if the server does not answer.
            PermissionError: if the user may not create what is missing.
            ImportError: if psycopg or pgvector is not installed.
        """
        checked = _check_limits(vectors, dim, prefixes, quantization)
        filters = check_filters(filters)
        psycopg, _ = _import()
        sql, errors = psycopg.sql, psycopg.errors
        dsn, path = _split(address)
        kind = TYPES[quantization]
        settings = {"prefixes": checked, "dim": dim, "type": kind, "filters": filters}
        table, of = sql.Identifier(*path), sql.SQL(f"{kind}({dim})")  # both are checked
        columns = [
            sql.SQL('id text COLLATE "C" PRIMARY KEY, metadata jsonb NOT NULL'),
            sql.SQL("v1 {} NOT NULL").format(of),
        ]
        columns += [sql.SQL("{} {}[] NOT NULL").format(sql.Identifier(f"v{p}"), of) for p in checked[1:]]
        columns += [
            sql.SQL("{} {} GENERATED ALWAYS AS ({}) STORED").format(
                sql.Identifier(column_name(key)), sql.SQL(COLUMN_TYPES[of_kind]), expression(sql, key, of_kind)
            )
            for key, of_kind in filters.items()
        ]
        statements = [sql.SQL("CREATE TABLE {} ({})").format(table, sql.SQL(", ").join(columns))]
        statements += [  # compression only costs time: vectors do not get smaller
            sql.SQL("ALTER TABLE {} ALTER COLUMN {} SET STORAGE EXTERNAL").format(table, sql.Identifier(f"v{prefix}"))
            for prefix in checked
        ]
        graph = sql.SQL("v1") if dim <= _MOST_INDEXED[kind] else sql.SQL(f"(v1::halfvec({dim}))")
        ops = "vector" if kind == "vector" and dim <= _MOST_INDEXED[kind] else "halfvec"
        statements.append(
            sql.SQL(
                f"CREATE INDEX ON {{}} USING hnsw ({{}} {ops}_ip_ops) WITH (m = {{}}, ef_construction = {{}})"
            ).format(table, graph, sql.Literal(m), sql.Literal(ef_construction))
        )
        statements += [
            sql.SQL("CREATE INDEX ON {} ({})").format(table, sql.Identifier(column_name(key))) for key in filters
        ]
        statements.append(
            sql.SQL("COMMENT ON TABLE {} IS {}").format(table, sql.Literal(_MARK + json.dumps(settings)))
        )
        with _translated(errors), _connect(psycopg, dsn, timeout, attempts) as connection:
            with suppress(errors.UniqueViolation):  # another session creates it at this moment
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            _check_version(connection)
            with connection.transaction():
                try:
                    for statement in statements:
                        connection.execute(statement)
                except errors.DuplicateTable:
                    raise ValueError(
                        f"the database has a table {'.'.join(path)!r} already; open it with open_store"
                    ) from None
        return cls(address, timeout=timeout, attempts=attempts)

    @classmethod
    def open(cls, address: str, *, timeout: float = 60.0, attempts: int = 6) -> PgvectorStore:
        """Open a table by its address."""
        return cls(address, timeout=timeout, attempts=attempts)

    # Writing

    def _put(self, stack: Tensor, ids: list[str], metadata: list[dict[str, Any]], *, replacing: bool) -> None:
        for id, one in zip(ids, metadata, strict=True):
            if len(json.dumps(one)) > _MOST_METADATA:
                raise ValueError(
                    f"document {id!r} has more than the 255 MB of metadata that PostgreSQL takes; keep less"
                )
        sql, errors = self._psycopg.sql, self._psycopg.errors
        names = ["id", "metadata", *(f"v{prefix}" for prefix in self.prefixes)]
        conflict = sql.SQL("ON CONFLICT (id) DO UPDATE SET {}").format(
            sql.SQL(", ").join(sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name)) for name in names[1:])
        )
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({}) {}").format(
            self._table,
            sql.SQL(", ").join(map(sql.Identifier, names)),
            sql.SQL(", ").join([sql.SQL("%s"), sql.SQL("%s"), *[sql.SQL("%b")] * len(self.prefixes)]),
            conflict if replacing else sql.SQL(""),
        )
        # In the order of ids, so that two writers of the same documents wait for each other instead of deadlocking.
        order = sorted(range(len(ids)), key=ids.__getitem__)

        def write() -> None:
            with self._session() as connection, connection.cursor() as cursor:
                cursor.executemany(
                    statement,
                    ((ids[i], self._psycopg.types.json.Jsonb(metadata[i]), *self._values(stack[i])) for i in order),
                )

        try:
            self._again(write) if replacing else write()
        except errors.UniqueViolation as error:
            there = re.search(r"\(id\)=\((.*)\) ", error.diag.message_detail or "", re.DOTALL)
            raise ValueError(
                f"ids are in the store already, such as {there[1] if there else '?'!r}; replace with upsert"
            ) from None

    def _values(self, document: Tensor) -> Iterator[Any]:
        """The values of the columns of vectors."""
        rows = [self._value(row) for row in document]
        yield rows[0]
        for prefix in self.prefixes[1:]:
            yield rows[:prefix]

    def _value(self, vector: Tensor) -> Any:
        values = vector.numpy()
        return self._pgvector.Vector(values) if self.kind == "vector" else self._pgvector.HalfVector(values)

    def _delete(self, selection: Selection) -> int:
        with self._session() as connection:
            where, values = self._where(selection)
            return connection.execute(
                self._psycopg.sql.SQL("DELETE FROM {} {}").format(self._table, where), values
            ).rowcount

    # Reading

    def _get(self, ids: list[str]) -> list[Document]:
        def read() -> list[Any]:
            with self._session() as connection:
                where, values = self._where(Selection(include=ids))
                columns = self._psycopg.sql.Identifier(f"v{self.vectors}")
                statement = self._psycopg.sql.SQL("SELECT id, metadata, {} FROM {} {}").format(
                    columns, self._table, where
                )
                return connection.execute(statement, values, binary=True).fetchall()

        documents = []
        for id, metadata, found in self._again(read):
            rows = found if isinstance(found, list) else [found]
            embedding = torch.stack([torch.from_numpy(row.to_numpy().astype("float32")) for row in rows])
            documents.append(Document(id, metadata, embedding))
        return documents

    def _count(self, selection: Selection) -> int:
        def read() -> int:
            with self._session() as connection:
                where, values = self._where(selection)
                statement = self._psycopg.sql.SQL("SELECT count(*) FROM {} {}").format(self._table, where)
                return connection.execute(statement, values).fetchone()[0]

        return self._again(read)

    def _find(self, steps: list[Step], selection: Selection) -> list[list[Hit]]:
        def read() -> list[list[Hit]]:
            with self._session() as connection:
                if len(steps) > 1:
                    # The scan of the graph goes on until enough documents match, however few the filter selects.
                    ef = min(_MOST_EF, max(40, steps[0].keep))
                    for name, value in (
                        ("ef_search", str(ef)),
                        ("iterative_scan", "strict_order"),
                        ("max_scan_tuples", str(2**31 - 1)),
                    ):
                        connection.execute("SELECT set_config(%s, %s, true)", (f"hnsw.{name}", value))
                return [
                    [
                        Hit(id, score, metadata)
                        for id, score, metadata in connection.execute(*self._cascade(steps, at, selection))
                    ]
                    for at in range(len(steps[0].queries))
                ]

        return self._again(read)

    def _cascade(self, steps: list[Step], at: int, selection: Selection) -> tuple[Any, list[Any]]:
        """One statement for the whole cascade of a query, and its values."""
        sql = self._psycopg.sql
        parts, values = [], list[Any]()
        for number, step in enumerate(steps):
            score, of_score = self._score(step, at)
            values += of_score
            if number == 0:
                where, of_where = self._where(selection)
                source = sql.SQL("{} AS t {}").format(self._table, where)
                values += of_where
            else:
                source = sql.SQL("{} AS t JOIN {} USING (id)").format(self._table, sql.Identifier(f"step{number - 1}"))
            distance = sql.SQL("distance")
            if number == 0 and step.prefix == 1:  # an order that the graph knows
                distance = score
                values += of_score
            parts.append(
                sql.SQL("{} AS MATERIALIZED (SELECT t.id, {} AS distance{} FROM {} ORDER BY {} LIMIT {})").format(
                    sql.Identifier(f"step{number}"),
                    score,
                    sql.SQL(", t.metadata" if step is steps[-1] else ""),
                    source,
                    distance,
                    sql.Literal(step.keep),
                )
            )
        statement = sql.SQL("WITH {} SELECT id, -distance, metadata FROM {} ORDER BY distance, id").format(
            sql.SQL(", ").join(parts), sql.Identifier(f"step{len(steps) - 1}")
        )
        return statement, values

    def _score(self, step: Step, at: int) -> tuple[Any, list[Any]]:
        """The negative score of a document at a step. One vector is compared with the sum of the query's."""
        sql, rows = self._psycopg.sql, step.queries[at]
        if step.prefix == 1:
            return self._first(), [self._graph_value(rows.sum(dim=0))]
        least = sql.SQL(" + ").join([sql.SQL("min(v <#> %b)")] * len(rows))
        column = sql.Identifier("t", f"v{step.prefix}")
        return sql.SQL("(SELECT {} FROM unnest({}) AS v)").format(least, column), [self._value(row) for row in rows]

    def _first(self) -> Any:
        if self._casts():
            return self._psycopg.sql.SQL(f"(t.v1::halfvec({self.dim}) <#> %b)")
        return self._psycopg.sql.SQL("(t.v1 <#> %b)")

    def _casts(self) -> bool:
        """Whether the graph is of float16, although the table is not."""
        return self.kind == "vector" and self.dim > _MOST_INDEXED["vector"]

    def _graph_value(self, vector: Tensor) -> Any:
        return self._pgvector.HalfVector(vector.numpy()) if self._casts() else self._value(vector)

    def _where(self, selection: Selection) -> tuple[Any, list[Any]]:
        sql, conditions, values = self._psycopg.sql, [], list[Any]()
        if selection.where is not None:
            condition, of_condition = translate(sql, selection.where, self.filters)
            conditions.append(condition)
            values += of_condition
        for ids, text in ((selection.include, "id = ANY(%s)"), (selection.exclude, "id <> ALL(%s)")):
            if ids is not None:
                conditions.append(sql.SQL(text))
                values.append(ids)
        return sql.SQL("WHERE {}").format(sql.SQL(" AND ").join(conditions)) if conditions else sql.SQL(""), values

    # The connection

    def _settings(self) -> dict[str, Any]:
        with self._session() as connection:
            row = connection.execute(
                "SELECT obj_description(to_regclass(%s), 'pg_class'), to_regclass(%s) IS NULL",
                [self._table.as_string(connection)] * 2,
            ).fetchone()
        if row[1]:
            raise FileNotFoundError(f"the database has no table {'.'.join(self._path)!r}; make it with create_store")
        if not row[0] or not row[0].startswith(_MARK):
            raise ValueError(f"the table {'.'.join(self._path)!r} is no store: create_store did not make it")
        return json.loads(row[0].removeprefix(_MARK))

    @contextmanager
    def _session(self) -> Iterator[Any]:
        """A transaction on the one connection, which is opened again if it was lost."""
        with self._lock, _translated(self._psycopg.errors):
            if self._connection is None or self._connection.closed:
                self._connection = _connect(self._psycopg, self._dsn, self._timeout, 1)
                _check_version(self._connection)
                from pgvector.psycopg import register_vector

                register_vector(self._connection)
            with self._connection.transaction():
                yield self._connection

    def _again(self, call: Callable[[], _Result]) -> _Result:
        return retry(call, lambda error: 0.0 if _passes(self._psycopg, error) else None, self._attempts)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()

    def __repr__(self) -> str:
        return f"PgvectorStore({'.'.join(self._path)!r}, prefixes {self.prefixes}, {self.dim} dimensions)"


def _import() -> tuple[Any, Any]:
    try:
        import pgvector
        import psycopg
        import psycopg.types.json
    except ImportError:
        raise ImportError("PostgreSQL needs psycopg and pgvector: pip install 'metaembed[postgres]'") from None
    return psycopg, pgvector


def _split(address: str) -> tuple[str, list[str]]:
    """The address for libpq, and the schema, if it is named, and the table."""
    parts = urlsplit(address)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    tables = [value for key, value in pairs if key == "table"]
    path = tables[0].split(".") if tables else []
    if len(tables) != 1 or len(path) > 2 or not all(path):
        raise ValueError(
            "the address of a table is postgresql://USER:PASSWORD@HOST:PORT/DATABASE?table=TABLE, or "
            "table=SCHEMA.TABLE; this one names " + (f"{tables}" if tables else "no table")
        )
    for name in path:
        check_name(name)
    query = urlencode([(key, value) for key, value in pairs if key != "table"])
    return urlunsplit(parts._replace(query=query)), path


def _connect(psycopg: Any, dsn: str, timeout: float, attempts: int) -> Any:
    def connect() -> Any:
        options = {"connect_timeout": 10, "application_name": "metaembed"}
        connection = psycopg.connect(dsn, autocommit=True, **options)
        connection.execute("SELECT set_config('statement_timeout', %s, false)", (str(int(timeout * 1000)),))
        return connection

    return retry(connect, lambda error: 0.0 if _passes(psycopg, error) else None, attempts)


def _passes(psycopg: Any, error: Exception) -> bool:
    """Whether an error may be gone at the next attempt."""
    errors = psycopg.errors
    if isinstance(error, errors.SerializationFailure | errors.DeadlockDetected | errors.TooManyConnections):
        return True
    lasting = errors.InvalidPassword | errors.InvalidAuthorizationSpecification | errors.QueryCanceled
    return isinstance(error, psycopg.OperationalError | ConnectionError) and not isinstance(error, lasting)


@contextmanager
def _translated(errors: Any) -> Iterator[None]:
    """Raise Python's own errors where there are such."""
    try:
        yield
    except errors.InsufficientPrivilege as error:
        raise PermissionError(f"PostgreSQL does not allow this to the user of the address: {error}") from error
    except errors.QueryCanceled as error:
        raise TimeoutError(
            f"PostgreSQL gave up after the timeout of the store; give it a longer one: {error}"
        ) from error
    except errors.DiskFull as error:
        raise OSError(f"the disk of PostgreSQL is full; nothing of this operation was kept: {error}") from error
    except (errors.UndefinedFile, errors.FeatureNotSupported) as error:
        raise RuntimeError(f"the PostgreSQL server lacks pgvector 0.8 or later; install it there: {error}") from error


def _check_version(connection: Any) -> None:
    row = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    if row is None or tuple(map(int, re.findall(r"\d+", row[0])[:2])) < (0, 8):
        raise RuntimeError(
            f"the database has pgvector {row[0] if row else '(none)'}, and 0.8 or later is needed: install it on the "
            "server, then CREATE EXTENSION vector, or ALTER EXTENSION vector UPDATE"
        )


def _check_limits(vectors: Any, dim: Any, prefixes: Sequence[int] | None, quantization: str) -> tuple[int, ...]:
    """Refuse what pgvector would refuse, before anything is sent."""
    checked = check_prefixes(vectors, dim, prefixes)
    if quantization not in TYPES:
        raise ValueError(f"quantization must be 'float32' or 'float16' for PostgreSQL, not {quantization!r}")
    most = _MOST_INDEXED["halfvec"]
    if dim > most:
        raise ValueError(
            f"the HNSW graph of pgvector takes {most} dimensions at most, not {dim}; keep fewer with fit_pca"
        )
    size = vectors * (8 + dim * (4 if quantization == "float32" else 2))
    if size >= _MOST_BYTES:
        raise ValueError(
            f"the vectors of a document take {size >> 20} MB, and PostgreSQL takes 1 GB at most; keep fewer vectors, "
            "or fewer dimensions with fit_pca"
        )
    return checked

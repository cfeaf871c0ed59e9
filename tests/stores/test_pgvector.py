"""A store in PostgreSQL keeps its promises with the real server."""

import threading
import uuid

import pytest
import torch
from torch.nn.functional import normalize

from metaembed.stores import create_store, engine, open_store

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")


def vectors(seed, *shape):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def names(n):
    return [f"d{i}" for i in range(n)]


@pytest.fixture
def address(postgres):
    return f"{postgres}&table=t{uuid.uuid4().hex}"


def test_a_batch_is_one_transaction(address, postgres):
    with create_store(address, 2, 4) as store:
        with psycopg.connect(postgres, autocommit=True) as other:
            table = store._table.as_string(other)
            other.execute(f"ALTER TABLE {table} ADD CHECK (id <> 'd7')")
        for write in (store.add, store.upsert):
            with pytest.raises(psycopg.errors.CheckViolation):
                write(vectors(0, 9, 2, 4), names(9))
            assert len(store) == 0
        store.add(vectors(0, 7, 2, 4), names(7))
        assert len(store) == 7


def test_the_first_stage_reads_the_graph_and_filters_read_the_columns(address, postgres):
    with create_store(address, 2, 8, filters={"lang": "text", "page": "number"}) as store:
        store.add(vectors(0, 500, 2, 8), names(500), [{"lang": f"l{i}", "page": i} for i in range(500)])
        steps = [store._step(vectors(1, 1, 2, 8), stage) for stage in store._stages(2, None, [((1, 1), 20)], 5)]

        def plan(statement, values):
            with store._session() as connection:
                connection.execute("SET LOCAL enable_seqscan = off")
                rows = connection.execute(psycopg.sql.SQL("EXPLAIN ") + statement, values).fetchall()
            return "\n".join(row[0] for row in rows)

        assert "v1_idx" in plan(*store._cascade(steps, 0, engine.Selection()))
        for where, used in (
            ({"lang": {"$in": ["l3", "l4"]}}, "meta_lang_idx"),
            ({"page": {"$lt": 3}}, "meta_page_idx"),
        ):
            condition, values = store._where(engine.Selection(where))
            assert used in plan(psycopg.sql.SQL("SELECT id FROM {} {}").format(store._table, condition), values)
        # The graph is scanned on until enough documents match.
        with store._session() as connection:
            connection.execute("SET enable_seqscan = off")
            connection.execute("SET enable_sort = off")
        assert (
            len(store.search(vectors(1, 1, 2, 8), k=5, stages=[((1, 1), 5)], where={"page": {"$gte": 495}}).ids[0])
            == 5
        )


def test_names_and_values_are_never_sql(postgres):
    table = f'x"; DROP TABLE t; -- {uuid.uuid4().hex[:6]}'
    from urllib.parse import quote

    address = f"{postgres}&table={quote(table)}"
    key = """it's "quoted"; DROP""".replace('"', "")
    with create_store(address, 2, 4, filters={key: "text"}) as store:
        store.add(vectors(0, 2, 2, 4), ["'; DROP TABLE t; --", "b"], [{key: "' OR true --"}, {key: "%s {}"}])
        assert store.search(vectors(1, 2, 4), where={key: "' OR true --"}).ids == [["'; DROP TABLE t; --"]]
        assert store.search(vectors(1, 2, 4), where={key: "%s {}", "o'x%(a)s{0}": None}).ids == [["b"]]
        assert store.delete(["'; DROP TABLE t; --"]) == 1
    assert len(open_store(address)) == 1


def test_a_connection_that_was_lost_is_opened_again(address, postgres, monkeypatch):
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: None)
    with create_store(address, 2, 4) as store:
        store.add(vectors(0, 2, 2, 4), names(2))
        for use in (lambda: len(store), lambda: store.upsert(vectors(0, 2, 2, 4), names(2))):
            with psycopg.connect(postgres, autocommit=True) as other:
                pid = store._connection.info.backend_pid
                other.execute("SELECT pg_terminate_backend(%s)", (pid,))
            use()
        assert len(store) == 2


def test_threads_and_writers_of_the_same_documents_do_not_disturb_each_other(address):
    x, wrong = vectors(0, 20, 2, 4), []
    create_store(address, 2, 4).close()

    def write(seed, store):
        try:
            order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
            for _ in range(3):
                store.upsert(x[order], [f"d{i}" for i in order])
                assert store.search(x[3], k=1).ids == [["d3"]]
        except BaseException as error:
            wrong.append(error)

    shared = open_store(address)
    stores = [shared, shared, open_store(address), open_store(address)]
    threads = [threading.Thread(target=write, args=(i, store)) for i, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(shared) == 20


@pytest.mark.parametrize("dim, quantization", [(2_100, "float32"), (2_100, "float16"), (16, "float16")])
def test_many_dimensions_and_half_the_disk(address, dim, quantization):
    x = vectors(0, 12, 3, dim)
    with create_store(address, 3, dim, quantization=quantization) as store:
        store.add(x, names(12))
        found = store.search(x[:4], k=1, stages=[((1, 1), 12)])
        assert [ids[0] for ids in found.ids] == names(4)
        torch.testing.assert_close(found.scores, torch.full((4, 1), 3.0), atol=3e-3, rtol=0)
        torch.testing.assert_close(store.get(["d2"])[0].embedding, x[2], atol=1e-3, rtol=0)


def test_what_is_beyond_a_limit_is_not_sent_and_the_message_says_what_to_do(address, postgres):
    with pytest.raises(ValueError, match="4000 dimensions at most, not 4096; keep fewer with fit_pca"):
        create_store(address, 64, 4096)
    with pytest.raises(ValueError, match="PostgreSQL takes 1 GB"):
        create_store(address, 1 << 17, 4000)
    with pytest.raises(ValueError, match="'float32' or 'float16'"):
        create_store(address, 4, 16, quantization="int8")
    for table in ("", "&table=", "&table=a.b.c", "&table=a&table=b"):
        with pytest.raises(ValueError, match="table=TABLE"):
            create_store(postgres + table, 4, 16)
    with pytest.raises(ValueError, match="63 bytes"):
        create_store(f"{postgres}&table={'x' * 64}", 4, 16)
    with pytest.raises(ValueError, match="63 bytes"):
        create_store(address, 4, 16, filters={"x" * 60: "text"})
    with psycopg.connect(postgres, autocommit=True) as other:
        other.execute("CREATE TABLE IF NOT EXISTS ordinary (id text)")
    with pytest.raises(ValueError, match="'ordinary' is no store"):
        open_store(f"{postgres}&table=ordinary")
    with pytest.raises(ConnectionError, match="did not answer in 2 attempts"):
        open_store("postgresql://127.0.0.1:9/x?table=pages", attempts=2)


def test_a_user_without_rights_gets_a_permission_error(address, postgres):
    role = f"r{uuid.uuid4().hex[:8]}"
    create_store(address, 2, 4).close()
    with psycopg.connect(postgres, autocommit=True) as other:
        other.execute(f"CREATE ROLE {role} LOGIN")
        other.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    with open_store(address.replace("postgres:@", f"{role}:@")) as store:
        assert len(store) == 0
        with pytest.raises(PermissionError):
            store.add(vectors(0, 1, 2, 4), ["a"])

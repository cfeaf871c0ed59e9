"""Embeddings of MetaEmbed in LanceDB, searched by a cascade of two calls: pip install lancedb.

table = make_table(lancedb.connect("pages.lance"), "pages", documents, ids)
found = search(table, query, k=10, keep=200)
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from lancedb.index import BTree
from torch import Tensor


def make_table(database: Any, name: str, documents: Tensor, ids: Sequence[str]) -> Any:
    """Create a table of documents `[n, r, D]`: the first vector, and all of them as one multivector."""
    vector = pa.list_(pa.float32(), documents.shape[2])
    schema = pa.schema({"id": pa.string(), "first": vector, "all": pa.list_(vector)})
    table = database.create_table(name, schema=schema)
    for start in range(0, len(documents), 1000):
        part = documents[start : start + 1000].float()
        columns = {"id": list(ids[start : start + 1000]), "first": part[:, 0].tolist(), "all": part.tolist()}
        table.add(pa.table(columns, schema=schema))
    table.create_index("id", config=BTree())
    # From about 100,000 documents on: table.create_index(metric="cosine", vector_column_name="first")
    return table


def search(table: Any, query: Tensor, k: int = 10, keep: int = 200, where: str | None = None) -> list[dict[str, Any]]:
    """Search with a query `[r, D]`: its first vector finds `keep` documents, and all vectors order them.

    LanceDB compares multivectors by cosine, which is the same for the unit vectors of MetaEmbed.
    """
    first = table.search(query[0].tolist(), vector_column_name="first").distance_type("cosine").limit(keep)
    if where:
        first = first.where(where, prefilter=True)
    ids = ", ".join("'" + id.replace("'", "''") + "'" for id in first.select(["id"]).to_arrow()["id"].to_pylist())
    if not ids:
        return []
    best = table.search(query.tolist(), vector_column_name="all").distance_type("cosine").limit(k)
    return best.where(f"id IN ({ids})", prefilter=True).select(["id"]).to_list()

"""docs/cluster.md runs as it is written, and its tables are what the commands print."""

import argparse
import re
import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")


def test_the_examples_of_the_stores_run(qdrant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embeddings = normalize(torch.randn(20, 64, 128, generator=torch.Generator().manual_seed(0)), dim=-1)
    ids, metadata = [f"page {i}" for i in range(20)], [{"lang": "en", "page": i} for i in range(20)]
    given = {"embeddings": embeddings, "ids": ids, "metadata": metadata, "queries": embeddings[:2, :16]}
    given["batches"] = [(embeddings, ids, metadata)]
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block.replace("http://localhost:6333", qdrant.url), given)
        assert len(given["store"]) == (0 if "localhost" in block else 20 if "Ledger" in block else 19)


def test_the_arithmetic_of_the_tables_is_what_the_script_computes(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples/qdrant_cluster"), *sys.path])
    from plan import plan

    for changed in ({}, {"half": True, "quantization": "binary"}, {"half": True, "vectors": 16}):
        options = {"vectors": 64, "dim": 128, "replicas": 2, "quantization": "int8", "half": False}
        options = argparse.Namespace(**options | changed, memory=64, disk=4000)
        for documents in (10**6, 10**7, 10**8, 10**9):
            assert "| " + " | ".join(plan(documents, options)) + " |" in TEXT

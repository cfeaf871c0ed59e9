"""Checkpoints that earlier versions saved load with this code and with their own, and give the same embeddings."""

from pathlib import Path

import pytest
import torch
from freeze import embeddings
from safetensors.torch import load

from metaembed import MetaEmbedModel
from metaembed.training.lora import merge_adapter

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(DATA.glob("v*"))
ADAPTERS = sorted(DATA.glob("adapter-v*"))


def check(actual, folder):
    expected = load((folder / "embeddings.bin").read_bytes())
    assert actual.keys() == expected.keys() and expected["documents"].shape == (3, 6, 8)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=0)


def test_there_are_frozen_checkpoints():
    assert [folder.name for folder in CHECKPOINTS][:2] == ["v0.1", "v0.2"]
    assert [folder.name for folder in ADAPTERS][:2] == ["adapter-v0.1", "adapter-v0.2"]


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_frozen_checkpoint_loads_with_this_code(folder):
    model = MetaEmbedModel.from_pretrained(folder)
    assert model.config.document_num_meta == 6
    check(embeddings(model), folder)


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_a_frozen_adapter_loads_with_this_code(folder, monkeypatch):
    monkeypatch.chdir(DATA)  # which has the base that it names
    model = MetaEmbedModel.from_pretrained(folder)
    assert model.adapter_base == (folder.name.removeprefix("adapter-"), None) and model.config.document_num_meta == 6
    check(embeddings(model), folder)
    merge_adapter(model)
    check(embeddings(model), folder)


@pytest.mark.slow
@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_frozen_checkpoint_loads_with_its_own_code(folder, tmp_path, fresh_process):
    """As with trust_remote_code from the Hub, on today's libraries."""
    code = """
import sys
sys.modules["metaembed"] = None
from safetensors.torch import save_file
from transformers import AutoModel
from tiny_pictures import picture
QUERIES = ["red apple", {"text": "which boat?", "image": picture(1)}]
DOCUMENTS = ["a cat", picture(3), {"text": "boat", "image": picture(4, 48, 32)}]
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
found = dict(queries=model.encode_queries(QUERIES), documents=model.encode_documents(DOCUMENTS))
save_file({**found, "short": model.encode_documents(DOCUMENTS, num_meta=2)}, sys.argv[2])
"""
    fresh_process("-c", code, folder, tmp_path / "found", path=[Path(__file__).parent]).check_returncode()
    check(load((tmp_path / "found").read_bytes()), folder)

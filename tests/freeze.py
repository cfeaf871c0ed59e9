"""Freeze a tiny checkpoint, or an adapter on one, and its embeddings for later versions to load.

    python tests/freeze.py tests/data/v0.1
    python tests/freeze.py tests/data/adapter-v0.1 tests/data/v0.1

The adapter names its base by the folder's name, so it loads from the folder that has both. It has no code of its own.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import tiny_model
from tiny_pictures import picture

from metaembed import MetaEmbedModel
from metaembed.training.lora import lora_config

QUERIES = ["red apple", {"text": "which boat?", "image": picture(1)}]
DOCUMENTS = ["a cat", picture(3), {"text": "boat", "image": picture(4, 48, 32)}]


def embeddings(model):
    return {
        "queries": model.encode_queries(QUERIES),
        "documents": model.encode_documents(DOCUMENTS),
        "short": model.encode_documents(DOCUMENTS, num_meta=2),
    }


def checkpoint():
    model = tiny_model(layers=1, embedding_dim=8, query_instruction="Find it.")
    model.config.document_num_meta = 6
    return model


def adapter(base):
    model = MetaEmbedModel.from_pretrained(base)
    model.adapter_base = (base.name, None)
    model.add_adapter(lora_config(model, r=2))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


if __name__ == "__main__":
    folder, *base = map(Path, sys.argv[1:])
    model = adapter(*base) if base else checkpoint()
    model.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in embeddings(model).items()}, folder / "embeddings.bin")
    for path in [*folder.glob("*.py"), folder / "README.md"] if base else []:
        path.unlink()

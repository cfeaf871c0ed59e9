"""Freeze a tiny checkpoint and its embeddings for later versions to load: `python tests/freeze.py tests/data/v0.1`."""

import sys
from pathlib import Path

from safetensors.torch import save_file
from tiny_models import tiny_model
from tiny_pictures import picture

QUERIES = ["red apple", {"text": "which boat?", "image": picture(1)}]
DOCUMENTS = ["a cat", picture(3), {"text": "boat", "image": picture(4, 48, 32)}]


def embeddings(model):
    return {
        "queries": model.encode_queries(QUERIES),
        "documents": model.encode_documents(DOCUMENTS),
        "short": model.encode_documents(DOCUMENTS, num_meta=2),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model = tiny_model(layers=1, embedding_dim=8, query_instruction="Find it.")
    model.config.document_num_meta = 6
    model.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in embeddings(model).items()}, folder / "embeddings.bin")

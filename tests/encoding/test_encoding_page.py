"""The examples of docs/encoding.md run as they are written."""

import torch
from test_docs import run_blocks
from tiny_models import picture, tiny_model

from metaembed.retrieval.index import MultiVectorIndex


def test_the_examples_of_the_page_run(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    model = tiny_model(num_document_tokens=16)
    index = MultiVectorIndex.create(None, vectors=16, dim=32, quantization="float32")
    names = run_blocks("encoding.md", model=model, pages=paths, paths=paths, index=index)
    assert index.ids == [str(path) for path in paths]
    torch.testing.assert_close(names["documents"], model.encode_documents(paths), atol=1e-5, rtol=0)

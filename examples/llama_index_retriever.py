"""A retriever for LlamaIndex over a model and a store of MetaEmbed: pip install llama-index-core.

retriever = MetaEmbedRetriever(model, open_store("pages/"), k=5, budget=(4, 8))
nodes = retriever.retrieve("a red apple")
"""

from pathlib import Path
from typing import Any

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode


class MetaEmbedRetriever(BaseRetriever):
    """Finds nodes for a question, which may have an image (`QueryBundle.image_path`).

    Args:
        model: A `MetaEmbedModel`, or anything with its `encode_queries`.
        store: A store of `metaembed.stores`, or a `MultiVectorIndex`. The text of a node is its metadata `text`.
        k: How many nodes to return.
        budget: `(query vectors, document vectors)`; `None` uses all of them.
        where: A filter of the store.
    """

    def __init__(
        self,
        model: Any,
        store: Any,
        k: int = 4,
        budget: tuple[int, int] | None = None,
        where: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model, self.store, self.k, self.budget, self.where = model, store, k, budget, where

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        text, image = query_bundle.query_str, query_bundle.image_path
        query = {"text": text, "image": Path(image)} if image else text
        num_meta = self.budget[0] if self.budget else None
        embedding = self.model.encode_queries(query, num_meta=num_meta)
        hits = self.store.search(embedding, self.k, self.budget, where=self.where)
        return [
            NodeWithScore(node=TextNode(id_=id, text=str(metadata.get("text", "")), metadata=metadata), score=score)
            for id, metadata, score in zip(hits.ids[0], hits.metadata[0], hits.scores[0].tolist(), strict=True)
        ]

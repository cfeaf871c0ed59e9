"""A component for Haystack over a model and a store of MetaEmbed: pip install haystack-ai.

pipeline = Pipeline()
pipeline.add_component("retriever", MetaEmbedRetriever(model, open_store("pages/"), k=5, budget=(4, 8)))
documents = pipeline.run({"retriever": {"query": "a red apple"}})["retriever"]["documents"]
"""

from typing import Any

from haystack import Document, component


@component
class MetaEmbedRetriever:
    """Finds documents for a question. Their content is the metadata `text`, if there is such.

    Args:
        model: A `MetaEmbedModel`, or anything with its `encode_queries`.
        store: A store of `metaembed.stores`, or a `MultiVectorIndex`.
        k: How many documents to return.
        budget: `(query vectors, document vectors)`; `None` uses all of them.
    """

    def __init__(self, model: Any, store: Any, k: int = 4, budget: tuple[int, int] | None = None):
        self.model, self.store, self.k, self.budget = model, store, k, budget

    @component.output_types(documents=list[Document])
    def run(self, query: str, k: int | None = None, where: dict[str, Any] | None = None) -> dict[str, list[Document]]:
        """Search, with another `k` or a filter of the store if they are given."""
        num_meta = self.budget[0] if self.budget else None
        embedding = self.model.encode_queries(query, num_meta=num_meta)
        hits = self.store.search(embedding, k or self.k, self.budget, where=where)
        return {
            "documents": [
                Document(id=id, content=metadata.get("text"), meta=metadata, score=score)
                for id, metadata, score in zip(hits.ids[0], hits.metadata[0], hits.scores[0].tolist(), strict=True)
            ]
        }

"""A retriever for LangChain over a model and a store of MetaEmbed: pip install langchain-core.

retriever = MetaEmbedRetriever(model=model, store=open_store("pages/"), k=5, budget=(4, 8))
documents = retriever.invoke("a red apple")
"""

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever


class MetaEmbedRetriever(BaseRetriever):
    """Finds documents for a question. Their page content is the metadata `text`, if there is such.

    Attributes:
        model: A `MetaEmbedModel`, or anything with its `encode_queries`.
        store: A store of `metaembed.stores`, or a `MultiVectorIndex`.
        k: How many documents to return.
        budget: `(query vectors, document vectors)`; `None` uses all of them.
        where: A filter of the store.
    """

    model: Any
    store: Any
    k: int = 4
    budget: tuple[int, int] | None = None
    where: dict[str, Any] | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun | None = None, **search: Any
    ) -> list[Document]:
        """Search; `k`, `budget`, `where` and other arguments of the store may be given to `invoke` too."""
        options = {"k": self.k, "budget": self.budget, "where": self.where} | search
        num_meta = options["budget"][0] if options["budget"] else None
        hits = self.store.search(self.model.encode_queries(query, num_meta=num_meta), **options)
        return [
            Document(id=id, page_content=str(metadata.get("text", "")), metadata={**metadata, "score": score})
            for id, metadata, score in zip(hits.ids[0], hits.metadata[0], hits.scores[0].tolist(), strict=True)
        ]

"""Keeping the embeddings of documents, and searching them at any budget."""

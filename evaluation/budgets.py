"""Retrieval quality at every budget, from one encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from torch import Tensor

from ..retrieval.pooling import pool
from ..scoring_metaembed import maxsim
from .tables import markdown_table

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder


class TokenDocuments(NamedTuple):
    """The vectors of documents: of Meta Tokens [N, r, D], of all tokens [N, T, D], and pooled ones [N, n, D]."""

    meta: Tensor
    tokens: Tensor
    pooled: Tensor | None


def score_meta(queries: Tensor, documents: Tensor | TokenDocuments, budget: tuple[int, int]) -> Tensor:
    """Return scores [Q, N] by Meta Tokens."""
    return maxsim(queries, getattr(documents, "meta", documents), budget=budget)


def score_tokens(queries: Tensor, documents: TokenDocuments, r_q: int, size: int | bool) -> Tensor:
    """Return scores [Q, N] of the queries' tokens, which begin at `r_q`, by `size` tokens of a document."""
    vectors = documents.tokens if size is True else documents.pooled
    return maxsim(queries[:, r_q:], vectors[:, : None if size is True else size])


class BudgetEvaluator(MultiVectorInformationRetrievalEvaluator):
    """Measures information retrieval at every budget: encodes once, and scores each budget's prefixes.

    Args:
        queries: Query ids to queries.
        corpus: Document ids to documents.
        relevant_docs: Query ids to the ids of their relevant documents.
        budgets: `(r_q, r_c)` pairs, smallest first.
        tokens: Numbers of pooled token vectors of a document, smallest first, to score against all tokens of a query,
            for a model with a `token_projection`; True stands for all tokens of the document, not pooled.
        **kwargs: For `MultiVectorInformationRetrievalEvaluator` (`name`, `batch_size`, `ndcg_at_k`, ...).

    Raises:
        ValueError: If there are no budgets.

    Example:
        >>> evaluator = BudgetEvaluator(queries, corpus, relevant, budgets=model.config.budgets, name="val")
        >>> results = evaluator(encoder)
        >>> results["val_4x8_ndcg@10"], results["val_16x64_ndcg@10"]
        >>> dial = BudgetEvaluator(queries, corpus, relevant, model.config.budgets, tokens=[16, True])
        >>> dial(encoder)["tokens16_ndcg@10"]
    """

    def __init__(
        self,
        queries: Mapping[str, Any],
        corpus: Mapping[str, Any],
        relevant_docs: Mapping[str, set[str]],
        budgets: Sequence[Sequence[int]],
        tokens: Sequence[int | bool] = (),
        **kwargs: Any,
    ):
        if not budgets:
            raise ValueError("budgets must name at least one (r_q, r_c) pair.")
        self.budgets = [(int(r_q), int(r_c)) for r_q, r_c in budgets]
        scores = {f"{r_q}x{r_c}": partial(score_meta, budget=(r_q, r_c)) for r_q, r_c in self.budgets}
        self.tokens = {"tokens" if size is True else f"tokens{int(size)}": size for size in tokens}
        r_q = max(r_q for r_q, _ in self.budgets)
        scores |= {name: partial(score_tokens, r_q=r_q, size=size) for name, size in self.tokens.items()}
        super().__init__(dict(queries), dict(corpus), dict(relevant_docs), score_functions=scores, **kwargs)
        # The best checkpoint is the best at the largest size.
        largest = [*("x".join(map(str, budget)) for budget in self.budgets), *self.tokens][-1]
        self.primary_metric = f"{largest}_ndcg@{max(self.ndcg_at_k)}"

    def embed_inputs(
        self, model: MultiVectorEncoder, sentences: Any, encode_fn_name: str | None = None, **kwargs: Any
    ):
        """Encode with as many vectors as the largest budget needs, for any defaults of the model.

        Returns:
            Vectors [N, r, D]; if tokens are scored, of queries [Q, r + T, D], padded with rows of zeros, and of
            documents [`TokenDocuments`].
        """
        r_q, r_c = (max(sizes) for sizes in zip(*self.budgets, strict=True))
        num_meta = r_q if encode_fn_name == "query" else r_c
        if not self.tokens:
            embeddings = super().embed_inputs(model, sentences, encode_fn_name, num_meta=num_meta, **kwargs)
            return torch.stack(list(embeddings))
        embeddings = super().embed_inputs(model, sentences, encode_fn_name, num_meta=num_meta, tokens=True, **kwargs)
        if encode_fn_name == "query":
            return embeddings
        own = [rows[r_c:] if len(rows) > r_c else torch.zeros_like(rows[:1]) for rows in embeddings]
        most = max((size for size in self.tokens.values() if size is not True), default=0)
        longest = torch.arange(max(map(len, own)))
        return TokenDocuments(
            meta=torch.stack([rows[:r_c] for rows in embeddings]),
            tokens=torch.stack([rows[longest % len(rows)] for rows in own]),  # repeated vectors change no score
            pooled=pool(own, most) if most else None,
        )

    def budget_metrics(self, results: Mapping[str, float]) -> dict[tuple[int, int], dict[str, float]]:
        """Return the metrics of each budget (`{(4, 8): {"ndcg@10": 0.5, ...}, ...}`) from what a call returned."""
        return {(r_q, r_c): self._metrics(results, f"{r_q}x{r_c}") for r_q, r_c in self.budgets}

    def token_metrics(self, results: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return the metrics of each number of token vectors (`{"tokens16": {...}, "tokens": {...}}`)."""
        return {name: self._metrics(results, name) for name in self.tokens}

    def _metrics(self, results: Mapping[str, float], size: str) -> dict[str, float]:
        start = f"{self.name}_{size}_" if self.name else f"{size}_"
        return {name.removeprefix(start): value for name, value in results.items() if name.startswith(start)}

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        return {"budgets": self.budgets, **({"tokens": list(self.tokens.values())} if self.tokens else {})}


def budget_table(metrics: Mapping[Any, Mapping[str, float]], names: Sequence[str]) -> str:
    """Return a Markdown table of the metrics `names` at each budget, or number of token vectors."""
    rows = ([budget, *(f"{values[name]:.4f}" for name in names)] for budget, values in metrics.items())
    return markdown_table(["budget", *names], rows)

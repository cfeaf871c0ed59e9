"""Retrieval quality at every budget, from one encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator

from ..scoring_metaembed import maxsim
from .tables import markdown_table

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder


class BudgetEvaluator(MultiVectorInformationRetrievalEvaluator):
    """Measures information retrieval at every budget: encodes once, and scores each budget's prefixes.

    Args:
        queries: Query ids to queries.
        corpus: Document ids to documents.
        relevant_docs: Query ids to the ids of their relevant documents.
        budgets: `(r_q, r_c)` pairs, smallest first.
        **kwargs: For `MultiVectorInformationRetrievalEvaluator` (`name`, `batch_size`, `ndcg_at_k`, ...).

    Raises:
        ValueError: If there are no budgets.

    Example:
        >>> evaluator = BudgetEvaluator(queries, corpus, relevant, budgets=model.config.budgets, name="val")
        >>> results = evaluator(encoder)
        >>> results["val_4x8_ndcg@10"], results["val_16x64_ndcg@10"]
    """

    def __init__(
        self,
        queries: Mapping[str, Any],
        corpus: Mapping[str, Any],
        relevant_docs: Mapping[str, set[str]],
        budgets: Sequence[Sequence[int]],
        **kwargs: Any,
    ):
        if not budgets:
            raise ValueError("budgets must name at least one (r_q, r_c) pair.")
        self.budgets = [(int(r_q), int(r_c)) for r_q, r_c in budgets]
        scores = {f"{r_q}x{r_c}": partial(maxsim, budget=(r_q, r_c)) for r_q, r_c in self.budgets}
        super().__init__(dict(queries), dict(corpus), dict(relevant_docs), score_functions=scores, **kwargs)
        # The best checkpoint is the best at the largest budget.
        self.primary_metric = f"{'x'.join(map(str, self.budgets[-1]))}_ndcg@{max(self.ndcg_at_k)}"

    def embed_inputs(
        self, model: MultiVectorEncoder, sentences: Any, encode_fn_name: str | None = None, **kwargs: Any
    ):
        """Encode with as many vectors as the largest budget needs, for any defaults of the model.

        Returns:
            Vectors [N, r, D].
        """
        r_q, r_c = (max(sizes) for sizes in zip(*self.budgets, strict=True))
        num_meta = r_q if encode_fn_name == "query" else r_c
        embeddings = super().embed_inputs(model, sentences, encode_fn_name, num_meta=num_meta, **kwargs)
        return torch.stack(list(embeddings))

    def budget_metrics(self, results: Mapping[str, float]) -> dict[tuple[int, int], dict[str, float]]:
        """Return the metrics of each budget (`{(4, 8): {"ndcg@10": 0.5, ...}, ...}`) from what a call returned."""
        prefix = f"{self.name}_" if self.name else ""
        metrics: dict[tuple[int, int], dict[str, float]] = {}
        for r_q, r_c in self.budgets:
            start = f"{prefix}{r_q}x{r_c}_"
            metrics[r_q, r_c] = {
                name.removeprefix(start): value for name, value in results.items() if name.startswith(start)
            }
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        return {"budgets": self.budgets}


def budget_table(metrics: Mapping[tuple[int, int], Mapping[str, float]], names: Sequence[str]) -> str:
    """Return a Markdown table of the metrics `names` at each budget."""
    rows = ([budget, *(f"{values[name]:.4f}" for name in names)] for budget, values in metrics.items())
    return markdown_table(["budget", *names], rows)

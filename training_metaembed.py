"""Matryoshka Multi-Vector Retrieval training: one contrastive loss for every budget at once, from one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns_padded
from torch import Tensor, nn

from .configuration_metaembed import check_budgets

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

Normalize = Literal["sum", "mean", "sqrt"]


def mmr_scores(sims: Tensor, budget: tuple[int, int], normalize: Normalize) -> Tensor:
    """Return the late interaction scores at one budget, from the similarities of all vectors.

    Args:
        sims: Similarities [Q, R_q, M, R_c] of the vectors of Q queries and M documents.
        budget: `(r_q, r_c)`: the first vectors that count.
        normalize: "sum" over the query vectors (the paper's), "mean" over them, or the sum divided by "sqrt" of r_q.

    Returns:
        Scores [Q, M].
    """
    r_q, r_c = budget
    summed = sims[:, :r_q, :, :r_c].max(dim=-1).values.sum(dim=1)  # [Q, M]
    return summed / {"sum": 1, "mean": r_q, "sqrt": r_q**0.5}[normalize]


class MMRLoss(nn.Module):
    """Matryoshka Multi-Vector Retrieval loss (arXiv 2509.18095), for sentence-transformers' trainer.

    `L = sum_g w_g * InfoNCE_g` over the budgets `g`, with logits `s_g / temperature`. The negatives of a query are all
    other documents of the batch, and the hard negatives of every query.

    Args:
        model: The encoder, whose first module is a `MetaEmbedTransformer`.
        budgets: `(r_q, r_c)` pairs: nested, strictly growing; the largest need not be the full size. None: those of the
            model's configuration.
        weights: w_g, one a budget. None: 1 each.
        temperature: tau. 0.03 in the paper.
        normalize: What a score is divided by before the temperature. "sum": nothing, the paper's logit; "mean": the
            number of query vectors; "sqrt": its root. The default is what did best over six seeds on the task of
            `examples/quickstart.py`: a sum over 16 vectors is 16 times as sharp as over one, the root lies between.

    Raises:
        TypeError: If the model is not a MetaEmbed encoder, or a budget is not a pair of whole numbers.
        ValueError: If budgets, weights, temperature or normalize cannot be used.

    Inputs:
        Columns (query, positive), (query, positive, negative) or (query, positive, negative_1, ..., negative_n).

    Example:
        >>> loss = MMRLoss(encoder)
        >>> MultiVectorEncoderTrainer(model=encoder, train_dataset=dataset, loss=loss).train()
    """

    def __init__(
        self,
        model: MultiVectorEncoder,
        budgets: Sequence[tuple[int, int]] | None = None,
        weights: Sequence[float] | None = None,
        temperature: float = 0.03,
        normalize: Normalize = "sqrt",
    ):
        super().__init__()
        config: Any = getattr(getattr(model[0], "model", None), "config", None)
        if getattr(config, "model_type", None) != "metaembed":
            raise TypeError(
                f"MMRLoss trains MetaEmbed encoders, got one of {type(model[0]).__name__}. Make one with "
                "to_multi_vector_encoder(model), or load one with MultiVectorEncoder(...)."
            )
        sizes = (config.num_query_tokens, config.num_document_tokens)
        budgets = check_budgets(config.budgets if budgets is None else budgets, *sizes, complete=False)
        weights = [1.0] * len(budgets) if weights is None else list(weights)
        if len(weights) != len(budgets) or any(not weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ValueError(f"weights must be {len(budgets)} numbers >= 0, one a budget, not all 0; got {weights}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        if normalize not in ("sum", "mean", "sqrt"):
            raise ValueError(f'normalize must be "sum", "mean" or "sqrt", got {normalize!r}.')
        self.model = model
        self.budgets = [(r_q, r_c) for r_q, r_c in budgets]
        self.weights = weights
        self.temperature = temperature
        self.normalize = normalize

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        names = ("budgets", "weights", "temperature", "normalize")
        return {name: getattr(self, name) for name in names}

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the weighted loss of each budget, which the trainer sums and logs.

        Args:
            sentence_features: The columns: queries, positives, and any number of hard negatives.
            labels: Ignored.

        Returns:
            `{"loss_1x1": w_1 * InfoNCE_1, ...}`, scalars.
        """
        columns = [dict(features) for features in sentence_features]
        queries = self.model(columns[0], task="query")["token_embeddings"]  # [B, R_q, D]
        documents = torch.cat(embed_columns_padded(self.model, columns[1:], task_default="document")[0])  # [M, R_c, D]
        return self.losses(queries, documents, torch.arange(len(queries), device=queries.device))

    def losses(self, queries: Tensor, documents: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss of each budget.

        Args:
            queries: Query vectors [Q, R_q, D].
            documents: Document vectors [M, R_c, D], of all queries.
            targets: Index [Q] of each query's own document.

        Returns:
            A scalar a budget.

        Raises:
            ValueError: If the vectors are fewer than the largest budget needs.
        """
        r_q, r_c = self.budgets[-1]
        if queries.shape[1] < r_q or documents.shape[1] < r_c:
            raise ValueError(
                f"training at {self.budgets[-1]} needs as many vectors, got {queries.shape[1]} a query and "
                f"{documents.shape[1]} a document. Set query_num_meta and document_num_meta of encoder[0] to None."
            )
        sims = torch.einsum("qid,mjd->qimj", queries[:, :r_q], documents[:, :r_c])  # [Q, r_q, M, r_c]
        losses = {}
        for budget, weight in zip(self.budgets, self.weights, strict=True):
            logits = mmr_scores(sims, budget, self.normalize) / self.temperature  # [Q, M]
            losses[f"loss_{budget[0]}x{budget[1]}"] = weight * nn.functional.cross_entropy(logits, targets)
        return losses

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return """
@inproceedings{xiao2026metaembed,
    title={MetaEmbed: Scaling Multimodal Retrieval at Test-Time with Flexible Late Interaction},
    author={Xiao, Zilin and others},
    booktitle={International Conference on Learning Representations},
    year={2026},
    url={https://arxiv.org/abs/2509.18095}
}
"""

"""A small model that makes the query vectors of a large one: queries cost less, the index stays as it is.

Encoding a query is most of the cost of a search. Documents are encoded once, by the large model (the teacher), and
never again; the small one (the student) learns to put text queries where the teacher puts them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..configuration_metaembed import check_count
from .losses import encoder_config, mmr_scores, warn_of_half_precision

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoder

    from ..modeling_metaembed import MetaEmbedModel


def shallow(teacher: MetaEmbedModel, layers: int) -> MetaEmbedModel:
    """Return a student made of the first `layers` layers of the teacher's language model, with all else as it is.

    Another student is any model of `MetaEmbedModel.from_backbone` with as many query Meta Tokens and as large vectors
    as the teacher: a small text encoder with `embedding_dim` set.

    Args:
        teacher: The trained model; not changed.
        layers: How many layers to keep.

    Raises:
        TypeError: If `layers` is not a whole number.
        ValueError: If the teacher has fewer layers, or the weights of a model of fewer layers are not among its own.
    """
    config = copy.deepcopy(teacher.config)
    text = config.backbone_config.get_text_config()
    most = text.num_hidden_layers
    check_count("layers", layers, most)
    for name, value in vars(text).items():  # such as the kind of attention of each layer
        if isinstance(value, list) and len(value) == most:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    student = type(teacher)(config)
    weights = teacher.state_dict()
    if missing := student.state_dict().keys() - weights.keys():
        raise ValueError(f"the teacher has no weights for {sorted(missing)[0]}: it cannot be made shallower.")
    student.load_state_dict({name: weights[name] for name in student.state_dict()})
    student.to(teacher.device, teacher.dtype)
    student.processor = copy.deepcopy(teacher.processor)
    return student.eval()


def query_dataset(teacher: MetaEmbedModel, queries: Sequence[str], **kwargs: Any) -> Dataset:
    """Return a dataset of queries and the teacher's vectors of each, for [`QueryDistillationLoss`].

    Args:
        teacher: The trained model.
        queries: Texts such as users write; no documents are needed.
        **kwargs: For the teacher's `encode_queries`.
    """
    from datasets import Dataset

    vectors = teacher.encode_queries(list(queries), convert_to_numpy=True, **kwargs)  # [N, R_q, D]
    return Dataset.from_dict({"query": list(queries), "label": vectors.reshape(len(vectors), -1)})


class QueryDistillationLoss(nn.Module):
    """Trains a student to make a teacher's query vectors, for sentence-transformers' trainer.

    The loss is the mean of `1 - <student, teacher>` over the query vectors, and, with `documents`, at each budget the
    divergence of the student's ranking of these documents from the teacher's (KL of softmax(scores / temperature)).

    Args:
        model: The student's encoder.
        documents: Vectors of some documents of the index [M, R_c, D], a thousand or so. None: only the first part.
        temperature: Of the rankings.
        sample: How many of the documents each batch ranks.

    Raises:
        TypeError: If the model is not a MetaEmbed encoder, or `sample` is not a whole number.
        ValueError: If documents are not [M, R_c, D] with the vectors of the student's budgets.

    Warns:
        UserWarning: If the weights to train are float16 or bfloat16, in which they hardly change.

    Inputs:
        Column "query", and "label" with the teacher's vectors, as [`query_dataset`] makes them.

    Example:
        >>> student = shallow(teacher, layers=4).to_sentence_transformers()
        >>> loss = QueryDistillationLoss(student, documents=index_vectors)
        >>> data = query_dataset(teacher, queries)
        >>> MultiVectorEncoderTrainer(model=student, train_dataset=data, loss=loss).train()
    """

    def __init__(
        self,
        model: MultiVectorEncoder,
        documents: Tensor | None = None,
        temperature: float = 0.03,
        sample: int = 256,
    ):
        super().__init__()
        config = encoder_config(model)
        self.budgets = [tuple(budget) for budget in config.budgets]
        dim = config.embedding_dim or config.hidden_size
        if documents is not None and (documents.ndim != 3 or documents.shape[1:] != (self.budgets[-1][1], dim)):
            wanted, got = f"[M, {self.budgets[-1][1]}, {dim}]", list(documents.shape)
            raise ValueError(f"documents must be {wanted}, as the teacher encodes them, got {got}.")
        check_count("sample", sample, 1_000_000)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        warn_of_half_precision(model)
        self.model, self.temperature, self.sample = model, temperature, sample
        self.register_buffer("documents", documents, persistent=False)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> dict[str, Tensor]:
        """Return the parts of the loss, which the trainer sums and logs.

        Args:
            sentence_features: The queries, the only column.
            labels: The teacher's vectors [N, R_q * D].

        Returns:
            `{"loss_vectors": ..., "loss_ranking": ...}`, scalars.

        Raises:
            ValueError: If the student makes other vectors than the teacher.
        """
        (features,) = sentence_features
        own = self.model(dict(features), task="query")["token_embeddings"].float()  # [N, R_q, D]
        if labels.shape[-1] != own[0].numel():
            raise ValueError(
                f"the student makes {own.shape[1]} vectors of {own.shape[2]} dimensions, and the teacher's are "
                f"{labels.shape[-1]} numbers. Give the student the teacher's num_query_tokens and embedding_dim."
            )
        wanted = labels.view_as(own).to(own.dtype)
        losses = {"loss_vectors": (1 - (own * wanted).sum(dim=-1)).mean()}
        if self.documents is not None:
            chosen = torch.randperm(len(self.documents), device=own.device)[: self.sample]
            documents = self.documents[chosen].to(own.device, own.dtype)
            parts = []
            for budget in self.budgets:
                student, teacher = (
                    torch.log_softmax(mmr_scores(side, documents, budget, "sqrt") / self.temperature, dim=1)
                    for side in (own, wanted)
                )
                parts.append(nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True))
            losses["loss_ranking"] = torch.stack(parts).mean()
        return losses

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        ranked = 0 if self.documents is None else self.sample
        return {"temperature": self.temperature, "documents ranked in a batch": ranked}

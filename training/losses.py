"""Matryoshka Multi-Vector Retrieval training: one contrastive loss for every budget at once, from one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns_padded
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.util import all_gather, get_rank
from torch import Tensor, nn

from ..configuration_metaembed import MetaEmbedConfig, check_budgets, check_count

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

Normalize = Literal["sum", "mean", "sqrt"]
MAX_BATCH = 1_000_000


def mmr_scores(queries: Tensor, documents: Tensor, budget: tuple[int, int], normalize: Normalize) -> Tensor:
    """Return the late interaction scores at one budget.

    Args:
        queries: Query vectors [Q, R_q, D].
        documents: Document vectors [M, R_c, D].
        budget: `(r_q, r_c)`: how many of the first vectors are scored.
        normalize: "sum" over the query vectors (as in the paper), "mean" over them, or the sum over "sqrt" of r_q.

    Returns:
        Scores [Q, M].
    """
    r_q, r_c = budget
    # One product per budget is 17% more arithmetic than one for all at the paper's budgets. In return no gradient is
    # padded with zeros to the full size, which would be five tensors as large as the largest budget's similarities.
    sims = torch.einsum("qid,mjd->qimj", queries[:, :r_q], documents[:, :r_c])  # [Q, r_q, M, r_c]
    summed = sims.max(dim=-1).values.sum(dim=1)  # [Q, M]
    return summed / {"sum": 1, "mean": r_q, "sqrt": r_q**0.5}[normalize]


def gather_documents(documents: Tensor) -> tuple[Tensor, int]:
    """Gather the documents of all ranks, with gradients.

    Args:
        documents: This rank's vectors [M, R_c, D].

    Returns:
        The vectors [ranks * M, R_c, D] of all ranks in order, and the index of this rank's first.

    Raises:
        ValueError: If the ranks have different numbers of documents.
    """
    counts = all_gather(torch.tensor([len(documents)], device=documents.device)).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"gathering needs as many documents on every rank, got {counts}. Set dataloader_drop_last=True, and give "
            "every query the same number of negatives."
        )
    gathered = all_gather(documents, with_grad=True)
    if gathered.requires_grad:  # torch's gather writes gradients of any other layout into the wrong places
        gathered.register_hook(Tensor.contiguous)
    return gathered, get_rank() * len(documents)


@dataclass(frozen=True)
class MMRSettings:
    """The settings that [`MMRLoss`] and [`CachedMMRLoss`] share, checked once.

    Args:
        budgets: `(r_q, r_c)` pairs, smallest first.
        weights: w_g, one per budget.
        temperature: tau.
        normalize: "sum", "mean" or "sqrt": see [`MMRLoss`].
        gather_across_devices: Whether the documents of all ranks are negatives.
        score_mini_batch_size: Number of queries scored at a time. None: all.

    Raises:
        TypeError: If `score_mini_batch_size` is not a whole number.
        ValueError: If a setting cannot be used.
    """

    budgets: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    temperature: float = 0.03
    normalize: Normalize = "sum"
    gather_across_devices: bool = False
    score_mini_batch_size: int | None = None

    def __post_init__(self) -> None:
        weights = self.weights
        if len(weights) != len(self.budgets) or any(not weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ValueError(
                f"weights must be {len(self.budgets)} numbers >= 0, one per budget, not all 0; got {list(weights)}."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")
        if self.normalize not in get_args(Normalize):
            raise ValueError(f'normalize must be "sum", "mean" or "sqrt", got {self.normalize!r}.')
        if self.score_mini_batch_size is not None:
            check_count("score_mini_batch_size", self.score_mini_batch_size, MAX_BATCH)

    @classmethod
    def for_encoder(
        cls,
        encoder: MultiVectorEncoder,
        budgets: Sequence[tuple[int, int]] | None,
        weights: Sequence[float] | None,
        **settings: Any,
    ) -> MMRSettings:
        """Return the settings with what is None taken from the model: all its budgets, each with weight 1.

        Raises:
            TypeError: If `encoder` is not a MetaEmbed encoder, or a budget is not a pair of whole numbers.
            ValueError: If a setting cannot be used.
        """
        config = encoder_config(encoder)
        sizes = (config.num_query_tokens, config.num_document_tokens)
        pairs = check_budgets(config.budgets if budgets is None else budgets, *sizes, complete=False)
        return cls(
            budgets=tuple((r_q, r_c) for r_q, r_c in pairs),
            weights=(1.0,) * len(pairs) if weights is None else tuple(weights),
            **settings,
        )


def encoder_config(encoder: Any) -> MetaEmbedConfig:
    """Return the configuration of the model inside `encoder`.

    Raises:
        TypeError: If it is not a MetaEmbed encoder, or is the model itself.
    """
    modules = list(encoder) if isinstance(encoder, Iterable) else []
    if not modules and is_metaembed(encoder):
        raise TypeError(
            "the loss trains an encoder, got the model inside one. Make the encoder first, and train that: "
            "encoder = to_multi_vector_encoder(model); MMRLoss(encoder)."
        )
    model = getattr(modules[0], "model", None) if modules else None
    if not is_metaembed(model):
        kind = type(modules[0] if modules else encoder).__name__
        raise TypeError(
            f"the loss trains MetaEmbed encoders, got one of {kind}. Make one with to_multi_vector_encoder(model), or "
            "load one with MultiVectorEncoder(...)."
        )
    return model.config


def is_metaembed(model: Any) -> bool:
    """Return whether `model` is a MetaEmbed model, from any copy of the code."""
    return getattr(getattr(model, "config", None), "model_type", None) == "metaembed"


def warn_of_half_precision(model: nn.Module) -> None:
    """Warn if weights to train have 16 bits, which round most training steps away."""
    halves = (torch.bfloat16, torch.float16)
    found = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} & set(halves)
    if found:
        dtype = str(found.pop()).removeprefix("torch.")
        warnings.warn(
            f"the weights to train are {dtype}: at the usual learning rates most steps are smaller than its spacing "
            "and are rounded away, so the model hardly changes. Load it with dtype=torch.float32 and train with "
            "bf16=True, which computes in bfloat16; or train LoRA with model.add_adapter(lora_config(model)).",
            UserWarning,
            stacklevel=3,
        )


class MMRObjective:
    """Computes the loss of each budget from vectors, for the plain and the cached loss."""

    settings: MMRSettings

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        return {name: value for name, value in asdict(self.settings).items() if name != "score_mini_batch_size"}

    def losses(self, queries: Tensor, documents: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss of each budget.

        Args:
            queries: Query vectors [Q, R_q, D].
            documents: Document vectors [M, R_c, D], of all queries.
            targets: Index [Q] of each query's own document.

        Returns:
            `{"loss_1x1": w_1 * InfoNCE_1, ...}`, scalars: means over the queries.

        Raises:
            ValueError: If there are fewer vectors than the largest budget needs.
        """
        totals: dict[str, Tensor] = {}
        for part in self.loss_parts(queries, documents, targets):
            totals = {name: totals[name] + value for name, value in part.items()} if totals else part
        return totals

    def loss_parts(self, queries: Tensor, documents: Tensor, targets: Tensor) -> Iterable[dict[str, Tensor]]:
        """Yield the summands of [`losses`], one per `score_mini_batch_size` queries: this bounds the memory."""
        settings = self.settings
        r_q, r_c = largest = settings.budgets[-1]
        if queries.shape[1] < r_q or documents.shape[1] < r_c:
            raise ValueError(
                f"training at {largest} needs as many vectors, got {queries.shape[1]} per query and "
                f"{documents.shape[1]} per document. Set query_num_meta and document_num_meta of encoder[0] to None."
            )
        step = settings.score_mini_batch_size or len(queries)
        for chunk, chunk_targets in zip(queries.split(step), targets.split(step), strict=True):
            part = {}
            with torch.autocast(queries.device.type, enabled=False):  # products of bfloat16 are too coarse for 1 / tau
                for budget, weight in zip(settings.budgets, settings.weights, strict=True):
                    scores = mmr_scores(chunk, documents, budget, settings.normalize)  # [step, M]
                    summed = nn.functional.cross_entropy(scores / settings.temperature, chunk_targets, reduction="sum")
                    part[f"loss_{budget[0]}x{budget[1]}"] = weight * summed / len(queries)
            yield part

    def gather(self, documents: Tensor) -> tuple[Tensor, int]:
        """Return the documents to score, of this rank or of all, and the index of this rank's first."""
        return gather_documents(documents) if self.settings.gather_across_devices else (documents, 0)


class MMRLoss(MMRObjective, nn.Module):
    """Matryoshka Multi-Vector Retrieval loss (arXiv 2509.18095), for sentence-transformers' trainer.

    `L = sum_g w_g * InfoNCE_g` over the budgets `g`, with logits `s_g / temperature`. The negatives of a query are all
    other documents of the batch, and the hard negatives of every query.

    Args:
        model: The encoder, whose first module is a `MetaEmbedTransformer`.
        budgets: `(r_q, r_c)` pairs: nested, strictly growing; they need not reach the full size. None: the model's.
        weights: w_g, one per budget. None: 1 each.
        temperature: tau. 0.03 in the paper.
        normalize: What a score is divided by before the temperature. "sum": by nothing, as in the paper; "mean": by
            the number of query vectors r_q; "sqrt": by its square root. A sum over 16 vectors gives logits 16 times
            as large as one vector does, the root 4 times: on the task of `examples/quickstart.py`, with a model
            trained from random weights, "sqrt" did best over six seeds.
        gather_across_devices: Use the documents of all ranks as negatives, not only those of this rank.
        score_mini_batch_size: Number of queries scored at a time, to bound the memory. None: all.

    Raises:
        TypeError: If the model is not a MetaEmbed encoder, or a budget is not a pair of whole numbers.
        ValueError: If budgets, weights, temperature or normalize cannot be used.

    Warns:
        UserWarning: If the weights to train are float16 or bfloat16, in which they hardly change.

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
        normalize: Normalize = "sum",
        *,
        gather_across_devices: bool = False,
        score_mini_batch_size: int | None = None,
    ):
        super().__init__()
        self.settings = MMRSettings.for_encoder(
            model,
            budgets,
            weights,
            temperature=temperature,
            normalize=normalize,
            gather_across_devices=gather_across_devices,
            score_mini_batch_size=score_mini_batch_size,
        )
        warn_of_half_precision(model)
        self.model = model

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
        documents, first = self.gather(documents)
        return self.losses(queries, documents, first + torch.arange(len(queries), device=queries.device))


class CachedMMRLoss(MMRObjective, CachedMultiVectorMultipleNegativesRankingLoss):
    """[`MMRLoss`] with gradient caching (GradCache, arXiv 2101.06983): large batches in the memory of small ones.

    The loss and the gradients are the same. Every input is encoded twice, which is about a third slower, and only
    `mini_batch_size` inputs are in memory at a time. On several GPUs, where only some inputs have images,
    sentence-transformers before 6.2 needs `ddp_find_unused_parameters=True`.

    Args:
        model: The encoder, whose first module is a `MetaEmbedTransformer`.
        budgets: See [`MMRLoss`].
        weights: See [`MMRLoss`].
        temperature: See [`MMRLoss`].
        normalize: See [`MMRLoss`].
        mini_batch_size: Number of inputs of a column encoded at a time.
        mini_batch_num_tokens: Instead, the number of tokens of a column encoded at a time.
        score_mini_batch_size: Number of queries scored at a time. None: `mini_batch_size`.
        gather_across_devices: See [`MMRLoss`].
        show_progress_bar: Show the progress within a batch.

    Raises:
        TypeError: If the model is not a MetaEmbed encoder, or a budget is not a pair of whole numbers.
        ValueError: If budgets, weights, temperature, normalize or a size cannot be used.

    Example:
        >>> loss = CachedMMRLoss(encoder, mini_batch_size=8)
        >>> args = MultiVectorEncoderTrainingArguments("out", per_device_train_batch_size=256)
        >>> MultiVectorEncoderTrainer(model=encoder, args=args, train_dataset=dataset, loss=loss).train()
    """

    def __init__(
        self,
        model: MultiVectorEncoder,
        budgets: Sequence[tuple[int, int]] | None = None,
        weights: Sequence[float] | None = None,
        temperature: float = 0.03,
        normalize: Normalize = "sum",
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        score_mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ):
        check_count("mini_batch_size", mini_batch_size, MAX_BATCH)
        settings = MMRSettings.for_encoder(
            model,
            budgets,
            weights,
            temperature=temperature,
            normalize=normalize,
            gather_across_devices=gather_across_devices,
            score_mini_batch_size=mini_batch_size if score_mini_batch_size is None else score_mini_batch_size,
        )
        warn_of_half_precision(model)
        CachedMultiVectorMultipleNegativesRankingLoss.__init__(
            self,
            model,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )
        self.settings = settings

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the weighted loss of each budget, which the trainer sums and logs: see [`MMRLoss.forward`].

        The gradient of all of them is attached to the last one: sum them before going backward.
        """
        total = super().forward(sentence_features, labels)
        *others, last = self._latest
        parts = {name: self._latest[name] for name in others}
        return {**parts, last: total - sum(parts.values())}

    def calculate_loss(
        self, reps: list[list[Tensor]], masks_chunks: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """Return the summed loss of the embeddings of a batch, and with `with_backward` fill in their gradients.

        Args:
            reps: Vectors of each column, in mini-batches [b, r, D].
            masks_chunks: Unused: every vector counts.
            with_backward: Whether to go backward, one chunk of queries at a time.

        Returns:
            A scalar.
        """
        queries, *columns = (torch.cat(chunks) for chunks in reps)  # [B, R_q, D], [B, R_c, D] each
        gathered, first = self.gather(torch.cat(columns))
        targets = first + torch.arange(len(queries), device=queries.device)
        # Leaves, so that the chunks' backward passes stop here and the ranks communicate only once.
        leaves = [tensor.detach().requires_grad_(with_backward) for tensor in (queries, gathered)]
        totals: dict[str, Tensor] = {}
        for part in self.loss_parts(leaves[0], leaves[1], targets):
            if with_backward:
                torch.stack(list(part.values())).sum().backward()
            totals = {name: totals.get(name, 0) + value.detach() for name, value in part.items()}
        if with_backward:
            torch.autograd.backward([queries, gathered], [leaf.grad for leaf in leaves])
        self._latest = totals
        return torch.stack(list(totals.values())).sum()

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: Any = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Embed rows `begin` to `end` of a column, also where its inputs could not share a batch (`groups`).

        Returns:
            Vectors [end - begin, r, D], their mask, and the state of the random numbers (of each group) before.
        """
        groups = sentence_feature.get("groups")
        if groups is None:
            return super().embed_minibatch(sentence_feature, begin, end, with_grad, copy_random_state, random_state)
        device = sentence_feature["input_ids"].device
        states = [None] * len(groups) if random_state is None else random_state
        every_row, vectors, masks = [], [], []
        new_states: list[Any] = []
        for group, state in zip(groups, states, strict=True):
            rows = group["rows"]  # ascending
            first, last = torch.searchsorted(rows, torch.tensor([begin, end], device=rows.device)).tolist()
            new_states.append(None)
            if first == last:
                continue
            part = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in group.items()}
            part["task"] = sentence_feature.get("task")
            embedded, mask, new_states[-1] = super().embed_minibatch(
                part, first, last, with_grad, copy_random_state, state
            )
            every_row.append(rows[first:last].to(device))
            vectors.append(embedded)
            masks.append(mask)
        order = torch.cat(every_row).argsort()
        return torch.cat(vectors)[order], torch.cat(masks)[order], new_states

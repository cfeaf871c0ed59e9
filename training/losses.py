"""Matryoshka Multi-Vector Retrieval training: one contrastive loss for every budget at once, from one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns_padded
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.util import all_gather, get_rank
from torch import Tensor, nn

from ..configuration_metaembed import MetaEmbedConfig, check_count
from .budgets import check_budgets

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

Normalize = Literal["sum", "mean", "sqrt"]
MAX_BATCH = 1_000_000
TOKEN_TERMS = ("tokens_tokens", "meta_tokens", "tokens_meta")  # which query vectors x which document vectors


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


def padded_scores(queries: Tensor, documents: Tensor) -> Tensor:
    """Return late interaction scores over the root of each query's number of vectors: rows of zeros are padding.

    Args:
        queries: Query vectors [Q, r, D].
        documents: Document vectors [M, n, D].

    Returns:
        Scores [Q, M].
    """
    is_query, is_document = (vectors.detach().any(dim=-1) for vectors in (queries, documents))  # [Q, r], [M, n]
    sims = torch.einsum("qid,mjd->qimj", queries, documents)  # [Q, r, M, n]
    best = sims.masked_fill(~is_document, -1).max(dim=-1).values  # of unit vectors, no product is below -1
    summed = (best * is_query.unsqueeze(-1)).sum(dim=1)  # [Q, M]
    return summed / is_query.sum(dim=1, keepdim=True).clamp(min=1).sqrt()


def cat_padded(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts [n, r, D], whose numbers of vectors may differ: rows of zeros fill up."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])


def gather_documents(documents: Tensor) -> tuple[Tensor, int]:
    """Gather the documents of all ranks, with gradients.

    Args:
        documents: This rank's vectors [M, r, D]. Ranks may have different r: rows of zeros fill up.

    Returns:
        The vectors [ranks * M, r, D] of all ranks in order, and the index of this rank's first.

    Raises:
        ValueError: If the ranks have different numbers of documents.
    """
    shapes = all_gather(torch.tensor([documents.shape[:2]], device=documents.device))  # [ranks, 2]
    counts, longest = shapes[:, 0].tolist(), int(shapes[:, 1].max())
    if len(set(counts)) > 1:
        raise ValueError(
            f"gathering needs as many documents on every rank, got {counts}. Set dataloader_drop_last=True, and give "
            "every query the same number of negatives."
        )
    documents = nn.functional.pad(documents, (0, 0, 0, longest - documents.shape[1]))
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
        token_terms: Names of `TOKEN_TERMS` and their weights.
        num_meta: Numbers of Meta Tokens of a query and of a document: where an embedding's token vectors begin.

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
    token_terms: tuple[tuple[str, float], ...] = ()
    num_meta: tuple[int, int] = (0, 0)

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
        if any(name not in TOKEN_TERMS or not weight >= 0 for name, weight in self.token_terms):
            raise ValueError(
                f"token_terms must map some of {', '.join(TOKEN_TERMS)} to weights >= 0, got {dict(self.token_terms)}."
            )

    @classmethod
    def for_encoder(
        cls,
        encoder: MultiVectorEncoder,
        budgets: Sequence[tuple[int, int]] | None,
        weights: Sequence[float] | None,
        token_terms: bool | Mapping[str, float] = False,
        **settings: Any,
    ) -> MMRSettings:
        """Return the settings with what is None taken from the model: all its budgets, each with weight 1.

        Raises:
            TypeError: If `encoder` is not a MetaEmbed encoder, or a budget is not a pair of whole numbers.
            ValueError: If a setting cannot be used.
        """
        config = encoder_config(encoder)
        sizes = (config.num_query_tokens, config.num_document_tokens)
        terms = (
            token_terms if isinstance(token_terms, Mapping) else dict.fromkeys(TOKEN_TERMS if token_terms else (), 1.0)
        )
        if terms and not config.token_projection:
            raise ValueError(
                "token_terms train the vectors of tokens, and this model was made without: create it with "
                "MetaEmbedModel.from_backbone(..., token_projection=True)."
            )
        pairs = check_budgets(config.budgets if budgets is None else budgets, *sizes, complete=False)
        return cls(
            budgets=tuple((r_q, r_c) for r_q, r_c in pairs),
            weights=(1.0,) * len(pairs) if weights is None else tuple(weights),
            token_terms=tuple(terms.items()),
            num_meta=sizes,
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


def count_meta_tokens(features: Mapping[str, Any], ids: Sequence[int]) -> int:
    """Return how many vectors of Meta Tokens, of these ids, each input in `features` gets."""
    found = ((features["input_ids"] >= ids[0]) & (features["input_ids"] <= ids[-1])).sum(dim=1)
    return min(int(found.min()), features.get("num_meta") or len(ids))


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
        unsaid = ("score_mini_batch_size", "num_meta", *(() if self.settings.token_terms else ("token_terms",)))
        return {name: value for name, value in asdict(self.settings).items() if name not in unsaid}

    def columns(self, sentence_features: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return copies of the columns of a batch, which ask for token vectors if a term needs them.

        Raises:
            ValueError: If a term needs them, and a column does not ask for all vectors of Meta Tokens.
        """
        columns = [dict(features) for features in sentence_features]
        if self.settings.token_terms:
            config = encoder_config(getattr(self.model, "module", self.model))
            for i, column in enumerate(columns):
                column["tokens"] = True
                side = "document" if i else "query"
                for part in column.get("groups", [column]):
                    size = count_meta_tokens(part, config.token_ids(side))
                    if size < config.num_tokens(side):
                        raise ValueError(
                            f"token_terms need all {config.num_tokens(side)} vectors of a {side}, got {size}. Set "
                            f"{side}_num_meta of encoder[0] to None."
                        )
        return columns

    def losses(self, queries: Tensor, documents: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss of each budget.

        Args:
            queries: Query vectors [Q, R_q, D], or [Q, R_q + T, D] with those of tokens, as the terms need them.
            documents: Document vectors [M, R_c, D], or with those of tokens, of all queries.
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
                for name, weight in settings.token_terms:
                    pair = zip(name.split("_"), (chunk, documents), settings.num_meta, strict=True)
                    scores = padded_scores(*(both[:, :r] if kind == "meta" else both[:, r:] for kind, both, r in pair))
                    summed = nn.functional.cross_entropy(scores / settings.temperature, chunk_targets, reduction="sum")
                    part[f"loss_{name}"] = weight * summed / len(queries)
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
        token_terms: Also train the vectors of the tokens (the full dial), from the same forward pass. True: by three
            more InfoNCE terms: "tokens_tokens" (query tokens x document tokens), "meta_tokens" (query Meta Tokens x
            document tokens) and "tokens_meta"; or a dict of some of these and their weights; docs/full-dial.md says
            which. True: 1 each. Their scores are divided by the root of the number of the query's vectors, whatever
            `normalize` says. The model must have a `token_projection`.
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
        token_terms: bool | Mapping[str, float] = False,
        gather_across_devices: bool = False,
        score_mini_batch_size: int | None = None,
    ):
        super().__init__()
        self.settings = MMRSettings.for_encoder(
            model,
            budgets,
            weights,
            token_terms,
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
        columns = self.columns(sentence_features)
        queries = self.model(columns[0], task="query")["token_embeddings"]  # [B, R_q, D]
        documents = cat_padded(
            embed_columns_padded(self.model, columns[1:], task_default="document")[0]
        )  # [M, R_c, D]
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
        token_terms: See [`MMRLoss`].
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
        token_terms: bool | Mapping[str, float] = False,
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
            token_terms,
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
        total = super().forward(self.columns(sentence_features), labels)
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
        queries, *columns = (cat_padded(chunks) for chunks in reps)  # [B, R_q, D], [B, R_c, D] each
        gathered, first = self.gather(cat_padded(columns))
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
            part |= {name: sentence_feature.get(name) for name in ("task", "tokens")}
            embedded, mask, new_states[-1] = super().embed_minibatch(
                part, first, last, with_grad, copy_random_state, state
            )
            every_row.append(rows[first:last].to(device))
            vectors.append(embedded)
            masks.append(mask)
        order = torch.cat(every_row).argsort()
        together = cat_padded(vectors)[order]
        return together, cat_padded([mask.unsqueeze(-1) for mask in masks])[order].squeeze(-1), new_states

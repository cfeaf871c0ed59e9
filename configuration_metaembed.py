"""What a MetaEmbed checkpoint is: its backbone, its Meta Tokens, its budgets and its defaults."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

SIDES = ("query", "document")
DEFAULT_BUDGETS = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))  # the paper's, for 16 query and 64 document tokens


def check_count(name: str, value: Any, maximum: int) -> int:
    """Return `value` if it is a whole number in 1..`maximum`.

    Args:
        name: What the number is called in the error.
        value: The number to check.
        maximum: The largest number allowed.

    Returns:
        The number itself, as an `int`.

    Raises:
        TypeError: If `value` is not a whole number: an `int`, or one of numpy's.
        ValueError: If it is outside 1..`maximum`.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number (int), got {value!r} of type {type(value).__name__}.")
    if not 1 <= count <= maximum:
        raise ValueError(f"{name} must be between 1 and {maximum}, got {count}.")
    return count


def check_budgets(
    budgets: Any, num_query_tokens: int, num_document_tokens: int, complete: bool = True
) -> list[list[int]]:
    """Return `budgets` as a list of `[r_q, r_c]` pairs, checked to be usable for Matryoshka training.

    Args:
        budgets: A sequence of `(r_q, r_c)` pairs, smallest first.
        num_query_tokens: R_q, the number of query Meta Tokens.
        num_document_tokens: R_c, the number of document Meta Tokens.
        complete: Whether the last budget must be the full sizes.

    Returns:
        The pairs, as lists.

    Raises:
        TypeError: If a budget is not a pair of whole numbers.
        ValueError: If the budgets are not nested (neither number may shrink), not strictly growing (at least one
            number must grow), or not `complete`. All violations are named.
    """
    if not isinstance(budgets, (list, tuple)) or not budgets:
        raise TypeError(f"budgets must be a non-empty list of (r_q, r_c) pairs, got {budgets!r}.")
    pairs = []
    for budget in budgets:
        if not isinstance(budget, (list, tuple)) or len(budget) != 2:
            raise TypeError(f"each budget must be a pair (r_q, r_c), got {budget!r}.")
        pairs.append(
            [
                check_count(f"r_q of budget {tuple(budget)}", budget[0], num_query_tokens),
                check_count(f"r_c of budget {tuple(budget)}", budget[1], num_document_tokens),
            ]
        )
    problems = []
    for small, large in zip(pairs, pairs[1:], strict=False):
        if large[0] < small[0] or large[1] < small[1]:
            problems.append(f"{large} does not contain {small} (not nested)")
        elif large == small:
            problems.append(f"{large} stands twice (not strictly growing)")
    if complete and pairs[-1] != [num_query_tokens, num_document_tokens]:
        problems.append(
            f"the last is {pairs[-1]}, but must be the full size [{num_query_tokens}, {num_document_tokens}]"
        )
    if problems:
        raise ValueError(f"budgets {pairs} cannot be used: " + "; ".join(problems) + ".")
    return pairs


def default_budgets(num_query_tokens: int, num_document_tokens: int) -> list[list[int]]:
    """Return the paper's budgets, cut to the given sizes and ending at them.

    Example:
        >>> default_budgets(4, 8)
        [[1, 1], [2, 4], [4, 8]]
    """
    smaller = [[q, d] for q, d in DEFAULT_BUDGETS if q <= num_query_tokens and d <= num_document_tokens]
    full = [num_query_tokens, num_document_tokens]
    return smaller if smaller and smaller[-1] == full else [*smaller, full]


@dataclass
class BackboneTraits:
    """What a backbone does with its inputs, measured once by [`MetaEmbedModel.from_backbone`].

    Args:
        causal: Whether no Meta Token sees a later one, so that encoding with r of them equals the first r rows of a
            full encoding.
        mixes_images: Whether inputs with different numbers of images may share a batch without changing each other.
        batches_images: Whether inputs with equal numbers of images may.
        pads_left: Whether padding on the left leaves the rows as they are: not so where positions count the padding.
        text_through_tokenizer: Whether inputs without images go through the tokenizer alone, because the backbone's
            processor refuses them.
        nests_images: Whether the processor takes the images of a batch as a list for each input, not as a flat list.
        processor_options: Options for every call of the processor, without which it would withhold what the backbone
            needs.
    """

    causal: bool = True
    mixes_images: bool = True
    batches_images: bool = True
    pads_left: bool = True
    text_through_tokenizer: bool = False
    nests_images: bool = True
    processor_options: dict | None = None


class MetaEmbedConfig(PreTrainedConfig):
    """Configuration of a [`MetaEmbedModel`].

    Args:
        backbone_config: The configuration of the backbone, or the dictionary it is saved as.
        num_query_tokens: R_q, the number of query Meta Tokens. 16 in the paper.
        num_document_tokens: R_c, the number of document Meta Tokens. 64 in the paper.
        budgets: The `[r_q, r_c]` pairs that training covers: nested, strictly growing, ending at the full sizes.
            None: the paper's five, cut to the sizes.
        embedding_dim: Dimension D of an embedding vector. None: the backbone's hidden size, with no projection.
        traits: What the backbone does with its inputs: see [`BackboneTraits`].
        document_sees_query_tokens: Whether a document's Meta Tokens follow the query ones (`[input; M_q; M_c]`), the
            layout of the paper's own code, instead of standing alone (`[input; M_c]`).
        query_token_ids: Ids of the query Meta Tokens, contiguous, in order.
        document_token_ids: Ids of the document Meta Tokens, contiguous, in order.
        query_num_meta: Number of vectors of a query where a call names none. None: all.
        document_num_meta: Number of vectors of a document where a call names none. None: all.
        query_instruction: Instruction put before every query where a call names none. None: no instruction.
        document_instruction: Instruction put before every document where a call names none. None: no instruction.
        base_model: Where the backbone came from (a Hub id), for the model card and for adapters.

    Raises:
        TypeError: If a number is not a whole number.
        ValueError: If a number is out of range, or the budgets or token ids do not fit the sizes.

    Example:
        >>> MetaEmbedConfig(num_query_tokens=4, num_document_tokens=8).budgets
        [[1, 1], [2, 4], [4, 8]]
    """

    model_type = "metaembed"
    sub_configs = {"backbone_config": AutoConfig}
    _auto_class = "AutoConfig"

    backbone_config: Any = None
    num_query_tokens: int = 16
    num_document_tokens: int = 64
    budgets: Any = None
    embedding_dim: int | None = None
    traits: Any = None
    document_sees_query_tokens: bool = False
    query_token_ids: Any = None
    document_token_ids: Any = None
    query_num_meta: int | None = None
    document_num_meta: int | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None
    base_model: str | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        names = [field.name for field in fields(BackboneTraits)]
        flat = {name: kwargs.pop(name) for name in names if name in kwargs}  # as version 0.1 saved them
        if not isinstance(self.traits, BackboneTraits):
            self.traits = BackboneTraits(**{**flat, **(self.traits or {})})
        super().__post_init__(**kwargs)
        large = 1_000_000  # far above any use, so that a mistaken value is named here and not as a failed allocation
        self.num_query_tokens = check_count("num_query_tokens", self.num_query_tokens, large)
        self.num_document_tokens = check_count("num_document_tokens", self.num_document_tokens, large)
        if self.embedding_dim is not None:
            self.embedding_dim = check_count("embedding_dim", self.embedding_dim, large)
        if self.budgets is None:
            self.budgets = default_budgets(self.num_query_tokens, self.num_document_tokens)
        self.budgets = check_budgets(self.budgets, self.num_query_tokens, self.num_document_tokens)
        for side in SIDES:
            if (num_meta := self.num_meta(side)) is not None:
                setattr(self, f"{side}_num_meta", check_count(f"{side}_num_meta", num_meta, self.num_tokens(side)))
            instruction = getattr(self, f"{side}_instruction")
            if not isinstance(instruction, (str, type(None))):
                raise TypeError(f"{side}_instruction must be a string or None, got {instruction!r}.")
        self._check_token_ids()

    def _check_token_ids(self) -> None:
        for side in SIDES:
            ids, size = self.token_ids(side), self.num_tokens(side)
            if ids is not None and (not len(ids) or list(ids) != list(range(ids[0], ids[0] + size))):
                raise ValueError(
                    f"{side}_token_ids must be {size} contiguous ids in order (num_{side}_tokens={size}), got {ids}."
                )
        if shared := set(self.query_token_ids or ()) & set(self.document_token_ids or ()):
            raise ValueError(f"query_token_ids and document_token_ids must not overlap, both hold {sorted(shared)}.")

    def num_tokens(self, side: str) -> int:
        """Return R, the number of Meta Tokens of `side` ("query" or "document")."""
        return getattr(self, f"num_{side}_tokens")

    def token_ids(self, side: str) -> Any:
        """Return the Meta Token ids of `side` ("query" or "document"): a list, or None before there are any."""
        return getattr(self, f"{side}_token_ids")

    def num_meta(self, side: str) -> int | None:
        """Return the persistent default of `num_meta` of `side` ("query" or "document")."""
        return getattr(self, f"{side}_num_meta")

    @property
    def hidden_size(self) -> int:
        """Hidden size of the backbone's language model, what trainers and DeepSpeed ask for."""
        if self.backbone_config is None:
            raise AttributeError("hidden_size is the backbone's, and this configuration has no backbone_config.")
        return self.get_text_config().hidden_size

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """Return the configuration of the backbone's language model."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as it is saved."""
        return {**super().to_dict(), "traits": asdict(self.traits)}

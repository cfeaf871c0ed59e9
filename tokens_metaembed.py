"""The Meta Tokens of the paper, as tokens of the backbone's vocabulary."""

from __future__ import annotations

from transformers import AddedToken, PreTrainedTokenizerBase

from .configuration_metaembed import SIDES


def meta_token_names(side: str, count: int) -> list[str]:
    """Return the Meta Tokens of `side` as they stand in the vocabulary.

    Example:
        >>> meta_token_names("query", 2)
        ['<|meta_query_0|>', '<|meta_query_1|>']
    """
    return [f"<|meta_{side}_{i}|>" for i in range(count)]


def add_meta_tokens(tokenizer: PreTrainedTokenizerBase, num_query_tokens: int, num_document_tokens: int) -> dict:
    """Add the Meta Tokens to the vocabulary of `tokenizer`, query ones first.

    Args:
        tokenizer: Changed in place.
        num_query_tokens: R_q.
        num_document_tokens: R_c.

    Returns:
        `{"query_token_ids": [R_q ids], "document_token_ids": [R_c ids]}`, each contiguous.

    Raises:
        ValueError: If the tokenizer already holds Meta Tokens, or does not take new tokens as they are.
    """
    names = {
        "query": meta_token_names("query", num_query_tokens),
        "document": meta_token_names("document", num_document_tokens),
    }
    every = names["query"] + names["document"]
    vocabulary = tokenizer.get_vocab()
    if present := [name for name in every if name in vocabulary]:
        raise ValueError(
            f"the tokenizer already holds Meta Tokens ({present[0]}, ...): this is a MetaEmbed model already. "
            "Load it with MetaEmbedModel.from_pretrained, or pass its plain backbone."
        )
    # `add_tokens` and not `add_special_tokens`: some processors call the latter again later, which replaces the list.
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in every], special_tokens=True)
    ids = {f"{side}_token_ids": tokenizer.convert_tokens_to_ids(names[side]) for side in SIDES}
    flat = ids["query_token_ids"] + ids["document_token_ids"]
    if flat != list(range(flat[0], flat[0] + len(every))) or flat[0] in vocabulary.values():
        raise ValueError(f"{type(tokenizer).__name__} does not add new tokens as contiguous ids (got {flat}).")
    return ids

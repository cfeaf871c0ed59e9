"""What a backbone must be given, and asked, once, to become a MetaEmbed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel

# Arguments of `from_pretrained` that say where from, and hold for the model and for its processor.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def check_loading(source: Any, info: Mapping[str, Any]) -> None:
    """Raise if weights were not loaded whole.

    Args:
        source: What was loaded, for the error.
        info: What `from_pretrained(..., output_loading_info=True)` reports.

    Raises:
        ValueError: If a weight of the model was not in the checkpoint (and so is random), or has another shape.
    """
    problems = []
    for kind, what in (("missing_keys", "missing, so random"), ("mismatched_keys", "of another shape, so random")):
        if keys := sorted(map(str, info.get(kind) or [])):
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            problems.append(f"{len(keys)} weights are {what}: {shown}")
    if problems:
        raise ValueError(f"the weights of {source} did not load whole: {'; '.join(problems)}. Nothing was created.")


def load_backbone(source: Any, **kwargs: Any) -> tuple[PreTrainedModel, Any]:
    """Load a plain backbone and its processor, whole or not at all.

    Args:
        source: Hub id or folder.
        **kwargs: For `AutoModel.from_pretrained`; those that say where from hold for the processor too.

    Returns:
        The model without a head, and its processor (or tokenizer).

    Raises:
        ValueError: If a weight is missing from the checkpoint.
    """
    hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    backbone, info = AutoModel.from_pretrained(source, output_loading_info=True, **kwargs)
    check_loading(source, info)
    return backbone, AutoProcessor.from_pretrained(source, **hub)


def grow_embedding(backbone: PreTrainedModel, token_ids: list[int], vocabulary: int, seed: int) -> None:
    """Give every Meta Token a row of its own in the backbone's input embedding.

    The rows are drawn from a normal distribution with the mean and the standard deviation, dimension by dimension, of
    the rows of the tokens that were there before: at home in the space that the backbone knows, and all different.

    Args:
        backbone: Changed in place; its embedding grows where the tokens do not fit its spare rows.
        token_ids: Ids of the Meta Tokens, the last ones of the vocabulary.
        vocabulary: Number of tokens before the Meta Tokens, whose rows are trained.
        seed: Seed of the draw.
    """
    rows = backbone.get_input_embeddings().weight.shape[0]
    if token_ids[-1] >= rows:
        text_config = backbone.config.get_text_config()
        extra = rows - text_config.vocab_size  # some backbones keep rows beyond their vocabulary size
        backbone.resize_token_embeddings(token_ids[-1] + 1 + extra, mean_resizing=False)
        text_config.vocab_size = token_ids[-1] + 1
    with torch.no_grad():
        weight = backbone.get_input_embeddings().weight
        known = weight[:vocabulary].float()  # [vocabulary, hidden]
        noise = torch.randn(len(token_ids), weight.shape[1], generator=torch.Generator().manual_seed(seed))
        drawn = known.mean(dim=0) + known.std(dim=0) * noise.to(weight.device)
        weight[token_ids[0] : token_ids[-1] + 1] = drawn.to(weight.dtype)


def check_rebuilds(backbone: PreTrainedModel) -> None:
    """Raise unless the backbone's configuration describes the backbone: what is saved must load again.

    Raises:
        ValueError: If a model built from the configuration has other parameters or shapes.
    """
    with torch.device("meta"):
        rebuilt = AutoModel.from_config(backbone.config)
    expected = {name: tuple(value.shape) for name, value in rebuilt.state_dict().items()}
    actual = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    if differing := sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)):
        name = differing[0]
        raise ValueError(
            f"the configuration of {type(backbone).__name__} does not describe it after adding Meta Tokens, so what "
            f"is saved would not load: {name} is {actual.get(name)}, but would be built as {expected.get(name)}."
        )


@torch.no_grad()
def is_causal(embed: Callable[..., torch.Tensor], inputs: Mapping[str, Any], token_ids: list[int]) -> bool:
    """Measure whether no Meta Token sees a later one.

    Runs twice at the same shapes with the last Meta Token swapped for another: in a causal backbone, and in no other,
    the rows before it are the same to the last bit.

    Args:
        embed: From model inputs to rows [1, R, D].
        inputs: Model inputs of one item with all Meta Tokens.
        token_ids: Ids of its Meta Tokens, in order.

    Returns:
        Whether the earlier rows stayed as they were.
    """
    ids = inputs["input_ids"]
    swapped = torch.where(ids == token_ids[-1], torch.full_like(ids, token_ids[0]), ids)
    before = embed(**inputs)  # [1, R, D]
    after = embed(**{**inputs, "input_ids": swapped})  # [1, R, D]
    return torch.equal(before[:, :-1], after[:, :-1])

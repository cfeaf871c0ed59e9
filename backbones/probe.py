"""What a backbone must be given, and asked, once, to become a MetaEmbed model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from ..processing_metaembed import MetaEmbedProcessor

Embed = Callable[..., torch.Tensor]  # from model inputs to rows [N, R, D]


def measure(backbone: PreTrainedModel, embed: Embed, processor: MetaEmbedProcessor) -> torch.Tensor:
    """Find out what a backbone does with its inputs, by running it, and write the answers into the configuration.

    Sets what [`MetaEmbedConfig`] says is measured.

    Args:
        backbone: The backbone.
        embed: Runs the model: from model inputs to rows [N, R, D].
        processor: Holds the configuration.

    Returns:
        The rows [N, R, D] of one input of each kind, with their graph.

    Raises:
        ValueError: If the backbone cannot embed a text, or an image where its processor takes images: with the reason.
    """
    config = processor.config
    text: dict[str, Any] = {"text": "a picture"}
    image = {**text, "image": _picture(0)}
    config.traits.text_through_tokenizer = not _takes(processor, [text, text])  # some take two texts for one
    probes = [("a text", text)]
    if processor.image_processor is not None:
        # A list for each text, if that is possible: flat lists are dealt to the wrong texts by some.
        config.traits.nests_images = True
        if not _takes(processor, [image]):
            config.traits.nests_images = False
            config.traits.nests_images = not _takes(processor, [image])
        probes.append(("a text with an image", image))
    rows, causal = [], []
    for what, probe in probes:
        try:
            config.traits.processor_options = config.traits.processor_options or _options(backbone, processor, probe)
            inputs = _inputs(backbone, processor, [probe])
            rows.append(embed(**inputs))  # [1, R, D]
            causal.append(is_causal(embed, inputs, config.document_token_ids))
        except Exception as error:
            raise ValueError(
                f"{type(backbone).__name__} cannot be a MetaEmbed backbone: {what} failed: {error}"
            ) from error
    if len(probes) > 1:
        with torch.no_grad():
            _measure_batches(backbone, embed, processor, text, image, rows)
    config.traits.causal = all(causal)
    with torch.no_grad():
        config.traits.pads_left = _pads_left(backbone, embed, processor, text, rows[0])
    return torch.cat(rows)


def _measure_batches(
    backbone: PreTrainedModel, embed: Embed, processor: MetaEmbedProcessor, text: Any, image: Any, rows: list
) -> None:
    """Find out which inputs keep the rows [1, R, D] that they have alone when they share a batch."""
    config = processor.config
    items, alone = [text, image], list(rows)
    try:
        pair = {**text, "image": [_picture(1), _picture(2)]}
        alone.append(embed(**_inputs(backbone, processor, [pair])))
        items.append(pair)
    except Exception:  # one image at most: an input with two will say so
        pass
    # Texts at both ends: some processors lose those that stand after the last image.
    config.traits.mixes_images = _share(backbone, embed, processor, [*items, text], [*alone, rows[0]])
    if not config.traits.mixes_images:
        other = {**text, "image": _picture(3)}
        alone = [rows[1], embed(**_inputs(backbone, processor, [other]))]
        config.traits.batches_images = _share(backbone, embed, processor, [image, other], alone)


def _options(backbone: PreTrainedModel, processor: MetaEmbedProcessor, item: Any) -> dict[str, Any]:
    """Find the options that a backbone's processor must be called with to return what the backbone needs."""
    plain, options = processor.process_documents([item], instruction=""), {}
    if plain["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) > 1:  # both wrote it
        options["add_special_tokens"] = False
    kinds = {"return_mm_token_type_ids": True}  # a kind for each token: for positions, or attention within images
    try:
        more = set(processor.process_documents([item], instruction="", **kinds)) - set(plain)
    except (TypeError, ValueError):
        return options
    if more and more <= inspect.signature(backbone.forward).parameters.keys():
        options.update(kinds)
    return options


def _takes(processor: MetaEmbedProcessor, items: list) -> bool:
    try:
        processor.process_documents(items, instruction="")
    except ValueError:
        return False
    return True


def _share(backbone: PreTrainedModel, embed: Embed, processor: MetaEmbedProcessor, items: list, alone: list) -> bool:
    """Whether inputs keep, in one batch, the rows [1, R, D] that each has alone."""
    before = processor.config.traits.mixes_images
    processor.config.traits.mixes_images = True  # so that the processor lets them try
    try:
        together = embed(**_inputs(backbone, processor, items))  # [N, R, D]
    except Exception:  # refused by the backbone's processor, or by the backbone
        return False
    finally:
        processor.config.traits.mixes_images = before
    return _same(backbone, together, torch.cat(alone))


def _pads_left(
    backbone: PreTrainedModel, embed: Embed, processor: MetaEmbedProcessor, text: Any, alone: torch.Tensor
) -> bool:
    """Whether a text keeps the rows [1, R, D] that it has alone when there is padding before it."""
    longer = {"text": text["text"] * 8}
    try:
        padded = embed(**_inputs(backbone, processor, [text, longer], padding_side="left"))[:1]  # [1, R, D]
    except Exception:  # refused by the backbone's processor, or by the backbone
        return False
    return _same(backbone, padded, alone)


def _same(backbone: PreTrainedModel, a: torch.Tensor, b: torch.Tensor) -> bool:
    # Half of the digits: far above the noise of another batch shape, far below what a leak changes. Of float32 at
    # most: rotary positions have no more.
    digits = max(torch.finfo(dtype).eps for dtype in (backbone.dtype, torch.float32))
    return bool((a - b).norm(dim=-1).max() < digits**0.5)


def _inputs(backbone: PreTrainedModel, processor: MetaEmbedProcessor, items: list, **kwargs: Any) -> Mapping[str, Any]:
    inputs = processor.process_documents(items, instruction="", **kwargs).to(backbone.device)
    inputs.pop("num_meta", None)
    return inputs


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8))


@torch.no_grad()
def is_causal(embed: Embed, inputs: Mapping[str, Any], token_ids: list[int]) -> bool:
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

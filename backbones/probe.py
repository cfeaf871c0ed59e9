"""Measures how a backbone treats its inputs, by running it once on small ones when a model is created."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..modeling_metaembed import MetaEmbedModel

TEXT = {"text": "a picture"}
LONGER = {"text": TEXT["text"] * 8}


def picture(seed: int) -> Image.Image:
    """Return an image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8))


def recording(seed: int, seconds: float = 1.0, rate: int = 16_000) -> dict[str, Any]:
    """Return a recording of noise."""
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate)).astype(np.float32)
    return {"array": samples, "sampling_rate": rate}


@torch.no_grad()
def measure(model: MetaEmbedModel) -> None:
    """Set every trait in `model.config.traits` to what the backbone does, and `template_tokens`.

    The order matters: each question uses the processor, which heeds the answers to those before it.

    Args:
        model: The model, on its device, in evaluation mode.

    Raises:
        ValueError: If the backbone cannot embed a text, or an image where its processor takes images: with the reason.
    """
    probe, traits = Probe(model), model.config.traits
    traits.text_through_tokenizer = refuses_texts(probe)
    traits.nests_images = takes_nested_images(probe)
    traits.processor_options = options_needed(probe)
    traits.takes_audio = takes_audio(probe)
    traits.processor_options = options_needed(probe)  # of recordings too, now that these are among the items
    traits.causal = sees_nothing_later(probe)
    traits.mixes_images = mixes_images(probe)
    traits.batches_images = traits.mixes_images or batches_images(probe)
    traits.mixes_audio = mixes_audio(probe)
    traits.batches_audio = traits.mixes_audio or batches_audio(probe)
    traits.pads_left = pads_left(probe)
    model.config.template_tokens = template_tokens(probe)


def probe_rows(model: MetaEmbedModel) -> torch.Tensor:
    """Return the rows [N, R, D] of one input of each kind that a measured model takes, with their graph."""
    probe = Probe(model)
    items = [*probe.items.values(), *([probe.heard(0)] if model.config.traits.takes_audio else [])]
    return torch.cat([probe.embed([item]) for item in items])


class Probe:
    """Small inputs for a model, and how it takes them.

    Args:
        model: The model. Its traits are those that the processor heeds.
    """

    def __init__(self, model: MetaEmbedModel):
        self.model, self.processor = model, model.processor
        self.takes_images = self.processor.image_processor is not None
        self.image = {**TEXT, "image": picture(0)}
        self.items = {"a text": TEXT, **({"a text with an image": self.image} if self.takes_images else {})}
        self.rate = getattr(self.processor.audio_processor, "sampling_rate", 16_000)

    def heard(self, *seeds: int) -> dict:
        """Return a text with recordings, of another length for each seed."""
        return {**TEXT, "audio": [recording(seed, 0.6 + 0.25 * seed, self.rate) for seed in seeds]}

    def inputs(self, items: list, **options: Any) -> Mapping[str, Any]:
        """Return the model inputs of a batch of documents."""
        inputs = self.processor.process_documents(items, instruction="", **options).to(self.model.backbone.device)
        inputs.pop("num_meta", None)
        return inputs

    def embed(self, items: list, **options: Any) -> torch.Tensor:
        """Return the rows [N, R, D] of a batch of documents."""
        return self.model.embed(**self.inputs(items, **options))

    def accepts(self, items: list) -> bool:
        """Whether the processor takes these items as one batch."""
        try:
            self.processor.process_documents(items, instruction="")
        except ValueError:
            return False
        return True

    def keeps_rows(self, items: list, alone: torch.Tensor, **options: Any) -> bool:
        """Whether the first items of a batch keep the rows [n, R, D] that each has alone."""
        try:
            together = self.embed(items, **options)[: len(alone)]
        except Exception:  # the backbone's processor or the backbone refuses it
            return False
        # Half of the digits: far above the noise of another batch shape, far below the effect of a leak. Of float32 at
        # most: rotary positions have no more.
        digits = max(torch.finfo(dtype).eps for dtype in (self.model.backbone.dtype, torch.float32))
        return bool((together - alone).norm(dim=-1).max() < digits**0.5)

    @contextmanager
    def assuming(self, **answers: Any) -> Iterator[None]:
        """Let the processor heed other traits for a moment."""
        traits = self.model.config.traits
        before = {name: getattr(traits, name) for name in answers}
        try:
            for name, value in answers.items():
                setattr(traits, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(traits, name, value)

    def for_each_kind(self, question: Callable[[dict], Any]) -> list:
        """Return the answers for one input of each kind, all of which a backbone must take.

        Raises:
            ValueError: If it fails for one of them: with the reason.
        """
        answers = []
        for kind, item in self.items.items():
            try:
                answers.append(question(item))
            except Exception as error:
                name = type(self.model.backbone).__name__
                raise ValueError(f"{name} cannot be a MetaEmbed backbone: {kind} failed: {error}") from error
        return answers


def refuses_texts(probe: Probe) -> bool:
    """Whether the backbone's processor takes no batch of texts (some take two texts for one)."""
    with probe.assuming(text_through_tokenizer=False):
        return not probe.accepts([TEXT, TEXT])


def takes_nested_images(probe: Probe) -> bool:
    """Whether the processor takes a list of images for each text, or else takes no flat list either.

    Nested lists are preferred where both are taken: some processors deal the images of a flat list to the wrong texts.
    """
    takes = {}
    for nested in (True, False):
        with probe.assuming(nests_images=nested):
            takes[nested] = probe.takes_images and probe.accepts([probe.image])
    return takes[True] or not takes[False]


def options_needed(probe: Probe) -> dict[str, Any]:
    """Return the options that make the processor return everything that the backbone needs for one kind of input."""
    with probe.assuming(processor_options=None):
        return next(filter(None, probe.for_each_kind(lambda item: options_for(probe, item))), {})


def options_for(probe: Probe, item: dict) -> dict[str, Any]:
    """Return the options that one input needs."""
    plain, options = probe.inputs([item]), {}
    if plain["input_ids"][0].tolist().count(probe.processor.tokenizer.bos_token_id) > 1:  # both wrote it
        options["add_special_tokens"] = False
    kinds = {"return_mm_token_type_ids": True}  # a kind for each token: for positions, or attention within images
    try:
        more = set(probe.inputs([item], **kinds)) - set(plain)
    except (TypeError, ValueError):
        return options
    if more and more <= inspect.signature(probe.model.backbone.forward).parameters.keys():
        options.update(kinds)
    return options


def sees_nothing_later(probe: Probe) -> bool:
    """Whether no Meta Token sees a later one.

    Runs twice at the same shapes, the second time with the first Meta Token in place of the last: in a causal
    backbone, and in no other, the rows before it are the same to the last bit.
    """
    ids = probe.model.config.document_token_ids

    def is_causal(item: dict) -> bool:
        inputs = probe.inputs([item])
        before = probe.model.embed(**inputs)  # [1, R, D]
        swapped = inputs["input_ids"].masked_fill(inputs["input_ids"] == ids[-1], ids[0])
        after = probe.model.embed(**{**inputs, "input_ids": swapped})  # [1, R, D]
        return torch.equal(before[:, :-1], after[:, :-1])

    return all(probe.for_each_kind(is_causal))


def takes_audio(probe: Probe) -> bool:
    """Whether recordings change the rows. If so, a text with one becomes a kind of input that the backbone must take.

    Processors of several models take recordings although some of these models have no part that hears.
    """
    if probe.processor.audio_processor is None:
        return False
    with probe.assuming(takes_audio=True):
        try:
            rows = [probe.embed([probe.heard(seed)]) for seed in (0, 1)]
            reason = "they change nothing" if torch.equal(*rows) else ""
        except Exception as error:
            reason = str(error)
    if reason:
        name = type(probe.model.backbone).__name__
        warnings.warn(f"{name} takes no recordings, although its processor does: {reason}", UserWarning, stacklevel=4)
        return False
    probe.items["a text with a recording"] = probe.heard(0)
    return True


def mixes_images(probe: Probe) -> bool:
    """Whether inputs with different numbers of images keep their rows in one batch."""
    if not probe.takes_images:
        return True
    with probe.assuming(mixes_images=True):  # so that the processor lets them try
        return mixes(probe, [TEXT, probe.image], {**TEXT, "image": [picture(1), picture(2)]})


def mixes_audio(probe: Probe) -> bool:
    """Whether inputs with different numbers of recordings, of different lengths, keep their rows in one batch."""
    traits = probe.model.config.traits
    if not traits.takes_audio:
        return True
    image = [probe.image] if probe.takes_images and traits.mixes_images else []
    with probe.assuming(mixes_audio=True):
        return mixes(probe, [TEXT, probe.heard(1), *image, probe.heard(2)], probe.heard(3, 0))


def mixes(probe: Probe, items: list[dict], pair: dict) -> bool:
    """Whether these inputs keep their rows in one batch, with one that has two images or recordings if it is taken."""
    alone = [probe.embed([item]) for item in items]
    try:
        alone.append(probe.embed([pair]))
        items = [*items, pair]
    except Exception:  # one at most: an input with two will say so
        pass
    # Texts at both ends: some processors lose text after the last image.
    return probe.keeps_rows([*items, TEXT], torch.cat([*alone, alone[0]]))


def batches_images(probe: Probe) -> bool:
    """Whether inputs with equal numbers of images keep their rows in one batch."""
    items = [probe.image, {**TEXT, "image": picture(3)}]
    alone = torch.cat([probe.embed([item]) for item in items])
    with probe.assuming(mixes_images=True):
        return probe.keeps_rows(items, alone)


def batches_audio(probe: Probe) -> bool:
    """Whether inputs with equal numbers of recordings, of different lengths, keep their rows in one batch."""
    items = [probe.heard(1), probe.heard(2)]
    alone = torch.cat([probe.embed([item]) for item in items])
    with probe.assuming(mixes_audio=True):
        return probe.keeps_rows(items, alone)


def pads_left(probe: Probe) -> bool:
    """Whether a text keeps its rows when there is padding before it."""
    with probe.assuming(pads_left=True):
        return probe.keeps_rows([TEXT, LONGER], probe.embed([TEXT]), padding_side="left")


def template_tokens(probe: Probe) -> list[int]:
    """Return how many tokens all prompts begin with, and how many they end with before the Meta Tokens."""
    config, count = probe.model.config, probe.model.config.num_document_tokens
    count += config.num_query_tokens if config.document_sees_query_tokens else 0
    items = [{"text": "9"}, *probe.items.values()]  # texts that share no token, and an image
    prompts = [probe.inputs([item])["input_ids"][0, :-count].tolist() for item in items]
    return [common_start(prompts), common_start([prompt[::-1] for prompt in prompts])]


def common_start(rows: list[list[int]]) -> int:
    """Return how many first entries all rows share."""
    return sum(1 for _ in itertools.takewhile(lambda entries: len(set(entries)) == 1, zip(*rows, strict=False)))

"""The sentence-transformers entry point: a module that makes a MetaEmbedModel a `MultiVectorEncoder`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .configuration_metaembed import SIDES, of_package
from .inputs_metaembed import SOURCES, InputPolicy, is_batch, is_single
from .loading_metaembed import HUB_ARGUMENTS, read_json
from .modeling_metaembed import MetaEmbedModel, check_finite
from .processing_metaembed import default_device_cpu

try:  # in a `try`, so that transformers does not ask users of AutoModel alone to install it
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError("this needs sentence-transformers: pip install 'sentence-transformers>=6.0'") from error


def _num_meta(side: str) -> property:
    def read(self: MetaEmbedTransformer) -> int | None:
        return self.model.config.num_meta(side)

    def write(self: MetaEmbedTransformer, value: int | None) -> None:
        value = None if value is None else self.processor.resolve_num_meta(side, value)
        setattr(self.model.config, f"{side}_num_meta", value)

    return property(read, write, doc=f"Vectors of a {side} where a call names none, saved with the model. None: all.")


class MetaEmbedTransformer(InputModule):
    """Wraps a [`MetaEmbedModel`], with its processor, as the one module of a `MultiVectorEncoder`.

    Example:
        >>> encoder = MultiVectorEncoder("you/your-metaembed", trust_remote_code=True)
        >>> queries = encoder.encode_query(["a red apple"], num_meta=4)  # list of [4, D]
        >>> encoder[0].query_num_meta = 4  # what evaluators, which know no `num_meta`, will use; saved with the model
    """

    forward_kwargs = {"task", "num_meta", "policy", "tokens"}
    save_in_root = True

    def __init__(self, model: MetaEmbedModel):
        super().__init__()
        self.model = model

    @property
    def modalities(self) -> list[str]:
        """What inputs may be."""
        return ["text", *filter(self.processor.takes, SOURCES), "message"]

    processor = property(lambda self: self.model.processor, doc="The model's processor.")
    tokenizer = property(lambda self: self.processor.tokenizer, doc="The backbone's tokenizer.")
    max_seq_length = property(lambda self: None, doc="None, which cannot be set: nothing is cut.")
    query_num_meta, document_num_meta = map(_num_meta, SIDES)

    # What may be read and fetched for an input: the model's. Not saved.
    policy = property(lambda self: self.model.policy, lambda self, policy: setattr(self.model, "policy", policy))

    def get_embedding_dimension(self) -> int:
        """Return D, the dimension of every vector."""
        return self.model.config.embedding_dim or self.model.config.hidden_size

    def preprocess(
        self,
        inputs: list[Any],
        prompt: str | None = None,
        task: str | None = None,
        num_meta: int | None = None,
        policy: InputPolicy | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Turn inputs, whatever [`MetaEmbedModel.encode_queries`] takes, into model inputs.

        Args:
            inputs: Queries or documents.
            prompt: Instruction put before each input. None or "" (no prompt): the configuration's default.
            task: "query" or "document". None means "document".
            num_meta: Number of vectors of each. None: the persistent default, else all.
            policy: What may be read and fetched. None: the model's `policy`.
            processing_kwargs: `max_length`, and options of the processor: what is an argument here is a TypeError.
            **kwargs: What sentence-transformers sends along for modules of other kinds.

        Returns the model inputs; in `groups`, each with its `rows`, where inputs may not share a batch.
        """
        side = "query" if task == "query" else "document"
        options: dict[str, Any] = {"num_meta": num_meta, "instruction": prompt or None, "policy": policy}
        if own := options.keys() & (processing_kwargs or {}).keys():
            raise TypeError(f"{min(own)} is no option of the processor: pass it outside processing_kwargs.")
        options.update(processing_kwargs or {})
        of_package("app.file_names", "warn_of_file_names")(inputs)
        items = self.processor.parse(inputs)
        groups = self.processor.group(items)
        parts = []
        for rows in groups:
            batch = [items[i] for i in rows]
            part = dict(self.processor.process(batch, side, **{**options, "indices": rows}))
            counts = [item.num_images for item in batch]
            if any(counts):  # says which images are whose, where a cached loss cuts the batch into smaller ones
                part["num_images_per_sample"] = torch.tensor(counts, device="cpu")
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        # The trainer tells the columns of a batch apart by their input_ids, and counts rows by them.
        longest = max((part["input_ids"].shape[1] for part in parts), default=0)
        input_ids = torch.zeros(len(items), longest, dtype=torch.long, device="cpu")
        for rows, part in zip(groups, parts, strict=True):
            part["rows"] = torch.tensor(rows, device="cpu")
            input_ids[rows, : part["input_ids"].shape[1]] = part["input_ids"]
        return {"input_ids": input_ids, "groups": parts}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return the features with `token_embeddings` [N, r, D] (with `tokens` r + T) and their `attention_mask`.

        Raises:
            ValueError: If, in evaluation mode, an embedding is not finite.
        """
        device = features["input_ids"].device
        parts = features.get("groups", [features])
        tokens = kwargs.get("tokens", features.get("tokens", False))
        rows = [row for part in parts for row in self._embed({**part, "tokens": tokens}, device)]  # [r + T, D] each
        embeddings = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [N, r + T, D]
        if "groups" in features:
            embeddings = embeddings[torch.cat([part["rows"] for part in parts]).to(device).argsort()]
        if not self.training:
            check_finite(embeddings, list(range(len(embeddings))))
        features["token_embeddings"] = embeddings
        features["attention_mask"] = (embeddings if tokens else torch.ones_like(embeddings)).any(dim=-1)
        return features

    def _embed(self, features: dict[str, Any], device: torch.device) -> Tensor:
        skipped = ("rows", "num_images_per_sample", "task", "modality", "prompt_length", "token_embeddings")
        kept = {name: features[name] for name in features if name not in skipped}
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kept.items()}
        if "image_grid_thw" in inputs and not len(inputs["image_grid_thw"]):  # of a mini-batch without images
            inputs = {name: inputs[name] for name in inputs if name not in ("image_grid_thw", "pixel_values")}
        with default_device_cpu():
            return self.model(**inputs).embeddings

    def on_model_ready(self, model: MultiVectorEncoder) -> None:
        """Let the encoder that this is a module of write our card, and take batches of any kind."""
        of_package("cards", "adopt_card")(model)  # without the package, the card that is there is kept
        model.is_singular_input = is_one_input
        of_package("encoding.sentence", "prepare_ahead")(model)  # its next batches, while it computes

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the model, whole, with the encoder's prompts as the configuration's instructions, but not the card.

        Raises:
            ValueError: If a prompt and the configuration's instruction disagree.
        """
        settings, config = Path(output_path) / "config_sentence_transformers.json", self.model.config
        prompts = read_json(settings)["prompts"] if settings.is_file() else {}
        own = {side: getattr(config, f"{side}_instruction") for side in SIDES}
        for side, instruction in own.items():
            if prompts.get(side) and instruction and prompts[side] != instruction:
                raise ValueError(
                    f"encoder.prompts[{side!r}] is {prompts[side]!r}, but the {side}_instruction of the model, which "
                    f"other entry points apply, is {instruction!r}: set one (of encoder[0].model.config) to the other."
                )
        try:
            for side in SIDES:
                setattr(config, f"{side}_instruction", prompts.get(side) or own[side])
            self.model.save_pretrained(output_path, model_card=False)
        finally:  # a checkpoint that is saved on the way must not change what training does
            for side in SIDES:
                setattr(config, f"{side}_instruction", own[side])

    @classmethod
    def load(
        cls, model_name_or_path: str, subfolder: str = "", cache_folder: str | None = None, **kwargs: Any
    ) -> MetaEmbedTransformer:
        """Load the module of a saved model. An option that would have no effect is a ValueError."""
        for name, instead in (
            ("processor_kwargs", "pass processing_kwargs={...} to encode_document"),
            ("config_kwargs", "set the fields of encoder[0].model.config after loading"),
            ("backend", 'it has the backend "torch" only'),
        ):
            if (given := kwargs.get(name)) and given != "torch":
                raise ValueError(f"a MetaEmbed model does not take {name}, got {given}: {instead}.")
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        options = {"cache_dir": cache_folder, **where, **(kwargs.get("model_kwargs") or {})}
        return cls(MetaEmbedModel.from_pretrained(model_name_or_path, **options))


def is_one_input(inputs: Any) -> bool:
    """Whether `inputs` is no batch: then sentence-transformers passes it on, and the processor says what is wrong."""
    return is_single(inputs) or not is_batch(inputs) or getattr(inputs, "ndim", 0) == 4


def to_multi_vector_encoder(model: MetaEmbedModel, **kwargs: Any) -> MultiVectorEncoder:
    """Return `model`, shared and not copied, as a `MultiVectorEncoder`, to train, evaluate or save.

    The module's class is loaded from its file as transformers loads a Hub repository's: sentence-transformers then
    saves the file along, and what it saves needs this package no more than what the model saves itself.
    """
    reference = f"{Path(__file__).stem}.{MetaEmbedTransformer.__name__}"
    module_class = get_class_from_dynamic_module(reference, str(Path(__file__).parent))
    # Its trainer reads checkpoints back, to resume or to keep the best: their code is what runs here already.
    options = {"similarity_fn_name": "maxsim", "trust_remote_code": True, **kwargs}
    return MultiVectorEncoder(modules=[module_class(model)], **options)

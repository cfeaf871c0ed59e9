"""The sentence-transformers entry point: a module that makes a MetaEmbedModel a `MultiVectorEncoder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .configuration_metaembed import SIDES
from .inputs_metaembed import InputPolicy, Item, is_batch, is_single
from .modeling_metaembed import MetaEmbedModel, check_finite

try:  # in a `try`, so that transformers does not ask users of AutoModel alone to install it
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError(
        "this entry point needs sentence-transformers: pip install 'sentence-transformers>=6.0'"
    ) from error

try:
    from metaembed.cards import adopt_card
except ImportError:  # without the package, the card that is there is kept
    adopt_card = None

if TYPE_CHECKING:
    from .processing_metaembed import MetaEmbedProcessor

# sentence-transformers' names of where to load from, and transformers'
HUB_NAMES = dict(token="token", cache_folder="cache_dir", revision="revision", local_files_only="local_files_only")


def _num_meta(side: str) -> property:
    def read(self: MetaEmbedTransformer) -> int | None:
        return self.model.config.num_meta(side)

    def write(self: MetaEmbedTransformer, value: int | None) -> None:
        value = None if value is None else self.processor.resolve_num_meta(side, value)
        setattr(self.model.config, f"{side}_num_meta", value)

    return property(read, write, doc=f"Vectors of a {side} where a call names none, saved with the model. None: all.")


class MetaEmbedTransformer(InputModule):
    """Wraps a [`MetaEmbedModel`] as the one module of a `MultiVectorEncoder`.

    Args:
        model: The model, with its processor.

    Example:
        >>> encoder = MultiVectorEncoder("you/your-metaembed", trust_remote_code=True)
        >>> queries = encoder.encode_query(["a red apple"], num_meta=4)  # list of [4, D]
        >>> encoder[0].query_num_meta = 4  # what evaluators, which know no `num_meta`, will use; saved with the model
    """

    forward_kwargs = {"task", "num_meta", "policy"}
    save_in_root = True

    def __init__(self, model: MetaEmbedModel):
        super().__init__()
        self.model = model

    @property
    def processor(self) -> MetaEmbedProcessor:
        """The model's processor."""
        return self.model.processor

    @property
    def policy(self) -> InputPolicy:
        """What may be read and fetched for an input. Not saved."""
        return self.processor.policy

    @policy.setter
    def policy(self, policy: InputPolicy) -> None:
        self.processor.policy = policy

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer."""
        return self.processor.tokenizer

    @property
    def modalities(self) -> list[str]:
        """What inputs may be."""
        pictures = [kind for kind in ("image", "video") if getattr(self.processor, f"{kind}_processor") is not None]
        return ["text", *pictures, "message"]

    @property
    def max_seq_length(self) -> int | None:
        """None: nothing is cut."""
        return None

    query_num_meta, document_num_meta = map(_num_meta, SIDES)

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
            policy: What may be read and fetched. None: `policy` of this module.
            processing_kwargs: `max_length`, and options of the backbone's processor.
            **kwargs: What sentence-transformers sends along for modules of other kinds.

        Returns:
            The model inputs; in `groups`, each with its `rows`, where inputs may not share a batch.

        Raises:
            TypeError: If `processing_kwargs` has what is an argument of its own.
        """
        side = "query" if task == "query" else "document"
        options = {"num_meta": num_meta, "instruction": prompt or None, "policy": policy}
        if own := options.keys() & (processing_kwargs or {}).keys():
            raise TypeError(f"{min(own)} is no option of the processor: pass it outside processing_kwargs.")
        options.update(processing_kwargs or {})
        items = self.processor.parse(inputs)
        groups = self.processor.group(items)
        if len(groups) == 1:
            return self._process(items, side, options)
        parts = [
            {**self._process([items[i] for i in rows], side, {**options, "indices": rows}), "rows": torch.tensor(rows)}
            for rows in groups
        ]
        # The trainer tells the columns of a batch apart by their input_ids, and counts rows by them.
        longest = max((part["input_ids"].shape[1] for part in parts), default=0)
        input_ids = torch.zeros(len(items), longest, dtype=torch.long)
        for part in parts:
            input_ids[part["rows"], : part["input_ids"].shape[1]] = part["input_ids"]
        return {"input_ids": input_ids, "groups": parts}

    def _process(self, items: list[Item], side: str, options: dict[str, Any]) -> dict[str, Any]:
        features = dict(self.processor.process(items, side, **options))
        counts = [item.num_images for item in items]
        if any(counts):  # says which images are whose, where a cached loss cuts the batch into smaller ones
            features["num_images_per_sample"] = torch.tensor(counts)
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return the features with `token_embeddings` [N, r, D] and an `attention_mask` [N, r] that keeps them all.

        Raises:
            ValueError: If, in evaluation mode, an embedding is not finite.
        """
        device = features["input_ids"].device
        parts = features.get("groups", [features])
        embeddings = torch.cat([self._embed(part, device) for part in parts])  # [N, r, D]
        if "groups" in features:
            embeddings = embeddings[torch.cat([part["rows"] for part in parts]).to(device).argsort()]
        if not self.training:
            check_finite(embeddings, list(range(len(embeddings))))
        features["token_embeddings"] = embeddings
        features["attention_mask"] = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return features

    def _embed(self, features: dict[str, Any], device: torch.device) -> Tensor:
        skipped = ("rows", "num_images_per_sample", "task", "modality", "prompt_length", "token_embeddings")
        inputs = {name: value for name, value in features.items() if name not in skipped}
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        if "image_grid_thw" in inputs and not len(inputs["image_grid_thw"]):  # of a mini-batch without images
            inputs = {name: inputs[name] for name in inputs if name not in ("image_grid_thw", "pixel_values")}
        return self.model(**inputs).embeddings

    def on_model_ready(self, model: MultiVectorEncoder) -> None:
        """Let the encoder that this is a module of write our card, and take batches of any kind."""
        if adopt_card is not None:
            adopt_card(model)
        model.is_singular_input = is_one_input

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the model, whole, with the encoder's prompts as the configuration's instructions, but not the card.

        Raises:
            ValueError: If a prompt and the configuration's instruction disagree.
        """
        settings = Path(output_path) / "config_sentence_transformers.json"
        prompts = json.loads(settings.read_text(encoding="utf-8"))["prompts"] if settings.is_file() else {}
        config = self.model.config
        own = {f"{side}_instruction": getattr(config, f"{side}_instruction") for side in SIDES}
        for side, (field, instruction) in zip(SIDES, own.items(), strict=True):
            prompt = prompts.get(side)
            if prompt and instruction and prompt != instruction:
                raise ValueError(
                    f"encoder.prompts[{side!r}] is {prompt!r}, but the {field} of the model's configuration, which "
                    f"other entry points apply, is {instruction!r}. Set encoder[0].model.config.{field} or the prompt."
                )
        try:
            for side, (field, instruction) in zip(SIDES, own.items(), strict=True):
                setattr(config, field, prompts.get(side) or instruction)
            self.model.save_pretrained(output_path, model_card=False)
        finally:  # a checkpoint that is saved on the way must not change what training does
            for field, instruction in own.items():
                setattr(config, field, instruction)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> MetaEmbedTransformer:
        """Load the module of a saved model. An option that would have no effect is a ValueError."""
        refused = (
            (
                "processor_kwargs",
                processor_kwargs,
                'pass processing_kwargs={"max_pixels": 500_000} to encode_document',
            ),
            ("config_kwargs", config_kwargs, "set the fields of encoder[0].model.config after loading"),
            ("backend", None if backend == "torch" else backend, 'it has the backend "torch" only'),
        )
        for name, given, instead in refused:
            if given:
                raise ValueError(f"a MetaEmbed model does not take {name}, got {given}: {instead}.")
        where = {HUB_NAMES[name]: value for name, value in kwargs.items() if name in HUB_NAMES and value is not None}
        return cls(MetaEmbedModel.from_pretrained(model_name_or_path, **where, **(model_kwargs or {})))


def is_one_input(inputs: Any) -> bool:
    """Whether `inputs` is no batch: then sentence-transformers passes it on, and the processor says what is wrong."""
    return is_single(inputs) or not is_batch(inputs) or getattr(inputs, "ndim", 0) == 4


def to_multi_vector_encoder(model: MetaEmbedModel, **kwargs: Any) -> MultiVectorEncoder:
    """Return `model`, shared and not copied, as a `MultiVectorEncoder`, to train, evaluate or save.

    The module's class is loaded from its file as transformers loads a Hub repository's: sentence-transformers then
    saves the file along, and what it saves needs this package no more than what the model saves itself.

    Example:
        >>> encoder = to_multi_vector_encoder(model, device="cpu")
    """
    reference = f"{Path(__file__).stem}.{MetaEmbedTransformer.__name__}"
    module_class = get_class_from_dynamic_module(reference, str(Path(__file__).parent))
    # Its trainer reads checkpoints back, to resume or to keep the best: their code is what runs here already.
    options = {"similarity_fn_name": "maxsim", "trust_remote_code": True, **kwargs}
    return MultiVectorEncoder(modules=[module_class(model)], **options)

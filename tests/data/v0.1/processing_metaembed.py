"""From queries and documents to model inputs that end in Meta Tokens, through the backbone's own processor."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AddedToken, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module

from .configuration_metaembed import SIDES, MetaEmbedConfig, check_count
from .inputs_metaembed import as_batch, count_images, is_single, to_messages

PROCESSOR_FILE = "processor_config.json"

# What processing needs to know of a configuration, saved beside the processor so that it stands on its own.
PROCESSING_FIELDS = (
    "num_query_tokens",
    "num_document_tokens",
    "causal",
    "mixes_images",
    "document_sees_query_tokens",
    "query_token_ids",
    "document_token_ids",
    "query_num_meta",
    "document_num_meta",
    "query_instruction",
    "document_instruction",
)


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


class MetaEmbedProcessor(ProcessorMixin):
    """Turns queries and documents into the inputs of a [`MetaEmbedModel`].

    Wraps the backbone's own processor whole: its chat template renders the input, its image processor and tokenizer
    make the tensors, and everything it returns is passed on. The Meta Tokens of the side come last.

    Args:
        backbone_processor: The backbone's processor (or tokenizer), whose tokenizer holds the Meta Tokens.
        config: The configuration of the model. Only the fields that processing needs are saved with the processor.

    Example:
        >>> inputs = processor.process_queries(["a red apple"], num_meta=4)
        >>> model(**inputs).embeddings.shape
        torch.Size([1, 4, 64])
    """

    _auto_class = "AutoProcessor"

    def __init__(self, backbone_processor: Any, config: MetaEmbedConfig):
        self.backbone_processor = backbone_processor
        self.config = config

    # -- What the backbone's processor is ------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, which holds the Meta Tokens."""
        inner = self.backbone_processor
        return inner if isinstance(inner, PreTrainedTokenizerBase) else inner.tokenizer

    @property
    def image_processor(self) -> Any:
        """The backbone's image processor, or None where it takes no images."""
        return getattr(self.backbone_processor, "image_processor", None)

    @property
    def chat_template(self) -> str | dict | None:
        """The backbone's chat template, or None."""
        return getattr(self.backbone_processor, "chat_template", None) or self.tokenizer.chat_template

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the backbone's processor returns."""
        return self.backbone_processor.model_input_names

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.backbone_processor).__name__})"

    def __call__(self, *args, **kwargs) -> BatchFeature:
        """Call the backbone's processor as it is: no Meta Tokens are added."""
        return self.backbone_processor(*args, **kwargs)

    # -- From inputs to tensors ----------------------------------------------------------------------------------

    def process_queries(self, inputs: Any, num_meta: int | None = None, **kwargs: Any) -> BatchFeature:
        """Turn queries into model inputs that end in query Meta Tokens.

        Args:
            inputs: One query or a list of them: see [`to_messages`] for what a query may be.
            num_meta: r, the number of vectors wanted, 1..R_q. None: the configuration's default, else all.
            **kwargs: See [`process`].

        Returns:
            What the backbone's processor returns, padded on the right: `input_ids` and `attention_mask` [N, L] and,
            for images, `pixel_values` and its companions.

        Raises:
            TypeError: If an input or `num_meta` is of the wrong type.
            ValueError: If there are no inputs, an input cannot be read, or `num_meta` is out of range.
        """
        return self.process(inputs, "query", num_meta, **kwargs)

    def process_documents(self, inputs: Any, num_meta: int | None = None, **kwargs: Any) -> BatchFeature:
        """Turn documents into model inputs that end in document Meta Tokens: see [`process_queries`]."""
        return self.process(inputs, "document", num_meta, **kwargs)

    def process(
        self,
        inputs: Any,
        side: str,
        num_meta: int | None = None,
        *,
        instruction: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn queries or documents into model inputs that end in Meta Tokens.

        Args:
            inputs: One input or a list of them.
            side: "query" or "document".
            num_meta: r, the number of vectors wanted. None: the configuration's default, else all.
            instruction: Text put before the input, on a line of its own. None: the configuration's default; "": none.
            **kwargs: Passed on to the backbone's processor, for this call only (`max_pixels`, `padding_side`, ...).

        Returns:
            The model inputs. Where the backbone is not causal, all Meta Tokens are appended and `num_meta` is among
            the inputs, for the model to slice by.

        Raises:
            TypeError: If an input or `num_meta` is of the wrong type.
            ValueError: If there are no inputs, an input cannot be read, or `num_meta` is out of range.
        """
        items = [inputs] if is_single(inputs) else as_batch(inputs)
        if not items:
            raise ValueError("there is nothing to process: the list of inputs is empty.")
        num_meta = self.resolve_num_meta(side, num_meta)
        if instruction is None:
            instruction = getattr(self.config, f"{side}_instruction")
        prompts, images = [], []
        for index, item in enumerate(items):
            try:
                messages = to_messages(item)
            except (TypeError, ValueError) as error:
                raise type(error)(f"input {index}: {error}") from error
            prompt, pictures = self._render(messages, instruction)
            prompts.append(prompt)
            images.append(pictures)
        suffix = "".join(self._appended_tokens(side, num_meta))
        features = self._call_backbone([prompt + suffix for prompt in prompts], images, prompts[0], kwargs)
        self._check_meta_tokens(features["input_ids"], side, num_meta)
        if not self.config.causal:
            features["num_meta"] = num_meta
        return features

    def resolve_num_meta(self, side: str, num_meta: int | None) -> int:
        """Return the number of vectors of a call: what was asked, else the configuration's default, else all.

        Raises:
            TypeError: If `num_meta` is not a whole number.
            ValueError: If it is outside 1..R.
        """
        if num_meta is None:
            num_meta = self.config.num_meta(side)
        size = self.config.num_tokens(side)
        return size if num_meta is None else check_count(f"num_meta of a {side}", num_meta, size)

    def group(self, inputs: list[Any]) -> list[list[int]]:
        """Split a batch into lists of indices of inputs that may be processed together.

        One list, except where the backbone would let inputs with different numbers of images change each other (or
        refuses them): then one list for each number of images.
        """
        if self.config.mixes_images:
            return [list(range(len(inputs)))]
        groups: dict[int, list[int]] = {}
        for index, item in enumerate(inputs):
            groups.setdefault(count_images(item), []).append(index)
        return list(groups.values())

    def _appended_tokens(self, side: str, num_meta: int) -> list[str]:
        count = num_meta if self.config.causal else self.config.num_tokens(side)
        tokens = meta_token_names(side, count)
        if side == "document" and self.config.document_sees_query_tokens:
            tokens = meta_token_names("query", self.config.num_query_tokens) + tokens
        return tokens

    def _render(self, messages: list[dict], instruction: str | None) -> tuple[str, list]:
        """Render messages to the backbone's prompt, and list their images in order."""
        images, skeleton = [], []
        for message in messages:
            content = []
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(part["image"])
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": self.escape(part["text"])})
            skeleton.append({"role": message["role"], "content": content})
        if instruction:
            first = next((message for message in skeleton if message["role"] == "user"), skeleton[0])
            first["content"].insert(0, {"type": "text", "text": self.escape(instruction) + "\n"})
        if images and self.image_processor is None:
            raise ValueError(f"this backbone takes no images ({type(self.backbone_processor).__name__}).")
        if self.chat_template is None:
            return self._render_plain(skeleton), images
        owner = self.backbone_processor if getattr(self.backbone_processor, "chat_template", None) else self.tokenizer
        if not images and owner is self.tokenizer:  # templates of text-only tokenizers expect strings
            skeleton = [
                {"role": message["role"], "content": "".join(part["text"] for part in message["content"])}
                for message in skeleton
            ]
        return owner.apply_chat_template(skeleton, tokenize=False), images

    def _render_plain(self, messages: list[dict]) -> str:
        placeholder = getattr(self.backbone_processor, "image_token", "")
        parts = [part for message in messages for part in message["content"]]
        return "".join(part["text"] if part["type"] == "text" else placeholder for part in parts)

    def escape(self, text: str) -> str:
        """Break every special token that stands literally in a user's text, so that it stays text.

        A space goes after the token's first character: `<|image_pad|>` becomes `< |image_pad|>`. Otherwise a text
        that quotes a Meta Token or an image placeholder would change the structure of the sequence.
        """
        while self._special_token and self._special_token.search(text):
            text = self._special_token.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text

    @cached_property
    def _special_token(self) -> re.Pattern | None:
        """Matches any token that means structure and not text."""
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens.update(self.tokenizer.all_special_tokens)
        for kind in ("image", "video", "audio"):  # placeholders that a processor searches for as strings
            placeholder = getattr(self.backbone_processor, f"{kind}_token", None)
            tokens.update([placeholder] if isinstance(placeholder, str) else [])
        breakable = sorted((token for token in tokens if len(token.strip()) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, breakable))) if breakable else None

    def _call_backbone(self, texts: list[str], images: list[list], prompt: str, kwargs: dict) -> BatchFeature:
        # Right padding gives equal rows whatever the position embedding is; left padding moves absolute positions.
        kwargs = {"padding": True, "padding_side": "right", "return_tensors": "pt", **kwargs}
        bos = self.tokenizer.bos_token
        if bos and prompt.startswith(bos):  # the chat template wrote it already
            kwargs["add_special_tokens"] = False
        if isinstance(self.backbone_processor, PreTrainedTokenizerBase):
            features = self.backbone_processor(texts, **kwargs)
        else:
            nested = images if any(images) else None  # nested: flat lists are dealt to the wrong texts by some
            try:
                features = self.backbone_processor(text=texts, images=nested, **kwargs)
            except ValueError as error:
                sizes = [[image.size for image in pictures] for pictures in images]
                raise ValueError(
                    f"the backbone's processor refused images of (width, height) {sizes}: {error}"
                ) from error
        features.pop("labels", None)
        return BatchFeature(dict(features))

    def _check_meta_tokens(self, input_ids: torch.Tensor, side: str, num_meta: int) -> None:
        """Every row must hold exactly the Meta Tokens that were appended; a tokenizer or a processor may disagree."""
        expected = num_meta if self.config.causal else self.config.num_tokens(side)
        ids = self.config.token_ids(side)
        counts = ((input_ids >= ids[0]) & (input_ids <= ids[-1])).sum(dim=1)  # [N]
        if (counts != expected).any():
            raise ValueError(
                f"after tokenization, inputs hold {counts.tolist()} {side} Meta Tokens instead of {expected} each. "
                "If you passed `truncation` or `max_length`, they cut the Meta Tokens off: cut the text instead."
            )

    # -- Saving and loading --------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the backbone's processor whole, and beside it what turns it into this one.

        Args:
            save_directory: Folder to write to.
            push_to_hub: Whether to push the folder to the Hub too.
            **kwargs: Passed on to `push_to_hub`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone_processor.save_pretrained(folder)
        path = folder / PROCESSOR_FILE
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        content["metaembed"] = {
            **{name: getattr(self.config, name) for name in PROCESSING_FIELDS},
            "backbone_processor": type(self.backbone_processor).__name__,
            "backbone_auto_map": (content.get("auto_map") or {}).get("AutoProcessor"),
        }
        content["processor_class"] = type(self).__name__
        content["auto_map"] = {"AutoProcessor": f"{Path(__file__).stem}.{type(self).__name__}"}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        custom_object_save(self, folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MetaEmbedProcessor:
        """Load a processor that [`save_pretrained`] wrote.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            **kwargs: Where to load from (`revision`, `cache_dir`, `token`, `local_files_only`, `trust_remote_code`).

        Returns:
            The processor.

        Raises:
            ValueError: If there is no MetaEmbed processor there.
        """
        content, _ = ProcessorMixin.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "metaembed" not in content:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no MetaEmbed processor (no 'metaembed' in {PROCESSOR_FILE}). "
                "To make a MetaEmbed model of a plain backbone, use MetaEmbedModel.from_backbone."
            )
        saved = content["metaembed"]
        if saved["backbone_auto_map"]:
            inner = get_class_from_dynamic_module(saved["backbone_auto_map"], pretrained_model_name_or_path, **kwargs)
        else:
            inner = getattr(transformers, saved["backbone_processor"], AutoTokenizer)
        if isinstance(inner, type) and issubclass(inner, PreTrainedTokenizerBase):
            inner = AutoTokenizer  # it alone knows how to load every tokenizer class
        backbone_processor = inner.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(backbone_processor, MetaEmbedConfig(**{name: saved[name] for name in PROCESSING_FIELDS}))

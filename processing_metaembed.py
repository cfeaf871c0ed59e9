"""From queries and documents to model inputs that end in Meta Tokens, through the backbone's own processor."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import threading
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AddedToken, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers import dynamic_module_utils as remote_code
from transformers.processing_utils import ProcessingKwargs, TextKwargs

from .configuration_metaembed import SIDES, BackboneTraits, MetaEmbedConfig, check_count, of_package
from .inputs_metaembed import SOURCES, InputPolicy, Message, check_text, naming, parse_all, shorten

PROCESSOR_FILE = "processor_config.json"

# What processing needs to know of a configuration, saved beside the processor so that it stands on its own.
_OF_SIDES = ("num_{}_tokens", "{}_token_ids", "{}_num_meta", "{}_instruction")
PROCESSING_FIELDS = ["traits", "document_sees_query_tokens", *(f.format(side) for f in _OF_SIDES for side in SIDES)]

# A call of a tokenizer sets its padding and truncation, which calls of other threads would use.
TOKENIZING = threading.RLock()
if hasattr(os, "register_at_fork"):  # a forked worker must not find it held by a thread that it does not have
    release = TOKENIZING.release
    os.register_at_fork(before=TOKENIZING.acquire, after_in_parent=release, after_in_child=release)


def _of_backbone(name: str, doc: str, other: str = "") -> property:
    return property(lambda self: getattr(inner := self.backbone_processor, name, getattr(inner, other, None)), doc=doc)


class MetaEmbedProcessor(ProcessorMixin):
    """Turns queries and documents into the inputs of a [`MetaEmbedModel`].

    The backbone's own processor does the work: its chat template renders the input, and everything it returns is
    passed on. The Meta Tokens of the side come last.

    Args:
        backbone_processor: The backbone's processor (or tokenizer), whose tokenizer holds the Meta Tokens.
        config: The configuration of the model. Only the fields that processing needs are saved with the processor.
        policy: What may be read and fetched for an input. Not saved.

    Example:
        >>> inputs = processor.process_queries(["a red apple"], num_meta=4)
        >>> model(**inputs).embeddings.shape
        torch.Size([1, 4, 64])
    """

    _auto_class = "AutoProcessor"

    def __init__(self, backbone_processor: Any, config: MetaEmbedConfig, policy: InputPolicy | None = None):
        self.backbone_processor = backbone_processor
        self.config = config
        self.policy = policy or InputPolicy()
        self.heard: dict[str, int] = {}  # with some options: samples of the longest recording that was taken whole
        for name in ("max_length", "pad_to_multiple_of"):  # a tokenizer's None would be every feature extractor's
            if self.tokenizer.init_kwargs.get(name, 0) is None:
                del self.tokenizer.init_kwargs[name]
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` if the tokenizer and the configuration disagree about the Meta Tokens."""
        for side in SIDES:
            ids = self.config.token_ids(side)
            names = meta_token_names(side, self.config.num_tokens(side))
            if ids is not None and (found := self.tokenizer.convert_tokens_to_ids(names)) != list(ids):
                given = f"the tokenizer gives the {side} Meta Tokens the ids {shorten(found)}"
                raise ValueError(f"{given}, but the configuration says {shorten(ids)}: one of them is damaged.")

    image_processor = _of_backbone("image_processor", "The backbone's image processor, or None: it takes no images.")
    video_processor = _of_backbone("video_processor", "The backbone's video processor, or None: it takes no videos.")
    audio_processor = _of_backbone("audio_processor", "Its feature extractor of recordings.", "feature_extractor")
    model_input_names = _of_backbone("model_input_names", "Names of what the backbone's processor returns.")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, which holds the Meta Tokens."""
        return getattr(self.backbone_processor, "tokenizer", self.backbone_processor)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The backbone's chat template, or None."""
        return getattr(self.backbone_processor, "chat_template", None) or self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self.backbone_processor.chat_template = self.tokenizer.chat_template = template

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.backbone_processor).__name__})"

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Call the backbone's processor as it is: no Meta Tokens are added."""
        return self.backbone_processor(*args, **kwargs)

    def process_queries(self, inputs: Any, num_meta: int | None = None, **kwargs: Any) -> BatchFeature:
        """Turn queries into model inputs that end in query Meta Tokens: see [`process`]."""
        return self.process(inputs, "query", num_meta, **kwargs)

    def process_documents(self, inputs: Any, num_meta: int | None = None, **kwargs: Any) -> BatchFeature:
        """Turn documents into model inputs that end in document Meta Tokens: see [`process`]."""
        return self.process(inputs, "document", num_meta, **kwargs)

    def process(
        self,
        inputs: Any,
        side: str,
        num_meta: int | None = None,
        *,
        instruction: str | None = None,
        max_length: int | None = None,
        max_seconds: float | None = None,
        policy: InputPolicy | None = None,
        indices: list[int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn queries or documents into model inputs that end in Meta Tokens. Several threads may call it.

        Args:
            inputs: One input or a list of them, or what [`parse`] returned.
            side: "query" or "document".
            num_meta: r, the number of vectors wanted, 1..R. None: the configuration's default, else all.
            instruction: Text put before the input. None: the configuration's default; "": none.
            max_length: Keep only so many tokens of each input's own text. Nothing else is cut but by `max_seconds`.
            max_seconds: Keep only so many seconds of each recording, from its start.
            policy: What may be read and fetched. None: the processor's own `policy`.
            indices: Number of each input in an error about it. None: 0, 1, ...
            **kwargs: Options of the backbone's processor, for this call only (`max_pixels`, `padding_side`, ...).

        Returns:
            What the backbone's processor returns, padded on the right: `input_ids` and `attention_mask` [N, L],
            `pixel_values`, ... Where the backbone is not causal, also `num_meta`, as all Meta Tokens are appended.

        Raises:
            TypeError: If an input, a number or a keyword is not one that is taken.
            ValueError: If there is no input, one cannot be read, or these may not share a batch (see [`group`]).
        """
        items = parse_all(inputs)
        if not items:
            raise ValueError("there is nothing to process: the list of inputs is empty.")
        num_meta = self.resolve_num_meta(side, num_meta)
        self._check_keywords(kwargs)
        if len(groups := self.group(items)) > 1:
            raise ValueError(
                f"in one batch, these inputs would change each other's embeddings with this backbone. Use "
                f"model.encode_queries and encode_documents, or process by groups, {groups}, as processor.group says."
            )
        instruction = getattr(self.config, f"{side}_instruction") if instruction is None else instruction
        if instruction is not None:
            check_text("instruction", instruction)
        policy = self.policy if policy is None else policy
        indices = indices or list(range(len(items)))
        count = num_meta if self.config.traits.causal else self.config.num_tokens(side)
        appended = "".join(meta_token_names(side, count))
        if side == "document" and self.config.document_sees_query_tokens:
            appended = "".join(meta_token_names("query", self.config.num_query_tokens)) + appended
        texts, loaded, rate = [], [], getattr(self.audio_processor, "sampling_rate", 0)
        with ExitStack() as stack:  # deletes the files of fetched videos
            for index, item in zip(indices, items, strict=True):
                with naming(index):
                    for kind, sources in item.media.items():
                        if sources and not self.takes(kind):
                            raise ValueError(
                                f"{type(self.backbone_processor).__name__} takes no {kind}{'s' * (kind != 'audio')}."
                            )
                    loaded.append(item.load(policy, stack, rate, max_seconds))
                    texts.append(self.prompt(item.messages, instruction, max_length) + appended)
            with TOKENIZING, default_device_cpu():
                features = self._call_backbone(texts, loaded, indices, kwargs)
        self._check_meta_tokens(features["input_ids"], side, count)
        if not self.config.traits.causal:
            features["num_meta"] = num_meta
        return features

    parse = staticmethod(parse_all)  # makes what `process` takes

    def resolve_num_meta(self, side: str, num_meta: int | None) -> int:
        """Return the number of vectors of a call, 1..R: what was asked, else the configuration's default, else all."""
        if num_meta is None:
            num_meta = self.config.num_meta(side)
        size = self.config.num_tokens(side)
        return size if num_meta is None else check_count(f"num_meta of a {side}", num_meta, size)

    def takes(self, kind: str) -> bool:
        """Whether the backbone takes inputs of a kind: "image", "video" or "audio"."""
        return getattr(self, f"{kind}_processor") is not None and (kind != "audio" or self.config.traits.takes_audio)

    def group(self, inputs: Any) -> list[list[int]]:
        """Split a batch into lists of indices of inputs that may be processed together.

        One list, except where images or recordings would change other inputs: then one for each number of them, or,
        where even equal numbers do, for each input with them. A video stands alone: most backbones stack the frames.
        """
        groups, traits = dict[Any, list[int]](), self.config.traits
        for index, item in enumerate(parse_all(inputs)):
            images, audios = item.num_images * (not traits.mixes_images), len(item.audios) * (not traits.mixes_audio)
            alone = item.videos or (images and not traits.batches_images) or (audios and not traits.batches_audio)
            groups.setdefault(("alone", index) if alone else (images, audios), []).append(index)
        return list(groups.values())

    @cached_property
    def _special(self) -> tuple[re.Pattern[str] | None, set[int]]:
        """What matches any string that means structure and not text, and the ids of these strings."""
        tokenizer = self.tokenizer
        tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens.update(tokenizer.all_special_tokens)
        # Placeholders that a processor searches for as strings; not all of them are in the vocabulary.
        places = (value for name, value in vars(self.backbone_processor).items() if name.endswith("_token"))
        tokens.update(place for place in places if isinstance(place, (str, AddedToken)))
        strings = sorted((token for token in map(str, tokens) if len(token.strip()) > 1), key=len, reverse=True)
        ids = set(tokenizer.convert_tokens_to_ids(strings)) - {tokenizer.unk_token_id, None}
        return (re.compile("|".join(map(re.escape, strings))) if strings else None), ids

    def escape(self, text: str) -> str:
        """Break special tokens in a user's text, also those that only normalization would make, so that it stays text.

        Raises:
            ValueError: If the tokenizer makes special tokens of the text however it is broken.
        """
        pattern, special = self._special
        while pattern and pattern.search(text):
            text = pattern.sub(lambda match: break_token(match[0]), text)
        if not self.tokenizer.is_fast:
            return text
        for _ in range(10):
            places = zip(*_tokenize(self.tokenizer, text), strict=True)
            if not (found := [place for token, place in places if token in special]):
                return text
            for start, end in reversed(found):
                text = text[:start] + break_token(text[start:end]) + text[end:]
        raise ValueError(f"the tokenizer makes special tokens of the text {shorten(text)}. Take them out of it.")

    def prompt(self, messages: list[Message], instruction: str | None, max_length: int | None) -> str:
        """Return the prompt of messages: cut, after the instruction, escaped, and as the chat template renders it."""
        if max_length is not None:
            messages = cut_text(messages, self.tokenizer, check_count("max_length", max_length, 2**31))
        user = next((message for message in messages if message["role"] == "user"), messages[0])
        rendered = []
        for message in messages:
            content: list[Any] = []
            before = [{"type": "text", "text": f"{instruction}\n"}] if instruction and message is user else []
            for kind, parts in itertools.groupby([*before, *message["content"]], key=lambda part: part["type"]):
                if kind == "text":  # neighbours as one text, in which no token can hide by being split
                    content.append({"type": "text", "text": self.escape("".join(part["text"] for part in parts))})
                else:
                    content += parts
            rendered.append({"role": message["role"], "content": content})
        return render(self.backbone_processor, rendered)

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        """Raise for a keyword that has no effect (transformers only warns, and once) or a bad one."""
        known, options = _keywords(self.backbone_processor), dict(kwargs)
        for kind in ("images", "videos", "audio", "text"):
            options.update(kwargs.get(f"{kind}_kwargs") or {})
        if unknown := sorted(options.keys() - known):
            name = type(self.backbone_processor).__name__
            raise TypeError(f"{name} knows no keyword {', '.join(unknown)}. It knows {', '.join(sorted(known))}.")
        if options.get("padding_side") == "left" and not self.config.traits.pads_left:
            raise ValueError("this backbone counts padding as positions. Leave the padding on the right.")
        if "truncation" in {**kwargs, **(kwargs.get("text_kwargs") or {})}:
            raise ValueError("`truncation` would cut the Meta Tokens off. To cut only text, use `max_length`.")
        if (tensors := options.get("return_tensors", "pt")) != "pt":
            raise ValueError(f"`return_tensors` must be 'pt', got {tensors!r}. Convert what is returned.")

    def _call_backbone(
        self, texts: list[str], loaded: list[dict[str, list[Any]]], indices: list[int], kwargs: dict[str, Any]
    ) -> BatchFeature:
        inner, traits = self.backbone_processor, self.config.traits
        # Right padding gives equal rows whatever the position embedding is; left padding moves absolute positions.
        kwargs = {"padding": True, "padding_side": "right", "return_tensors": "pt", **kwargs}
        bos = self.tokenizer.bos_token
        if bos and texts[0].startswith(bos):  # the chat template wrote it already
            kwargs["add_special_tokens"] = False
        images, videos, audio = ([each for media in loaded for each in media[kind]] for kind in SOURCES)
        plain = traits.text_through_tokenizer and not (images or videos or audio)
        if plain or isinstance(inner, PreTrainedTokenizerBase):
            known = {name: value for name, value in kwargs.items() if name in TextKwargs.__annotations__}
            if "token_type_ids" in inner.model_input_names:
                known["return_token_type_ids"] = True
            features = self.tokenizer(texts, **known)
        else:
            kwargs = {**(traits.processor_options or {}), **kwargs}
            try:
                if audio:
                    kwargs.setdefault("sampling_rate", self.audio_processor.sampling_rate)
                    # Of texts alone: recordings are padded as their processor's defaults are.
                    kwargs["text_kwargs"] = {"padding": kwargs.pop("padding"), **(kwargs.get("text_kwargs") or {})}
                    of_package("app.audio", "check_heard", needed=True)(self, max(audio, key=len), kwargs)
                    kwargs["audio"] = audio
                if images:
                    kwargs["images"] = [media["image"] for media in loaded] if traits.nests_images else images
                if videos:
                    kwargs["videos"] = [media["video"] for media in loaded]
                if any(isinstance(clip, np.ndarray) for clip in videos):
                    kwargs.setdefault("do_sample_frames", False)  # whoever passes frames has sampled them
                features = inner(text=texts, **kwargs)
            except ImportError:  # says what to install
                raise
            except Exception as error:
                sizes = f"images of (width, height) {[image.size for image in images]}"
                refused = f"inputs {indices} with {sizes} and recordings of {list(map(len, audio))} samples"
                raise ValueError(f"{type(inner).__name__} refused {refused}: {error!r}") from error
        if len(features["input_ids"]) != len(texts):
            raise ValueError(f"{type(inner).__name__} made {len(features['input_ids'])} inputs of {len(texts)}.")
        features.pop("labels", None)
        return BatchFeature(dict(features))

    def _check_meta_tokens(self, input_ids: torch.Tensor, side: str, expected: int) -> None:
        """Every row must hold exactly the Meta Tokens that were appended; a tokenizer or a processor may disagree."""
        ids = self.config.token_ids(side)
        counts = ((input_ids >= ids[0]) & (input_ids <= ids[-1])).sum(dim=1)  # [N]
        if (counts != expected).any():
            found = f"after tokenization, inputs hold {counts.tolist()} {side} Meta Tokens instead of {expected} each"
            raise ValueError(f"{found}. As it is set up, the backbone's processor is not usable for MetaEmbed.")

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save the backbone's processor whole, and what turns it into this one, in the file whose name is returned."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone_processor.save_pretrained(folder)
        path = folder / PROCESSOR_FILE
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        content["metaembed"] = {
            **{name: value for name, value in self.config.to_dict().items() if name in PROCESSING_FIELDS},
            "backbone_processor": type(self.backbone_processor).__name__,
            "backbone_auto_map": (content.get("auto_map") or {}).get("AutoProcessor"),
        }
        content["processor_class"] = type(self).__name__
        content["auto_map"] = {"AutoProcessor": f"{Path(__file__).stem}.{type(self).__name__}"}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        remote_code.custom_object_save(self, folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(path)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MetaEmbedProcessor:
        """Load a processor that [`save_pretrained`] wrote; `kwargs` say where from (`revision`, `token`, ...).

        Raises:
            ValueError: If there is no MetaEmbed processor there, or it names something else as the backbone's.
        """
        source, trusted_base = str(pretrained_model_name_or_path), kwargs.pop("trusted_base", None)
        content, _ = ProcessorMixin.get_processor_dict(source, **kwargs)
        if "metaembed" not in content:
            missing = f"no 'metaembed' in {PROCESSOR_FILE}"
            raise ValueError(f"{source} holds no MetaEmbed processor ({missing}): see MetaEmbedModel.from_backbone.")
        saved = content["metaembed"]
        if reference := saved["backbone_auto_map"]:
            other, elsewhere, _ = reference.partition("--")
            if elsewhere and other not in (source, trusted_base):
                problem = f"the processor of {source} asks for code of another repository, {other}"
                raise ValueError(f"{problem}. If you trust that one too, also pass trusted_base={other!r}.")
            remote_code.resolve_trust_remote_code(kwargs.get("trust_remote_code"), source, False, has_remote_code=True)
            inner = remote_code.get_class_from_dynamic_module(reference, source, **kwargs)
        else:
            inner = getattr(transformers, str(saved["backbone_processor"]), AutoTokenizer)
        kinds = (ProcessorMixin, PreTrainedTokenizerBase, AutoTokenizer)
        if not isinstance(inner, type) or not issubclass(inner, kinds):
            named = f"{source} names {shorten(saved['backbone_processor'])} as its backbone's processor"
            raise ValueError(f"{named}, which is neither a processor nor a tokenizer.")
        if issubclass(inner, PreTrainedTokenizerBase):
            inner = AutoTokenizer  # it alone knows how to load every tokenizer class
        # A field that came later than the checkpoint takes its default; version 0.1 saved the traits flat.
        fields = {name: saved[name] for name in saved if name in {*PROCESSING_FIELDS, *BackboneTraits.__annotations__}}
        return cls(inner.from_pretrained(source, **kwargs), MetaEmbedConfig(**fields))


def default_device_cpu() -> Any:
    """Return a context in which new tensors are on the CPU, whatever `torch.set_default_device` said."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def meta_token_names(side: str, count: int) -> list[str]:
    """Return the Meta Tokens of `side` as they stand in the vocabulary."""
    return [f"<|meta_{side}_{i}|>" for i in range(count)]


def _keywords(processor: Any) -> set[str]:
    """Return every keyword that some part of a processor uses."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return set(TextKwargs.__annotations__)
    kinds = getattr(processor, "valid_processor_kwargs", ProcessingKwargs).__annotations__
    own = [getattr(part, "valid_kwargs", None) for part in vars(processor).values()]
    known = set(kinds).union(*(getattr(kind, "__annotations__", ()) for kind in [*kinds.values(), *own]))
    return known - {"load_audio_from_video", "use_audio_in_video"}  # the model would have to know of it, too


def break_token(token: str) -> str:
    """Return `token` with a space after its first letter: `<|image_pad|>` becomes `< |image_pad|>`."""
    return re.sub(r"^(\s*\S)", r"\1 ", token) if token.strip() else f"{token} "


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a text and, of a fast tokenizer, where each begins and ends in the text."""
    with TOKENIZING:
        if not tokenizer.is_fast:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], []
        backend = tokenizer.backend_tokenizer  # itself, as thousands of messages take seconds through its wrapper
        backend.no_truncation()
        backend.no_padding()
        tokens = backend.encode(text, add_special_tokens=False)
        return tokens.ids, tokens.offsets


def cut_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Message]:
    """Return the messages of one input with the first `max_length` tokens of text, counted over all its parts."""
    messages = copy.deepcopy(messages)
    for part in (part for message in messages for part in message["content"] if part["type"] == "text"):
        ids, places = _tokenize(tokenizer, part["text"])
        if len(ids) > max_length and places:
            part["text"] = part["text"][: [0, *(end for _, end in places)][max_length]]
        elif len(ids) > max_length:
            part["text"] = tokenizer.decode(ids[:max_length])
        max_length -= min(len(ids), max_length)
    return messages


def render(processor: Any, messages: list[Message]) -> str:
    """Return the backbone's prompt of messages, by its chat template if it has one, which may leave nothing out."""
    owner = processor if getattr(processor, "chat_template", None) else getattr(processor, "tokenizer", processor)
    parts = [part for message in messages for part in message["content"]]
    texts = [part["text"].strip() for part in parts if part["type"] == "text"]
    places = {kind: getattr(processor, f"{kind}_token", "") for kind in SOURCES}
    as_strings = [
        {**message, "content": "".join(part.get("text", places.get(part["type"])) for part in message["content"])}
        for message in messages
    ]
    if not owner.chat_template:
        return "\n".join(message["content"] for message in as_strings)
    # Templates for text alone expect strings, and render a list of parts as nothing, or as Python writes a list.
    # A checkpoint's own code runs for those who trust it; the package, which others use, does not trust its template.
    apply = of_package("backbones.templates", "apply_in_time")
    parts_first = owner is processor or len(texts) < len(parts)
    for form in (messages, as_strings) if parts_first else (as_strings, messages):
        prompt = apply(owner.apply_chat_template, form) or owner.apply_chat_template(form, tokenize=False)
        as_python = "[{'type':" in prompt and any(str(message["content"]) in prompt for message in messages)
        if not as_python and _holds(prompt, texts):
            return prompt
    raise ValueError(f"the chat template leaves out what the messages say: {shorten(prompt, 1000)}.")


def _holds(prompt: str, texts: list[str]) -> bool:
    """Whether every text is in the prompt. They nearly always come in order, which takes one pass."""
    place = 0
    for text in texts:
        if (found := prompt.find(text, place)) < 0 and text not in prompt:
            return False
        place = max(found, place)
    return True

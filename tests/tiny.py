"""Tiny, randomly initialised checkpoints of any architecture of transformers, each with its real processor.

The configuration is the architecture's default one, made small by the names of its fields. The processor is the real
one, around a tokenizer trained on the spot with the special tokens of all architectures. Special cases are in
`architectures.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, IMAGE_SIZE, LITERAL, NAMED, PATCH_SIZE, Architecture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

WORDS = "a red apple and the green pear on a blue table, two cats under one chair; what does this picture show?"

CHAT_TEMPLATE = """\
{%- for message in messages -%}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{%- if part['type'] == 'image' -%}IMAGE{%- elif part['type'] == 'video' -%}VIDEO
{%- elif part['type'] == 'audio' -%}AUDIO
{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{% endif %}<|im_end|>
{% endfor -%}"""

SMALL = {
    32: "hidden_size d_model n_embd embed_dim hidden_dim dim out_hidden_size projection_dim vision_output_dim "
    "text_hidden_size output_dim",
    64: "intermediate_size ffn_dim mlp_dim d_ff encoder_ffn_dim decoder_ffn_dim moe_intermediate_size n_inner "
    "shared_expert_intermediate_size projector_hidden_size intermediate_size_mlp dense_intermediate_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size vision_ffn_dim",
    2: "num_hidden_layers n_layer depth num_layers encoder_layers decoder_layers n_layers num_attention_heads "
    "num_heads n_head attention_heads encoder_attention_heads decoder_attention_heads num_key_value_heads "
    "num_global_key_value_heads linear_num_key_heads linear_num_value_heads num_experts_per_tok moe_k moe_topk "
    "top_k_experts",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts",
    16: "head_dim global_head_dim linear_key_head_dim linear_value_head_dim",
    8: "hidden_size_per_layer_input",
    2048: "max_position_embeddings",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}


@functools.cache
def trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [WORDS],
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=list(dict.fromkeys([*NAMED.values(), *LITERAL])),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer.to_str()


def build_tokenizer(**named: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(trained_tokenizer())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    names = {**NAMED, **named}
    standard = {name: names.pop(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=names, model_max_length=2048, **standard
    )


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's dictionary with small sizes, found by the names of its fields."""
    layers = config.get("num_hidden_layers")
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("architectures", "transformers_version", "id2label", "label2id", "per_layer_config"):
            continue
        if isinstance(value, dict):
            small[name] = shrink(value)
        elif (
            isinstance(value, list) and len(value) == layers
        ):  # an entry for each layer: the last two cover every kind
            small[name] = [min(entry, SIZES[name]) if name in SIZES else entry for entry in value[-2:]]
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, SIZES[name])
        else:
            small[name] = value
    if isinstance(config.get("image_size"), int) and isinstance(config.get("patch_size"), int):
        small.update(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    return small


def shrink_images(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Return options of an image or video processor with small images, where their size is fixed."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    size, small = getattr(cls, "size", None), {}
    if isinstance(size, dict) and "height" in size:
        small["size"] = square
    elif isinstance(size, dict) and set(size) == {"shortest_edge"}:
        small["size"] = {"shortest_edge": IMAGE_SIZE}
    if getattr(cls, "crop_size", None):
        small["crop_size"] = square
    return {**small, **options}


def set_path(target: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value


def fill_token_ids(config: dict[str, Any], processor: Any, vocab_size: int) -> None:
    tokenizer = getattr(processor, "tokenizer", processor)
    for name, value in list(config.items()):
        if not isinstance(name, str):
            continue
        if isinstance(value, dict):
            fill_token_ids(value, processor, vocab_size)
        elif name == "vocab_size" or name == "vocab_size_per_layer_input":
            config[name] = vocab_size
        elif name.endswith(("_token_id", "_token_index")):
            token = name.removesuffix("_id").removesuffix("_index")
            known = [getattr(owner, f"{token}_id", None) for owner in (processor, tokenizer)]
            known += [tokenizer.convert_tokens_to_ids(NAMED[token])] if token in NAMED else []
            known = [number for number in known if isinstance(number, int)]
            if known:
                config[name] = known[0]
            elif isinstance(value, int) and not 0 <= value < vocab_size:
                config[name] = tokenizer.pad_token_id


def pick(mapping: dict, model_type: str) -> Any:
    names = mapping.get(model_type)
    if isinstance(names, dict):
        names = names.get("torchvision") or names.get("pil")
    return getattr(transformers, names) if names else None


def build_processor(model_type: str, spec: Architecture) -> Any:
    tokenizer = build_tokenizer(**spec.named)
    model_type = spec.like or model_type
    cls = pick(PROCESSOR_MAPPING_NAMES, model_type)
    if cls is None:
        if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise ValueError("transformers names no processor of its own for it")
        if spec.template:
            tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer
    parts: dict[str, Any] = {}
    for name in cls.get_attributes():
        if name == "tokenizer":
            parts[name] = tokenizer
        elif name.endswith("tokenizer"):  # of another part than the language model
            parts[name] = build_tokenizer(**spec.named)
        elif name == "image_processor":
            parts[name] = pick(IMAGE_PROCESSOR_MAPPING_NAMES, model_type)
            parts[name] = parts[name](**shrink_images(parts[name], spec.image_options))
        elif name == "video_processor":
            parts[name] = pick(VIDEO_PROCESSOR_MAPPING_NAMES, model_type)
            parts[name] = parts[name](**shrink_images(parts[name], spec.video_options))
        elif name == "feature_extractor" or name == "audio_processor":
            hears = pick(FEATURE_EXTRACTOR_MAPPING_NAMES, model_type)
            parts[name] = hears(**spec.audio_options) if hears else None
    processor = cls(**parts, **spec.options)
    if spec.template:
        image = spec.image or getattr(processor, "image_token", "<image>")
        video = spec.video or getattr(processor, "video_token", "<video>")
        audio = spec.audio or getattr(processor, "audio_token", "<audio>")
        processor.chat_template = (
            CHAT_TEMPLATE.replace("IMAGE", str(image)).replace("VIDEO", str(video)).replace("AUDIO", str(audio))
        )
    return processor


def build(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    spec = ARCHITECTURES.get(model_type, Architecture())
    processor = build_processor(model_type, spec)
    cls = CONFIG_MAPPING[model_type]
    content = shrink(cls().to_dict())
    content.pop("model_type")
    for name, part in spec.parts.items():
        content[name] = shrink(CONFIG_MAPPING[part]().to_dict())
    fill_token_ids(content, processor, len(getattr(processor, "tokenizer", processor)))
    tokenizer = getattr(processor, "tokenizer", processor)
    ids: dict[str, Any] = {path: tokenizer.convert_tokens_to_ids(tokens.split()) for path, tokens in spec.ids.items()}
    ids = {path: found if path.endswith("_ids") else found[0] for path, found in ids.items()}
    for path, value in {**spec.config, **ids}.items():
        set_path(content, path, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(cls(**content), dtype=dtype)
        enliven(model)
    return model.eval(), processor


@torch.no_grad()
def enliven(model: PreTrainedModel) -> None:
    """Draw weights so that every part of a tiny model matters: 0.02 is for wide models, and gates start closed."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3 if "embed" in name else parameter[0].numel() ** -0.5)
        elif not name.endswith("bias") and not parameter.any():
            parameter.fill_(0.5)

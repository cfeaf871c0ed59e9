"""Tiny, randomly initialised checkpoints of any architecture of transformers, each with its real processor.

A configuration is the architecture's default one made small by the names of its fields; the processor is the real
one, around a tokenizer trained on the spot that knows the special tokens of all of them. What remains to be said of
an architecture stands in ARCHITECTURES.
"""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

WORDS = "a red apple and the green pear on a blue table, two cats under one chair; what does this picture show?"

# What tokenizers call the special tokens that processors ask them for.
NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<audio>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "sep_token": "<sep>",
    "image_start_token": "<image_start>",
    "image_end_token": "<image_end>",
    "image_break_token": "<image_break>",
    "image_wrapper_token": "<image_wrapper>",
    "image_boundary_token": "<fake_token_around_image>",
    "img_line_break_token": "<line_break>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "eof_token": "<eof>",
    "video_start_token": "<video_start>",
    "video_end_token": "<video_end>",
    "vision_start_token": "<vision_start>",
    "vision_end_token": "<vision_end>",
    "vision_bos_token": "<vision_start>",
    "vision_eos_token": "<vision_end>",
    "audio_bos_token": "<boa>",
    "audio_eos_token": "<eoa>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}

# Special tokens that processors ask for by their text.
LITERAL = (
    """
<|im_start|> <|im_end|> <|endoftext|> <|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|> <|begin_of_text|> <|python_tag|>
<|image|> <|video|> <|audio|> <|IMG_PATCH|> <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_LINE_BREAK|> TILE_GLOBAL TILE <end_of_utterance>
<fake_token_around_image> <global-img> <|image_start|> <|image_end|> <|img_thumbnail|> <|patch|> <|tile_x_separator|> <|tile_y_separator|>
[IMG] [IMG_BREAK] [IMG_END] <imgpad> <|media_pad|> <|kimi_k25_video_placeholder|> <|imgpad|> <|audio_comp_pad|> <|begin_of_video|>
<|end_of_video|> <|begin_of_image|> <|end_of_image|> <IMG_COL> <IMG_END> <IMG_ROW> <IMG_PRE> <IMG_START> <im_patch> <im_start>
<im_end> <im_col> <im_low> <low_res_im_start> <frame_start> <frame_end> <patch_newline> <|vid_start|> <|vid_end|>
<|vid_frame_separator|> <|unused_200053|> <|unused_200054|> <|content_image|> <|content_audio_input|> <|IMAGE_PAD|> <|VIDEO_PAD|>
<|VISION_START|> <|VISION_END|> <racm3:break> <eoss> <|video_duration|> [CLS] [SEP] [MASK] |SPEAKER| |NEWLINE| <IMG_ATOM> <IMG_GRID> ]<]image[>[ ]<]video[>[ <|extra_200|> <row_1_col_1>
""".split()
    + [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{%- if part['type'] == 'image' -%}IMAGE{%- elif part['type'] == 'video' -%}VIDEO
{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{% endif %}<|im_end|>
{% endfor -%}"""

IMAGE_SIZE, PATCH_SIZE = 56, 14  # of towers that take one size only: 16 patches

SMALL = {
    32: "hidden_size d_model n_embd embed_dim hidden_dim dim out_hidden_size projection_dim vision_output_dim "
    "text_hidden_size output_dim",
    64: "intermediate_size ffn_dim mlp_dim d_ff encoder_ffn_dim decoder_ffn_dim moe_intermediate_size n_inner "
    "shared_expert_intermediate_size projector_hidden_size intermediate_size_mlp dense_intermediate_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size vision_ffn_dim",
    2: "num_hidden_layers n_layer depth num_layers encoder_layers decoder_layers n_layers num_attention_heads num_heads "
    "n_head attention_heads encoder_attention_heads decoder_attention_heads num_key_value_heads "
    "num_global_key_value_heads linear_num_key_heads linear_num_value_heads num_experts_per_tok moe_k moe_topk top_k_experts",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts",
    16: "head_dim global_head_dim linear_key_head_dim linear_value_head_dim",
    8: "hidden_size_per_layer_input",
    2048: "max_position_embeddings",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}


@dataclass(frozen=True)
class Architecture:
    """What is to be said of an architecture beyond its name.

    Args:
        config: Fields of the configuration to set, by dotted path.
        image: What an image is in a prompt. "": the processor's own placeholder; None: it takes no images.
        video: The same for a video.
        image_options: For the image processor.
        video_options: For the video processor.
        options: For the processor.
        template: Whether the processor has a chat template.
        tokenizer: Class of the tokenizer where the processor insists on one.
    """

    config: dict[str, Any] = field(default_factory=dict)
    image: str | None = ""
    video: str | None = None
    image_options: dict[str, Any] = field(default_factory=dict)
    video_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    template: bool = True
    named: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    like: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    indicators: str = ""


MROPE = {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN = dict(image="<|vision_start|><|image_pad|><|vision_end|>", video="<|vision_start|><|video_pad|><|vision_end|>")
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2

HALF_MROPE = {
    "text_config.rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    }
}
GLM_TOKENS = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
GLM = dict(image="<|begin_of_image|><|image|><|end_of_image|>", video="<|begin_of_video|><|video|><|end_of_video|>")
ENCODER_FLAT = {"pad_token_id": 2, "cls_token_id": 0, "sep_token_id": 0, "reference_compile": False}
ENCODER = {f"text_config.{name}": value for name, value in ENCODER_FLAT.items()}
LLAVA = {"patch_size": PATCH_SIZE, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
GRID = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
LATENT_FLAT = {
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
}
LATENT = {f"text_config.{name}": value for name, value in LATENT_FLAT.items()}

ARCHITECTURES: dict[str, Architecture] = {
    "qwen2_5_vl": Architecture(config=MROPE, named=QWEN_TOKENS, **QWEN),
    "qwen2_vl": Architecture(config=MROPE, named=QWEN_TOKENS, **QWEN),
    "qwen3_vl": Architecture(
        config=MROPE, named=QWEN_TOKENS, image_options={"patch_size": 16}, video_options={"patch_size": 16}, **QWEN
    ),
    "qwen3_5": Architecture(
        named=QWEN_TOKENS, image_options={"patch_size": 16}, video_options={"patch_size": 16}, **QWEN
    ),
    "paligemma": Architecture(
        config={"projection_dim": 32}, image_options={"image_seq_length": PATCHES}, template=False
    ),
    "mllama": Architecture(
        named={"image_token": "<|image|>"},
        config={
            "vision_config.image_size": 56,
            "text_config.cross_attention_layers": [1],
            "text_config.num_hidden_layers": 2,
            "vision_config.intermediate_layers_indices": [0],
            "vision_config.vision_output_dim": 64,
            "vision_config.num_global_layers": 1,
        },
    ),
    "llava": Architecture(options=LLAVA),
    "vipllava": Architecture(config={"vision_feature_layers": [-1, -2]}, options=LLAVA),
    "llava_next": Architecture(config=GRID, image_options=GRID, options=LLAVA),
    "llava_next_video": Architecture(config=GRID, image_options=GRID, options=LLAVA, video="<video>"),
    "llava_onevision": Architecture(
        config=GRID,
        image_options=GRID,
        options={"num_image_tokens": PATCHES, "vision_feature_select_strategy": "full"},
        video="<video>",
    ),
    "aria": Architecture(
        config={"vision_config.image_size": 490, "vision_config.patch_size": 14}, image_options={"max_image_size": 490}
    ),
    "aya_vision": Architecture(
        options={"patch_size": PATCH_SIZE, "img_size": IMAGE_SIZE, "downsample_factor": 2},
        image_options={"max_patches": 2},
    ),
    "cohere2_vision": Architecture(image_options={"patch_size": 2, "max_patches": 2}),
    "internvl": Architecture(
        config={"vision_config.image_size": [56, 56], "vision_config.patch_size": [14, 14]},
        options={"image_seq_length": 4},
        image_options={"max_patches": 2},
    ),
    "qianfan_ocr": Architecture(
        config={"vision_config.image_size": [56, 56], "vision_config.patch_size": [14, 14]},
        options={"image_seq_length": 4},
        image_options={"max_patches": 2},
        image="<image>",
    ),
    "deepseek_vl": Architecture(options={"num_image_tokens": PATCHES}),
    "janus": Architecture(options={"num_image_tokens": PATCHES}),
    "got_ocr2": Architecture(
        config={
            "vision_config.image_size": 1024,
            "vision_config.patch_size": 16,
            "vision_config.global_attn_indexes": [],
        },
        image_options={"size": {"height": 1024, "width": 1024}},
        image="<img><imgpad></img>",
    ),
    "mistral3": Architecture(
        options={"patch_size": 14, "spatial_merge_size": 2},
        image_options={"size": {"longest_edge": 112}},
        named={"image_token": "[IMG]"},
        ids={"image_token_index": "[IMG]"},
    ),
    "gemma3": Architecture(
        config={"mm_tokens_per_image": 4},
        options={"image_seq_length": 4},
        ids={"image_token_id": "<image>", "image_token_index": "<image>"},
    ),
    "idefics3": Architecture(
        options={"image_seq_len": 4},
        image_options={"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
    ),
    "smolvlm": Architecture(
        options={"image_seq_len": 4},
        image_options={"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
    ),
    "granite_docling": Architecture(
        options={"image_seq_len": 1},
        image_options={"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
    ),
    "lfm3_vl": Architecture(
        image_options={"patch_size": 16}, video_options={"patch_size": 16}, named=QWEN_TOKENS, **QWEN
    ),
    "qwen3_5_moe": Architecture(
        named=QWEN_TOKENS, image_options={"patch_size": 16}, video_options={"patch_size": 16}, **QWEN
    ),
    "qwen4_exp": Architecture(
        named=QWEN_TOKENS, image_options={"patch_size": 16}, video_options={"patch_size": 16}, **QWEN
    ),
    "qwen3_vl_moe": Architecture(
        like="qwen3_vl",
        config=MROPE,
        named=QWEN_TOKENS,
        image_options={"patch_size": 16},
        video_options={"patch_size": 16},
        **QWEN,
    ),
    "cosmos3_omni": Architecture(
        like="qwen3_vl",
        config=MROPE,
        named=QWEN_TOKENS,
        image_options={"patch_size": 16},
        video_options={"patch_size": 16},
        **QWEN,
    ),
    "cosmos3_edge": Architecture(config=MROPE, named=QWEN_TOKENS, **QWEN),
    "video_llama_3": Architecture(image_options={"patch_size": 16}, video_options={"patch_size": 16}),
    "video_llava": Architecture(
        image_options={"size": {"height": 56, "width": 56}, "crop_size": {"height": 56, "width": 56}}, options=LLAVA
    ),
    "step3p7": Architecture(config={"text_config.sliding_window": 64}),
    "llama4": Architecture(
        config={
            "vision_config.intermediate_size": 128,
            "vision_config.projector_input_dim": 32,
            "vision_config.projector_output_dim": 32,
            "vision_config.vision_output_dim": 32,
        },
        ids={"image_token_index": "<|patch|>"},
    ),
    "glm4v": Architecture(config=MROPE, named=GLM_TOKENS, **GLM),
    "glm46v": Architecture(config=MROPE, named=GLM_TOKENS, **GLM),
    "glm4v_moe": Architecture(config=HALF_MROPE, like="glm4v", named=GLM_TOKENS, **GLM),
    "glm_ocr": Architecture(config=MROPE, like="glm46v", named=GLM_TOKENS, **GLM),
    "glmga": Architecture(config=MROPE, like="glm46v", named=GLM_TOKENS, **GLM),
    "paddleocr_vl": Architecture(config=MROPE, image="<vision_start><image><vision_end>"),
    "kimi_k25": Architecture(
        config={**LATENT, "projection_hidden_size": 32, "vision_config.projection_hidden_size": 32}
    ),
    "muse_glimmer": Architecture(config={"out_hidden_size": 128}),
    "muse_spark": Architecture(config={"out_hidden_size": 128}),
    "molmo2": Architecture(
        config={"adapter_config.vision_feature_layer": [-1, 0], "adapter_config.text_hidden_size": 32},
        ids={
            "image_patch_id": "<im_patch>",
            "image_start_token_id": "<im_start>",
            "low_res_image_start_token_id": "<low_res_im_start>",
            "image_end_token_id": "<im_end>",
            "image_low_res_id": "<im_low>",
            "image_col_id": "<im_col>",
            "frame_start_token_id": "<frame_start>",
            "frame_end_token_id": "<frame_end>",
        },
    ),
    "ovis2": Architecture(
        options={"image_seq_length": 16},
        ids={"image_token_id": "<IMG_ATOM>"},
        config={"vision_config.num_visual_indicator_tokens": 5},
        indicators="<IMG_START> <IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END>",
    ),
    "granite4_vision": Architecture(
        config={
            **GRID,
            "deepstack_layer_map": [[-1, 0]],
            "downsample_rate": "2/4",
            "vision_config.hidden_size": 64,
            "spatial_target_layers": [1],
            "vision_feature_layer": -1,
        },
        image_options=GRID,
        options={**LLAVA, "downsample_rate": "2/4"},
    ),
    "cohere_compass": Architecture(
        image="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        video="<|VISION_START|><|VIDEO_PAD|><|VISION_END|>",
        named={
            "image_token": "<|IMAGE_PAD|>",
            "video_token": "<|VIDEO_PAD|>",
            "vision_start_token": "<|VISION_START|>",
            "vision_end_token": "<|VISION_END|>",
        },
        image_options={"patch_size": 16},
        video_options={"patch_size": 16},
        config={
            "text_config.rope_parameters": {
                kind: MROPE["text_config.rope_parameters"] for kind in ("full_attention", "sliding_attention")
            }
        },
    ),
    "ernie4_5_vl_moe": Architecture(
        config={
            "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
        },
        image="<image_start><image><image_end>",
        video_options={"draw_on_frames": False},
    ),
    "deepseek_ocr2": Architecture(
        config={
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "text_config.num_experts_per_tok": 2,
            "text_config.n_routed_experts": 4,
            "text_config.num_local_experts": 4,
        }
    ),
    "hunyuan_vl": Architecture(
        config={
            "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}
        }
    ),
    "dots3_note": Architecture(
        config={
            "vision_config.adapter_in_dim": 32,
            "vision_config.adapter_out_dim": 32,
            "vision_config.adapter_input_size": 32,
            "vision_config.adapter_output_size": 32,
        }
    ),
    "gemma4": Architecture(parts={"vision_config": "gemma4_vision"}, image_options={"max_soft_tokens": 70}),
    "gemma4_unified": Architecture(
        parts={"vision_config": "gemma4_unified_vision"}, image_options={"max_soft_tokens": 70}
    ),
    "minimax_m3_vl": Architecture(),
    "qwen4_exp": Architecture(
        named=QWEN_TOKENS,
        image_options={"patch_size": 16},
        video_options={"patch_size": 16},
        config={
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 16,
            "text_config.indexer_budget": 64,
            "text_config.indexer_compress_ratio": 4,
        },
        **QWEN,
    ),
    "inkling2": Architecture(image_options={"size": None}),
    "modernvbert": Architecture(
        options={"image_seq_len": 1},
        image_options={"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
        like="idefics3",
        config=ENCODER,
    ),
    "qwen3": Architecture(),
    "llama": Architecture(template=False),
    "bert": Architecture(template=False, config={"max_position_embeddings": 2048}),
    "modernbert": Architecture(template=False, config=ENCODER_FLAT),
}


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
    """Return the dictionary of a configuration with its sizes made small, by the names of its fields."""
    layers = config.get("num_hidden_layers")
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("architectures", "transformers_version", "id2label", "label2id", "per_layer_config"):
            continue
        if isinstance(value, dict):
            small[name] = shrink(value)
        elif isinstance(value, list) and len(value) == layers:  # one entry a layer: the last ones show every kind
            small[name] = [min(entry, SIZES[name]) if name in SIZES else entry for entry in value[-2:]]
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, SIZES[name])
        else:
            small[name] = value
    if isinstance(config.get("image_size"), int) and isinstance(config.get("patch_size"), int):
        small.update(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    return small


def shrink_images(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Return options of an image or video processor whose pictures have a fixed size, for small ones."""
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
        elif name == "image_processor":
            parts[name] = pick(IMAGE_PROCESSOR_MAPPING_NAMES, model_type)
            parts[name] = parts[name](**shrink_images(parts[name], spec.image_options))
        elif name == "video_processor":
            parts[name] = pick(VIDEO_PROCESSOR_MAPPING_NAMES, model_type)
            parts[name] = parts[name](**shrink_images(parts[name], spec.video_options))
        elif name == "feature_extractor" or name == "audio_processor":
            parts[name] = pick(FEATURE_EXTRACTOR_MAPPING_NAMES, model_type)()
    processor = cls(**parts, **spec.options)
    if spec.template:
        image = spec.image or getattr(processor, "image_token", "<image>")
        video = spec.video or getattr(processor, "video_token", "<video>")
        processor.chat_template = CHAT_TEMPLATE.replace("IMAGE", image).replace("VIDEO", str(video))
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
    ids = {path: tokenizer.convert_tokens_to_ids(token) for path, token in spec.ids.items()}
    if spec.indicators:
        ids["visual_indicator_token_ids"] = tokenizer.convert_tokens_to_ids(spec.indicators.split())
    for path, value in {**spec.config, **ids}.items():
        set_path(content, path, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(cls(**content), dtype=dtype)
        enliven(model)
    return model.eval(), processor


@torch.no_grad()
def enliven(model: PreTrainedModel) -> None:
    """Draw weights so that every part of a tiny model matters: the usual 0.02 suits wide ones, gates start closed."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3 if "embed" in name else parameter[0].numel() ** -0.5)
        elif not name.endswith("bias") and not parameter.any():
            parameter.fill_(0.5)

"""Special cases of `tiny.py`: the fields it needs, beyond the name, to build a tiny model of an architecture.

An architecture without a special case has no entry. To add one, name the fewest fields of [`Architecture`] that let
`from_backbone` pass, and build on an entry with the same processor (`replace(QWEN2, ...)`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

IMAGE_SIZE, PATCH_SIZE = 56, 14  # for vision towers with a fixed size: 16 patches
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2

# Names under which processors ask the tokenizer for special tokens.
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
SPECIAL = (
    "<|im_start|> <|im_end|> <|endoftext|> <|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|> "
    "<|begin_of_text|> <|python_tag|> <|image|> <|video|> <|audio|> <|IMG_PATCH|> <|START_OF_IMG|> "
    "<|END_OF_IMG|> <|IMG_LINE_BREAK|> TILE_GLOBAL TILE <end_of_utterance> <fake_token_around_image> "
    "<global-img> <|image_start|> <|image_end|> <|img_thumbnail|> <|patch|> <|tile_x_separator|> "
    "<|tile_y_separator|> [IMG] [IMG_BREAK] [IMG_END] <imgpad> <|media_pad|> <|kimi_k25_video_placeholder|> "
    "<|imgpad|> <|audio_comp_pad|> <|begin_of_video|> <|end_of_video|> <|begin_of_image|> <|end_of_image|> "
    "<IMG_COL> <IMG_END> <IMG_ROW> <IMG_PRE> <IMG_START> <im_patch> <im_start> <im_end> <im_col> <im_low> "
    "<low_res_im_start> <frame_start> <frame_end> <patch_newline> <|vid_start|> <|vid_end|> "
    "<|AUDIO|> <|audio_bos|> <|audio_eos|> <sound> <|pad|> <|audio_pad|> <|begin_of_audio|> <|end_of_audio|> "
    "<|vid_frame_separator|> <|unused_200053|> <|unused_200054|> <|content_image|> <|content_audio_input|> "
    "<|IMAGE_PAD|> <|VIDEO_PAD|> <|VISION_START|> <|VISION_END|> <racm3:break> <eoss> <|video_duration|> "
    "[CLS] [SEP] [MASK] |SPEAKER| |NEWLINE| <IMG_ATOM> <IMG_GRID> ]<]image[>[ ]<]video[>[ <|extra_200|> "
)
LITERAL = SPECIAL.split() + [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]


@dataclass(frozen=True)
class Architecture:
    """A special case of an architecture.

    Args:
        config: Fields of the configuration to set, by dotted path.
        parts: Parts of the configuration to add, and their model types.
        ids: Fields of the configuration for the ids of these tokens (one, or several separated by spaces).
        image: The placeholder of an image in a prompt. "": the processor's own.
        video: The placeholder of a video. "": the processor's own.
        audio: The placeholder of a recording. "": the processor's own.
        image_options: Options for the image processor.
        video_options: Options for the video processor.
        audio_options: Options for the feature extractor of recordings.
        options: Options for the processor.
        named: The tokenizer's names for special tokens, where they differ from NAMED.
        template: Whether the processor has a chat template.
        like: The model type whose processor it uses, where it has none of its own.
    """

    config: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    image: str = ""
    video: str = ""
    audio: str = ""
    image_options: dict[str, Any] = field(default_factory=dict)
    video_options: dict[str, Any] = field(default_factory=dict)
    audio_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    template: bool = True
    like: str | None = None


def text(**fields: Any) -> dict[str, Any]:
    """Return fields of the language model's configuration by their paths."""
    return {f"text_config.{name}": value for name, value in fields.items()}


def vision(**fields: Any) -> dict[str, Any]:
    """Return fields of the vision tower's configuration by their paths."""
    return {f"vision_config.{name}": value for name, value in fields.items()}


def rope(*sections: int, **more: Any) -> dict[str, Any]:
    """Return settings of rotary position embeddings in sections, for heads of 16 dimensions."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


MROPE = text(rope_parameters=rope(2, 3, 3))
PATCH_16 = {"image_options": {"patch_size": 16}, "video_options": {"patch_size": 16}}
QWEN2 = Architecture(
    image="<|vision_start|><|image_pad|><|vision_end|>",
    video="<|vision_start|><|video_pad|><|vision_end|>",
    named={
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
    config=MROPE,
)
QWEN3 = replace(QWEN2, **PATCH_16)
QWEN3_5 = replace(QWEN3, config={})
HEARD = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
OMNI = {
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "named": {
        **QWEN2.named,
        **HEARD,
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    },
    "audio_options": {"feature_size": 128},
    "ids": {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
    },
    "like": "qwen2_5_omni",
}
WHISPER = Architecture(audio_options={"feature_size": 128})
COMPASS = {
    "image_token": "<|IMAGE_PAD|>",
    "video_token": "<|VIDEO_PAD|>",
    "vision_start_token": "<|VISION_START|>",
    "vision_end_token": "<|VISION_END|>",
}
GLM = Architecture(
    image="<|begin_of_image|><|image|><|end_of_image|>",
    video="<|begin_of_video|><|video|><|end_of_video|>",
    named={
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    },
    config=MROPE,
)
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
SMALL_SQUARE = {"height": 40, "width": 40}
LLAVA = {"patch_size": PATCH_SIZE, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
GRID = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": IMAGE_SIZE}}
IDEFICS = Architecture(options={"image_seq_len": 4}, image_options=TILES)
ENCODER = dict(pad_token_id=2, cls_token_id=0, sep_token_id=0, reference_compile=False)
LATENT = dict(qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, head_dim=16, kv_lora_rank=16, q_lora_rank=16)
INTERNVL = Architecture(
    config=vision(image_size=[IMAGE_SIZE] * 2, patch_size=[PATCH_SIZE] * 2),
    options={"image_seq_length": 4},
    image_options={"max_patches": 2},
)

ARCHITECTURES: dict[str, Architecture] = {
    "aria": Architecture(config=vision(image_size=490, patch_size=14), image_options={"max_image_size": 490}),
    "aya_vision": Architecture(
        options={"patch_size": PATCH_SIZE, "img_size": IMAGE_SIZE, "downsample_factor": 2},
        image_options={"max_patches": 2},
    ),
    "audioflamingo3": WHISPER,
    "bert": Architecture(template=False, config={"max_position_embeddings": 2048}),
    "chameleon": Architecture(
        config={
            "vocabulary_map": {"<image>": 4, **{f"IMGIMG{chr(ord('A') + i)}Z": 100 + i for i in range(10)}},
            "vq_config.num_embeddings": 10,
            "vq_config.base_channels": 32,
            "vq_config.embed_dim": 32,
        },
        options={"image_seq_length": 9},
    ),
    "cohere2_vision": Architecture(image_options={"patch_size": 2, "max_patches": 2}),
    "cohere_compass": Architecture(
        image="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        video="<|VISION_START|><|VIDEO_PAD|><|VISION_END|>",
        named=COMPASS,
        config=text(rope_parameters={"full_attention": rope(2, 3, 3), "sliding_attention": rope(2, 3, 3)}),
        **PATCH_16,
    ),
    "cosmos3_edge": QWEN2,
    "cosmos3_omni": replace(QWEN3, like="qwen3_vl"),
    "deepseek_ocr2": Architecture(
        config={
            **text(mlp_layer_types=["dense", "sparse"], num_experts_per_tok=2),
            "vision_config.sam_config.downsample_channels": [512, 32],
        },
        image_options={"size": {"height": 1024, "width": 1024}},
    ),
    "deepseek_vl": Architecture(options={"num_image_tokens": PATCHES}),
    "deepseek_vl_hybrid": Architecture(
        config={
            "high_res_vision_config.image_size": 1024,
            "high_res_vision_config.patch_size": 16,
            "high_res_vision_config.global_attn_indexes": [0],
        },
        options={"num_image_tokens": PATCHES},
    ),
    "diffusion_gemma": Architecture(
        like="gemma4",
        parts={"vision_config": "gemma4_vision"},
        image_options={"max_soft_tokens": 70},
        config=text(num_experts=4, top_k_experts=2, moe_intermediate_size=32),
    ),
    "dots3_note": Architecture(
        image="<|imgpad|>",
        audio="<|audio_comp_pad|>",
        config={
            "vision_config.adapter_in_dim": 32,
            "vision_config.adapter_out_dim": 32,
            "audio_config.adapter_input_size": 32,
            "audio_config.adapter_out_dim": 32,
            "audio_config.downsample_hidden_size": 32,
            **text(**LATENT),
        },
        image_options={"temporal_patch_size": 1},
        video_options={"patch_size": PATCH_SIZE, "temporal_patch_size": 1},
    ),
    "embedding_gemma2": Architecture(
        parts={"vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
        image_options={"max_soft_tokens": 70},
    ),
    "emu3": Architecture(
        config={
            "vocabulary_map": {
                "<image>": 4,
                "<|extra_200|>": 5,
                **{f"<|visual token {i:06d}|>": 100 + i for i in range(10)},
            },
            "vq_config.codebook_size": 10,
            "vq_config.base_channels": 32,
            "vq_config.embed_dim": 32,
            "vq_config.hidden_size": 128,
        },
        image_options={"min_pixels": 64 * 64, "max_pixels": 128 * 128},
    ),
    "ernie4_5_vl_moe": Architecture(
        config=text(rope_parameters=rope(3, 3, 2)),
        image="<image_start><image><image_end>",
        video_options={"draw_on_frames": False},
    ),
    "fuyu": Architecture(image="\n", image_options={"size": {"height": 60, "width": 60}}),
    "gemma3": Architecture(
        config={"mm_tokens_per_image": 4},
        options={"image_seq_length": 4},
        ids={"image_token_id": "<image>", "image_token_index": "<image>"},
    ),
    "gemma4": Architecture(
        parts={"vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
        image_options={"max_soft_tokens": 70},
    ),
    "gemma4_unified": Architecture(
        parts={"vision_config": "gemma4_unified_vision", "audio_config": "gemma4_unified_audio"},
        image_options={"max_soft_tokens": 70},
    ),
    "glm46v": GLM,
    "glm4v": GLM,
    "glm4v_moe": replace(GLM, config=text(rope_parameters=rope(1, 1, 2, partial_rotary_factor=0.5)), like="glm4v"),
    "glm5_next": Architecture(
        config=text(q_lora_rank=16, index_head_dim=64, index_n_heads=2, linear_head_dim=16, linear_num_heads=2)
    ),
    "glm_ocr": replace(GLM, like="glm46v"),
    "glmasr": replace(WHISPER, config={"audio_config.intermediate_size": 128}),
    "glmga": replace(GLM, like="glm46v"),
    "got_ocr2": Architecture(
        config=vision(image_size=1024, patch_size=16, global_attn_indexes=[]),
        image_options={"size": {"height": 1024, "width": 1024}},
        image="<img><imgpad></img>",
    ),
    "granite4_vision": Architecture(
        config={
            **GRID,
            **vision(hidden_size=64),
            "deepstack_layer_map": [[-1, 0]],
            "downsample_rate": "2/4",
            "spatial_target_layers": [1],
            "vision_feature_layer": -1,
        },
        image_options=GRID,
        options={**LLAVA, "downsample_rate": "2/4"},
    ),
    "granite_docling": Architecture(  # its own factors are made for wide layers: here they would hide all but the ids
        config=text(embedding_multiplier=1.0, residual_multiplier=1.0, attention_multiplier=0.25),
        options={"image_seq_len": 1},
        image_options={"max_patches": 2},
    ),
    "hunyuan_vl": Architecture(
        config=text(head_dim=16, rope_parameters=rope(2, 2, 2, 2)), image="<image_start><image><image_end>"
    ),
    "idefics3": IDEFICS,
    "inkling2": Architecture(image_options={"size": SMALL_SQUARE}),
    "inkling_mm_model": Architecture(image_options={"size": SMALL_SQUARE}),
    "internvl": INTERNVL,
    "janus": Architecture(options={"num_image_tokens": PATCHES}),
    "kimi_k25": Architecture(
        config={**text(**LATENT), **vision(projection_hidden_size=32), "projection_hidden_size": 32}
    ),
    "lfm3_vl": QWEN3_5,
    "llama": Architecture(template=False),
    "llama4": Architecture(
        config=vision(intermediate_size=128, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32),
        ids={"image_token_index": "<|patch|>"},
    ),
    "llava": Architecture(options=LLAVA),
    "llava_next": Architecture(config=GRID, image_options=GRID, options=LLAVA),
    "llava_next_video": Architecture(config=GRID, image_options=GRID, options=LLAVA),
    "llava_onevision": Architecture(
        config=GRID,
        image_options=GRID,
        options={"num_image_tokens": PATCHES, "vision_feature_select_strategy": "full"},
    ),
    "mistral3": Architecture(
        options={"patch_size": PATCH_SIZE, "spatial_merge_size": 2},
        image_options={"size": {"longest_edge": 112}},
        named={"image_token": "[IMG]"},
        ids={"image_token_index": "[IMG]"},
    ),
    "mistral4": Architecture(like="llama", config={**LATENT, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}),
    "mistral_large4": Architecture(
        config=text(kv_source_layers=[0, 1], **LATENT),
        options={"patch_size": PATCH_SIZE, "spatial_merge_size": 2},
        image_options={"size": {"longest_edge": 112}},
        named={"image_token": "[IMG]"},
        ids={"image_token_index": "[IMG]", "image_token_id": "[IMG]"},
    ),
    "mllama": Architecture(
        named={"image_token": "<|image|>"},
        config={
            **text(cross_attention_layers=[1]),
            **vision(intermediate_layers_indices=[0], vision_output_dim=64, num_global_layers=1),
        },
    ),
    "modernbert": Architecture(template=False, config=ENCODER),
    "modernvbert": replace(IDEFICS, config=text(**ENCODER), options={"image_seq_len": 1}, like="idefics3"),
    "molmo2": Architecture(
        config={
            **vision(image_size=[IMAGE_SIZE] * 2, num_position_embeddings=PATCHES),
            "adapter_config.vision_feature_layer": [-1, -2],
            "adapter_config.text_hidden_size": 32,
        },
        ids={
            "image_start_token_id": "<im_start>",
            "low_res_image_start_token_id": "<low_res_im_start>",
            "image_end_token_id": "<im_end>",
            "image_patch_id": "<im_patch>",
            "frame_start_token_id": "<frame_start>",
            "frame_end_token_id": "<frame_end>",
        },
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
        image_options={"size": SQUARE, "overlap_margins": [1, 1], "max_crops": 2},
    ),
    "muse_glimmer": Architecture(config={"out_hidden_size": 128}),
    "muse_spark": Architecture(config={"out_hidden_size": 128}),
    "ovis2": Architecture(
        options={"image_seq_length": PATCHES},
        ids={
            "image_token_id": "<IMG_ATOM>",
            "visual_indicator_token_ids": "<IMG_START> <IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END>",
        },
    ),
    "paddleocr_vl": Architecture(config=MROPE, image="<vision_start><image><vision_end>"),
    "paligemma": Architecture(
        config={"projection_dim": 32}, image_options={"image_seq_length": PATCHES}, template=False
    ),
    "phi4_multimodal": Architecture(
        config={
            **vision(image_size=448),
            "audio_config.nemo_conv_channels": 32,
            "audio_config.ext_pw_out_channel": 32,
            "audio_config.depthwise_separable_out_channel": 32,
            "audio_config.num_blocks": 2,
        },
        image_options={"size": {"height": 448, "width": 448}, "dynamic_hd": 1},
    ),
    "qianfan_ocr": replace(INTERNVL, image="<image>"),
    "qwen2_5_vl": QWEN2,
    "qwen2_vl": QWEN2,
    "qwen2_5_omni_thinker": replace(QWEN2, **OMNI),
    "qwen2_audio": Architecture(
        audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
        named=HEARD,
        audio_options={"feature_size": 128, "chunk_length": 2},
        config={"audio_config.max_source_positions": 100},
    ),
    "qwen3_5": QWEN3_5,
    "qwen3_omni_moe_thinker": replace(QWEN3, **{**OMNI, "like": "qwen3_omni_moe"}),
    "qwen3_5_moe": QWEN3_5,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": replace(QWEN3, like="qwen3_vl"),
    "qwen4_exp": replace(
        QWEN3,
        config=text(
            indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=64, indexer_compress_ratio=4
        ),
    ),
    "smolvlm": IDEFICS,
    "step3p7": Architecture(config=text(sliding_window=64)),
    "unlimited_ocr": Architecture(config={"vision_config.sam_config.downsample_channels": [512, 32]}),
    "video_llama_3": Architecture(**PATCH_16),
    "video_llava": Architecture(image_options={"size": SQUARE, "crop_size": SQUARE}, options=LLAVA),
    "vipllava": Architecture(config={"vision_feature_layers": [-1, -2]}, options=LLAVA),
}

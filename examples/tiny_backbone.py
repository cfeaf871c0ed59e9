"""A tiny, randomly initialised Qwen2.5-VL with its real processor and a tokenizer trained on the given texts.

Small enough to be trained from random weights on a laptop in minutes. The rest is as in the large models: M-RoPE,
a vision tower with window attention, image placeholders, a chat template.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer like Qwen's on `texts`.

    Args:
        texts: What to train on.
        vocab_size: Largest number of tokens, including the special ones and the 256 bytes.

    Returns:
        The tokenizer, with Qwen's special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=SPECIAL_TOKENS,
    )


def build_processor(texts: Iterable[str], patch_size: int = 8, **image_options) -> ProcessorMixin:
    """Build a real `Qwen2_5_VLProcessor` around a tokenizer trained on `texts`.

    Args:
        texts: What to train the tokenizer on.
        patch_size: Side of a patch in pixels; 2 x 2 patches become one token.
        **image_options: For the image processor.

    Returns:
        The processor.
    """
    options = dict(patch_size=patch_size, merge_size=2, **image_options)
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**options),
        video_processor=Qwen2VLVideoProcessor(patch_size=patch_size, merge_size=2),
        tokenizer=train_tokenizer(texts),
        chat_template=CHAT_TEMPLATE,
    )


def build_backbone(
    processor: ProcessorMixin, hidden_size: int = 64, layers: int = 2, seed: int = 0
) -> PreTrainedModel:
    """Build a tiny Qwen2.5-VL for `processor`, with random weights.

    Linear weights are drawn from N(0, 1 / fan_in) and embeddings with a standard deviation of 0.3. The usual 0.02 is
    for large models; a model this small learns slowly with it.

    Args:
        processor: Provides the vocabulary, the special tokens and the patch size.
        hidden_size: Width of the language model.
        layers: Number of layers of the language model.
        seed: Seed of the weights.

    Returns:
        The model without a head.
    """
    tokenizer, vision = processor.tokenizer, processor.image_processor
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [hidden_size // 32, hidden_size // 32, hidden_size // 16],
            },
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            use_cache=False,
        ),
        vision_config=dict(
            depth=1,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_heads=4,
            out_hidden_size=hidden_size,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.merge_size,
            window_size=8 * vision.patch_size,
            fullatt_block_indexes=[0],
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = Qwen2_5_VLModel(config)
        for module in backbone.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)
    return backbone.eval()

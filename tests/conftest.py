"""Tiny real checkpoints, built once."""

import functools
import http.server
import threading

import pytest
import torch
from engines import postgres, qdrant  # noqa: F401
from fresh import FreshProcesses
from PIL import Image
from scenes import make_scene
from tiny_backbone import CHAT_TEMPLATE, build_backbone, build_processor, train_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from metaembed import MetaEmbedModel


class RootIsNoTestPackage:
    """Keeps pytest from importing the root's `__init__` by the folder's name, which may be anything in a clone."""

    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == parent.config.rootpath else None


def pytest_configure(config):
    config.pluginmanager.register(RootIsNoTestPackage())
    config.addinivalue_line("filterwarnings", "ignore:this model was just made by from_backbone:UserWarning")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The long ones first: what is short then keeps every worker busy to the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


TEXTS = [
    "a red apple and a cat face on the table",
    "a blue rocket over the yellow moon",
    "what is on the table? a guitar, a key and a birthday cake",
]


def build_qwen2_5_vl():
    processor = build_processor(TEXTS, size={"shortest_edge": 16 * 16, "longest_edge": 256 * 256})
    return build_backbone(processor), processor


def build_qwen3_vl():
    tokenizer = train_tokenizer(TEXTS)
    options = dict(patch_size=8, temporal_patch_size=2, merge_size=2)
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**options, size={"shortest_edge": 256, "longest_edge": 65536}),
        video_processor=Qwen3VLVideoProcessor(**options),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=64,
            patch_size=8,
            temporal_patch_size=2,
            spatial_merge_size=2,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in (
                ("image", "image_pad"),
                ("video", "video_pad"),
                ("vision_start", "vision_start"),
                ("vision_end", "vision_end"),
            )
        },
    )
    torch.manual_seed(0)
    backbone = Qwen3VLModel(config).eval()
    for parameter in backbone.parameters():
        if parameter.ndim > 1:  # the default of 0.02 makes all rows alike, which would hide differences
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return backbone, processor


def build_bert():
    """A bidirectional, text-only backbone without a chat template."""
    tokenizer = train_tokenizer(TEXTS)
    config = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=len(tokenizer), **config)).eval(), tokenizer


BACKBONES = {"qwen2_5_vl": build_qwen2_5_vl, "qwen3_vl": build_qwen3_vl}


@pytest.fixture(scope="session", params=BACKBONES)
def model(request) -> MetaEmbedModel:
    """A model of each backbone, in float64 so that equalities can be exact. Copy it to change it."""
    backbone, processor = BACKBONES[request.param]()
    return MetaEmbedModel.from_backbone(backbone.double(), processor=processor)


@pytest.fixture(scope="session")
def qwen() -> MetaEmbedModel:
    """A tiny Qwen2.5-VL model in float32. Copy it to change it."""
    backbone, processor = build_qwen2_5_vl()
    return MetaEmbedModel.from_backbone(backbone, processor=processor)


@pytest.fixture(scope="session")
def bert() -> MetaEmbedModel:
    """A tiny bidirectional model in float64. Copy it to change it."""
    backbone, tokenizer = build_bert()
    return MetaEmbedModel.from_backbone(backbone.double(), processor=tokenizer)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path):
    """The URL of a server of the files in `tmp_path`."""
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def fresh_process(tmp_path_factory) -> FreshProcesses:
    """Runs code or a script in a fresh process that has no network: `fresh_process("-c", code, *arguments)`."""
    processes = FreshProcesses(tmp_path_factory.mktemp("fresh"), HF_HUB_OFFLINE="1")
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Pictures of three sizes."""
    import random

    rng = random.Random(0)
    pictures = [make_scene(rng).draw(16) for _ in range(3)]
    return [pictures[0], pictures[1].resize((64, 32)), pictures[2].resize((32, 80))]


@pytest.fixture(scope="session")
def mixed(pictures) -> list:
    """Text only, one image, two images, image and text, interleaved messages."""
    return [
        "a red apple",
        pictures[0],
        {"image": [pictures[1], pictures[2]], "text": "which of these shows a rocket over the yellow moon?"},
        {"image": pictures[2], "text": "a cat"},
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "before"},
                    {"type": "image", "image": pictures[0]},
                    {"type": "text", "text": "after"},
                ],
            }
        ],
    ]

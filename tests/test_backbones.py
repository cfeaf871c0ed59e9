"""Every promise, on every named backbone, each with its real processor."""

import pytest
import torch
from conformance import CHECKS, run

NAMED = [
    *("qwen2_5_vl", "paligemma", "mllama"),  # the paper's
    *("qwen2_vl", "qwen3_vl", "qwen3_5", "idefics3", "smolvlm", "gemma3"),
    *("gemma4", "internvl", "llava_onevision", "llama4", "mistral3", "aya_vision"),
    *("glm4v", "lfm2_vl", "minicpmv4_6", "granite4_vision", "modernvbert", "qwen3"),
    *("llama", "bert", "modernbert"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small lose by more, most of all where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMED)
def test_backbone(name, check, tmp_path):
    run(check, name, tmp_path)

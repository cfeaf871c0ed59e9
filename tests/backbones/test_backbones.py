"""Every named backbone, tiny and with its real processor, passes every check of `conformance.py`."""

import pytest
import torch
import torchvision
import transformers
from conformance import CHECKS, inputs_of, load, run
from packaging.version import Version

NAMED = [
    *("qwen2_5_vl", "paligemma", "mllama"),  # the paper's
    *("qwen2_vl", "qwen3_vl", "qwen3_5", "idefics3", "smolvlm", "gemma3"),
    *("gemma4", "internvl", "llava_onevision", "llama4", "mistral3", "aya_vision"),
    *("glm4v", "lfm2_vl", "minicpmv4_6", "granite4_vision", "modernvbert", "qwen3"),
    *("llama", "bert", "modernbert", "qwen2_audio"),
]
WITH_AUDIO = {"gemma4", "qwen2_audio"}
TEXT_ONLY = {"qwen3", "llama", "bert", "modernbert"}
WITH_VIDEO = {  # gemma4 since its processor gives the number of frames of a video
    *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5"),
    *("internvl", "llava_onevision", "glm4v", "minicpmv4_6"),
    *(["gemma4"] if Version(transformers.__version__) >= Version("5.23") else []),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More threads make models this small slower, above all on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OTHER_IMAGES = pytest.mark.skipif(
    Version(torchvision.__version__) < Version("0.27"),
    reason="with torchvision before 0.27, transformers loads another image processor than the one that is built here",
)


def case(name, check):
    reloads_images = check == "saving_and_loading_changes_nothing" and name in {"idefics3", "smolvlm", "modernvbert"}
    return pytest.param(name, check, marks=OTHER_IMAGES if reloads_images else ())


@pytest.mark.parametrize(("name", "check"), [case(name, check) for name in NAMED for check in CHECKS])
def test_backbone(name, check, tmp_path):
    run(check, name, tmp_path)


@pytest.mark.parametrize("name", NAMED)
def test_every_check_runs_with_the_stated_kinds_of_input(name):
    """The checks skip kinds of input that a backbone refuses, so this test states the kinds that it must accept."""
    no_images = name in TEXT_ONLY or name == "qwen2_audio"
    images = [] if no_images else ["image", "image and text", "two images", "interleaved"]
    videos = ["video"] if name in WITH_VIDEO else []
    audio = ["audio", "audio and text", "two recordings"] if name in WITH_AUDIO else []
    both = ["image and audio"] if audio and images else []
    assert list(inputs_of(load(name))) == ["text", *images, *videos, *audio, *both]


@pytest.mark.parametrize("name", ["bert", "qwen2_5_vl"])
def test_left_padding_is_refused_where_positions_count_it(name):
    processor = load(name).processor
    assert processor.config.traits.pads_left is (name != "bert")
    if name == "bert":
        with pytest.raises(ValueError, match="Leave the padding on the right"):
            processor.process_queries(["cat", "two cats and a dog"], padding_side="left")
    assert processor.process_queries(["cat", "two cats"], padding_side="right")["input_ids"].shape[0] == 2

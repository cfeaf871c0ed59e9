"""The probe measures which inputs a backbone takes and which may share a batch, and refuses the others."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import distance, fork, inputs_of, load, picture, video
from PIL import Image
from tiny import build
from transformers.video_utils import VideoMetadata

from metaembed import InputPolicy, MetaEmbedModel
from metaembed.backbones.probe import measure
from metaembed.configuration_metaembed import BackboneTraits
from metaembed.sentence_metaembed import to_multi_vector_encoder


def test_image_resolution_holds_for_one_call_and_changes_no_shared_state():
    model = load("qwen2_5_vl")
    image_processor = model.processor.image_processor
    before, large = str(image_processor), picture(0, 448, 336)

    def tokens(**kwargs):
        return model.processor.process_documents(large, **kwargs)["image_grid_thw"].prod().item() // 4

    assert tokens(max_pixels=28 * 28 * 20) <= 20 < tokens(max_pixels=28 * 28 * 100) <= 100 < tokens()
    assert str(image_processor) == before
    small, full = model.encode_documents(large, max_pixels=28 * 28 * 20), model.encode_documents(large)
    assert distance(small, full) > 0.01
    assert distance(model.encode_documents(large), full) == 0


@pytest.mark.parametrize("options", [{"max_pixel": 1}, {"images_kwargs": {"max_pixel": 1}}])
def test_an_unknown_keyword_of_the_processor_is_an_error(options):
    with pytest.raises(TypeError, match="max_pixel"):
        load("qwen2_5_vl").encode_documents(picture(0), **options)


@pytest.mark.parametrize("max_length", [0, -1, "4"])
def test_max_length_out_of_range_is_an_error(max_length):
    with pytest.raises((TypeError, ValueError), match="max_length"):
        load("qwen2_5_vl").encode_queries("a", max_length=max_length)


@pytest.mark.parametrize("name, mixes, batches", [("mllama", False, True), ("minicpmv4_6", False, False)])
def test_inputs_that_would_change_each_other_are_kept_apart_at_both_entry_points(name, mixes, batches):
    model = load(name)
    assert (model.config.traits.mixes_images, model.config.traits.batches_images) == (mixes, batches)
    items = [*inputs_of(model).values(), picture(7), "cat"]
    alone = torch.stack([model.encode_documents(item) for item in items])
    assert distance(model.encode_documents(items), alone) < 2e-4
    through = to_multi_vector_encoder(model, device="cpu").encode_document(items)
    assert distance(torch.stack([torch.as_tensor(rows).cpu() for rows in through]), alone) < 2e-4
    with pytest.raises(ValueError, match="one batch"):
        model.processor.process_documents(items)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("t5gemma2", "encoder-decoder"),
        ("blip", "pixel_values"),
        ("git", "hidden states of shape"),
        ("pi0", "vocab_size"),
    ],
)
def test_models_that_cannot_be_backbones_are_refused_with_the_reason(name, reason):
    backbone, processor = build(name)
    with pytest.raises(ValueError, match=reason):
        MetaEmbedModel.from_backbone(backbone, processor=processor)


@pytest.mark.parametrize("broken, kind", [("text", "a text failed"), ("image", "a text with an image failed")])
def test_a_probe_that_fails_names_its_input_and_the_reason(broken, kind, monkeypatch):
    backbone, processor = build("qwen2_5_vl")
    forward = type(backbone).forward

    def fail(self, *args, pixel_values=None, **kwargs):
        if broken == "text" or pixel_values is not None:
            raise RuntimeError("out of luck")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(backbone), "forward", fail)
    with pytest.raises(ValueError, match=rf"^Qwen2_5_VLModel cannot be a MetaEmbed backbone: {kind}: out of luck$"):
        MetaEmbedModel.from_backbone(backbone, processor=processor)


def test_the_traits_do_not_depend_on_those_of_an_earlier_measurement():
    """Each question uses the answers to those before it, and nothing of those after it."""
    model = fork("mllama")
    expected = dataclasses.replace(model.config.traits)
    model.config.traits = BackboneTraits(
        causal=not expected.causal,
        mixes_images=not expected.mixes_images,
        batches_images=not expected.batches_images,
        pads_left=not expected.pads_left,
        text_through_tokenizer=not expected.text_through_tokenizer,
        nests_images=not expected.nests_images,
    )
    measure(model)
    assert model.config.traits == expected


def test_text_longer_than_the_backbone_allows_is_an_error_and_can_be_cut():
    model = load("bert")
    with pytest.raises(ValueError, match="max_length"):
        model.encode_documents("apple " * 3000)
    assert model.encode_documents("apple " * 3000, max_length=6).shape == (4, 32)


def test_a_video_may_be_frames_as_an_array_or_as_images():
    model, frames = load("qwen3_vl"), video(0)
    rows = model.encode_documents({"video": frames, "text": "a cat"})
    as_images = {"video": [Image.fromarray(frame) for frame in frames], "text": "a cat"}
    part = {"type": "video", "video": torch.from_numpy(frames)}
    message = {"role": "user", "content": [part, {"type": "text", "text": "a cat"}]}
    assert distance(model.encode_documents(as_images), rows) == 0
    assert distance(model.encode_documents([message]), rows) == 0
    assert distance(model.encode_documents({"video": video(1), "text": "a cat"}), rows) > 0.01
    two = {"video": [frames, video(1, frames=8)]}
    batch = model.encode_documents([two, "cat", {"video": frames, "text": "a cat"}])
    assert distance(batch[2], rows) < 1e-5 and distance(batch[0], model.encode_documents(two)) < 1e-5


def test_a_video_may_be_a_path_that_the_backbones_own_processor_reads(monkeypatch, tmp_path):
    """A decoder stands in for torchcodec, which needs FFmpeg."""
    model, asked = load("qwen3_vl"), []
    monkeypatch.chdir(tmp_path)
    Path("0.mp4").touch()
    Path("1.mp4").touch()

    def decode(path):
        asked.append(path)
        frames = video(int(path.removesuffix(".mp4")))
        metadata = VideoMetadata(
            total_num_frames=len(frames), fps=24, frames_indices=list(range(len(frames))), width=84, height=56
        )
        return torch.from_numpy(frames).permute(0, 3, 1, 2), metadata

    def fetch_videos(self, videos, sample_indices_fn=None):
        assert sample_indices_fn is not None  # frames are sampled as the processor is set up to
        return zip(*[decode(path) for path in videos], strict=True)

    monkeypatch.setattr(type(model.processor.video_processor), "fetch_videos", fetch_videos)
    rows = model.encode_documents({"video": Path("0.mp4"), "text": "a cat"})
    assert distance(model.encode_documents({"video": video(0), "text": "a cat"}), rows) < 1e-5
    for part in ({"type": "video", "video": "0.mp4"}, {"type": "video", "path": "0.mp4"}):
        message = {"role": "user", "content": [part, {"type": "text", "text": "a cat"}]}
        assert distance(model.encode_documents([message]), rows) == 0
    assert distance(model.encode_documents({"video": "1.mp4", "text": "a cat"}), rows) > 0.01
    assert asked == ["0.mp4"] * 3 + ["1.mp4"]


@pytest.mark.parametrize("bad", [[], [picture(0), picture(1, 56, 56)], 3, np.zeros((2, 3), np.uint8)])
def test_values_that_are_not_videos_are_errors_that_say_so(bad):
    with pytest.raises((TypeError, ValueError), match=r"video|frames|array|image"):
        load("qwen3_vl").encode_documents({"video": bad})


def test_videos_and_images_are_refused_where_the_backbone_takes_none():
    with pytest.raises(ValueError, match="takes no videos"):
        load("paligemma").encode_documents({"video": video(0)})
    with pytest.raises(ValueError, match="takes no images"):
        load("qwen3").encode_documents(picture(0))


def test_an_image_may_be_a_url(tmp_path, served):
    picture(0).save(tmp_path / "picture.png")
    model, url = load("qwen2_5_vl"), f"{served}/picture.png"
    policy = InputPolicy(private_addresses=True)
    assert distance(model.encode_documents({"image": url}, policy=policy), model.encode_documents(picture(0))) == 0
    with pytest.raises(ValueError, match=r"input 0: .*missing\.png' cannot be read: the server answered 404"):
        model.encode_documents({"image": f"{served}/missing.png"}, policy=policy)


@pytest.mark.parametrize("name", ["bert", "paligemma"])
def test_messages_stay_apart_where_a_backbone_has_no_chat_template(name):
    processor = load(name).processor
    assert not processor.chat_template

    def ids(*texts):
        messages = [{"role": "user", "content": text} for text in texts]
        return processor.process_documents([messages])["input_ids"].tolist()

    assert ids("red", "apple") == ids("red\napple") != ids("redapple")
    assert ids("red") == processor.process_documents(["red"])["input_ids"].tolist()

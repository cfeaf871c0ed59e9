"""Recordings at every entry point, in groups where they must be, cut where asked, and never cut silently."""

import dataclasses
import warnings

import numpy as np
import pytest
import soundfile
import torch
from conformance import distance, load, picture, recording
from tiny import build

from metaembed import InputPolicy, MetaEmbedModel
from metaembed.backbones.lengths import estimate_tokens
from metaembed.sentence_metaembed import to_multi_vector_encoder

CLOSE = 2e-4


@pytest.fixture(scope="module")
def model():
    return load("qwen2_audio")


@pytest.fixture
def path(tmp_path):
    sound = recording(0, 1.0)
    soundfile.write(tmp_path / "a.wav", sound["array"], sound["sampling_rate"], subtype="FLOAT")
    return tmp_path / "a.wav"


def test_a_recording_gives_the_same_embedding_from_anywhere_at_every_entry_point(model, path):
    sound = recording(0, 1.0)
    expected = model.encode_documents(sound)
    part = {"type": "audio", "path": str(path)}
    forms = [sound, {"audio": path}, {"audio": str(path)}, {"audio": path.read_bytes()}, {"audio": [sound]}]
    forms += [[{"role": "user", "content": [part]}], [{"role": "user", "content": [{"audio": sound}]}]]
    encoder = to_multi_vector_encoder(model, device="cpu")
    assert "audio" in encoder[0].modalities
    for form in forms:
        assert distance(model.encode_documents(form), expected) < 1e-5
    for rows in encoder.encode_document(forms):
        assert distance(torch.as_tensor(rows), expected) < CLOSE
    assert distance(torch.as_tensor(encoder.encode_query(sound)), model.encode_queries(sound)) < CLOSE
    assert distance(model.encode_documents({"audio": path, "text": "a cat"}), expected) > 0.01


def test_parts_of_a_message_keep_their_order(model):
    sound, other = recording(0), recording(1)

    def encode(*content):
        return model.encode_documents([{"role": "user", "content": list(content)}])

    assert distance(encode("one", sound, "two", other), encode("one", other, "two", sound)) > 10 * CLOSE
    alike = model.encode_documents({"audio": sound, "text": "one"})  # the text comes last
    assert distance(encode(sound, "one"), alike) == 0 and distance(encode("one", sound), alike) > 10 * CLOSE
    assert distance(encode("one", sound), encode("one", {"type": "audio", "audio": sound})) == 0


def test_a_recording_is_resampled_to_the_rate_that_the_backbone_wants(model):
    low = recording(0, 1.0, rate=8_000)
    features = model.processor.process_documents(low)
    at_rate = model.processor.process_documents(recording(0, 1.0))
    assert features["input_ids"].shape == at_rate["input_ids"].shape


def test_a_recording_is_cut_where_asked_and_never_silently(model):
    sound = recording(0, 3.5)
    with pytest.raises(ValueError, match=r"takes 2 seconds of a recording and drops the rest.*max_seconds=2"):
        model.encode_documents(sound)
    start = {"array": sound["array"][:32_000], "sampling_rate": 16_000}
    assert distance(model.encode_documents(sound, max_seconds=2), model.encode_documents(start)) == 0
    with pytest.raises(ValueError, match=r"input 1: .*longer than the 0.5 seconds of the policy"):
        model.encode_documents(["a", recording(0, 1.0)], policy=InputPolicy(max_seconds=0.5))


def test_a_server_reads_no_recording_of_its_own_machine(model, path):
    with pytest.raises(ValueError, match=r"input 0: .*the policy allows no such file"):
        model.encode_documents({"audio": str(path)}, policy=InputPolicy.server())
    assert model.encode_documents({"audio": path.read_bytes()}, policy=InputPolicy.server()).shape == (4, 32)


def test_recordings_are_refused_where_the_backbone_takes_none():
    for name in ("paligemma", "qwen3"):
        with pytest.raises(ValueError, match=r"input 0: .* takes no audio"):
            load(name).encode_documents(recording(0))


def test_a_model_without_a_part_that_hears_takes_no_recordings_although_its_processor_does():
    backbone, processor = build("gemma4")
    backbone.audio_tower = backbone.embed_audio = backbone.config.audio_config = None
    with pytest.warns(UserWarning, match="Gemma4Model takes no recordings, although its processor does"):
        deaf = MetaEmbedModel.from_backbone(backbone, processor=processor)
    assert not deaf.config.traits.takes_audio and deaf.processor.takes("image")
    with pytest.raises(ValueError, match="takes no audio"):
        deaf.encode_documents(recording(0))


@pytest.mark.parametrize("batches", [True, False])
def test_recordings_that_would_change_each_other_are_kept_apart(model, batches):
    items = ["cat", recording(0), recording(1, 1.2), {"audio": [recording(2), recording(3)]}, picture(0)]
    traits = dataclasses.replace(model.config.traits, mixes_audio=False, batches_audio=batches)
    before, model.config.traits = model.config.traits, traits
    try:
        assert model.processor.group(items) == ([[0, 4], [1, 2], [3]] if batches else [[0, 4], [1], [2], [3]])
    finally:
        model.config.traits = before


def test_a_string_that_looks_like_a_file_is_text_and_sentence_transformers_users_are_told(model):
    encoder = to_multi_vector_encoder(model, device="cpu")
    with pytest.warns(UserWarning, match='taken as text.*{"image": name}'):
        rows = encoder.encode_document(["photo.PNG"])
    assert distance(torch.as_tensor(rows[0]), model.encode_documents("photo.PNG")) < CLOSE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_document(["see photo.png", "a cat", {"text": "photo.png"}])


def test_numbers_stay_finite_for_silence(model):
    silence = {"array": np.zeros(16_000, np.float32), "sampling_rate": 16_000}
    assert model.encode_documents(silence).isfinite().all()


def test_how_long_a_recording_is_decides_the_batches_before_any_is_decoded(model, path, monkeypatch):
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    sounds = [{"audio": path}, {"audio": path.read_bytes()}, recording(1, 3.0), {"audio": "no/such/file.wav"}, "a cat"]
    estimates = estimate_tokens(model.processor, model.processor.parse(sounds), InputPolicy())
    assert estimates == [25, 25, 75, 25, 5 / 4]

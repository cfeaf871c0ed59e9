"""Recordings give the same samples from anywhere, those that transformers reads, within the policy's limits."""

import base64
import io
import sys

import numpy as np
import pytest
import soundfile
import torch
from transformers.audio_utils import load_audio

from metaembed.app import audio
from metaembed.inputs_metaembed import InputPolicy, parse_all, read_audio

RATE = 16_000


def tone(seconds=0.5, rate=RATE, channels=1):
    times = np.arange(int(seconds * rate)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * (c + 1) * times) for c in range(channels)]).astype(np.float32)


def encoded(samples, rate=RATE, kind="WAV", **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.T, rate, format=kind, **options)
    return buffer.getvalue()


def read(source, policy=None, rate=RATE, seconds=None):
    return read_audio(source, policy or InputPolicy(), rate, seconds)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_file_has_the_samples_that_transformers_reads(tmp_path, rate, channels):
    path = tmp_path / "tone.wav"
    path.write_bytes(encoded(tone(rate=rate, channels=channels), rate))
    expected = load_audio(str(path), RATE, backend="soundfile")
    assert read(path).dtype == np.float32 and len(expected) == RATE // 2
    np.testing.assert_array_equal(read(path), expected)


FORMS = {
    "a path as a string": lambda samples, path: str(path),
    "bytes": lambda samples, path: path.read_bytes(),
    "bytearray": lambda samples, path: bytearray(path.read_bytes()),
    "an open file": lambda samples, path: io.BytesIO(path.read_bytes()),
    "base64": lambda samples, path: base64.b64encode(path.read_bytes()).decode(),
    "a data URL": lambda samples, path: "data:audio/wav;base64," + base64.b64encode(path.read_bytes()).decode(),
    "an array": lambda samples, path: {"array": samples[0], "sampling_rate": RATE},
    "channels": lambda samples, path: {"array": samples, "sampling_rate": RATE},
    "float64": lambda samples, path: {"array": samples[0].astype(np.float64), "sampling_rate": RATE},
    "a tensor": lambda samples, path: {"array": torch.from_numpy(samples[0]), "sampling_rate": RATE},
    "integers of 32 bits": lambda samples, path: {
        "array": (samples[0].astype(np.float64) * 2**31).astype(np.int32),
        "sampling_rate": RATE,
    },
    "FLAC": lambda samples, path: encoded(samples, kind="FLAC", subtype="PCM_24"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_recording_has_the_same_samples_in_every_form(tmp_path, form):
    path = tmp_path / "tone.wav"
    path.write_bytes(encoded(tone(), subtype="FLOAT"))
    np.testing.assert_allclose(read(FORMS[form](tone(), path)), tone()[0], atol=2e-7)


@pytest.mark.parametrize("kind", ["MP3", "OGG", "FLAC"])
def test_compressed_files_sound_the_same(kind):
    samples = read(encoded(tone(1.0), kind=kind))
    assert abs(len(samples) - RATE) < 3000  # MP3 pads
    spectrum = np.abs(np.fft.rfft(samples))
    assert abs(np.argmax(spectrum) * RATE / len(samples) - 440) < 3


def test_a_url_is_fetched_as_the_policy_allows(tmp_path, served):
    (tmp_path / "tone.wav").write_bytes(encoded(tone(), subtype="FLOAT"))
    samples = read(f"{served}/tone.wav", InputPolicy(private_addresses=True))
    np.testing.assert_array_equal(samples, tone()[0])
    with pytest.raises(ValueError, match="not public"):
        read(f"{served}/tone.wav")
    for source in (f"{served}/tone.wav", tmp_path / "tone.wav", str(tmp_path / "tone.wav")):
        with pytest.raises(ValueError, match="the policy allows no"):
            read(source, InputPolicy.server())
    assert len(read((tmp_path / "tone.wav").read_bytes(), InputPolicy.server()))


def test_what_sentence_transformers_and_datasets_have_in_memory_are_recordings():
    class Decoder:  # of torchcodec, which needs FFmpeg
        def get_samples_played_in_range(self, start, stop):
            class Samples:
                data, sample_rate = torch.from_numpy(tone(channels=2))[:, : int(stop * RATE)], RATE

            return Samples()

    arrays = {"array": tone()[0], "sampling_rate": RATE, "path": None}
    items = parse_all([arrays, Decoder(), {"audio": arrays, "text": "a"}, {"audio": [arrays, Decoder()]}])
    assert [len(item.audios) for item in items] == [1, 1, 1, 2]
    np.testing.assert_allclose(read(Decoder()), tone(channels=2).mean(axis=0))
    assert parse_all(Decoder())[0].audios


def test_the_start_of_a_recording_can_be_kept_and_a_long_one_is_an_error():
    content, policy = encoded(tone(2.0, 8_000), 8_000), InputPolicy(max_seconds=1.5)
    assert len(read(content, seconds=0.25)) == RATE // 4
    np.testing.assert_allclose(read(content, seconds=0.25)[:3900], read(content)[:3900], atol=1e-3)
    for source in (content, {"array": tone(2.0)[0], "sampling_rate": RATE}):
        with pytest.raises(ValueError, match=r"longer than the 1.5 seconds of the policy"):
            read(source, policy)
        assert len(read(source, policy, seconds=1)) == RATE
    with pytest.raises(ValueError, match="more than the 100 bytes"):
        read(content, InputPolicy(max_bytes=100))
    with pytest.raises(ValueError, match="max_seconds must be more than 0"):
        read(content, seconds=-1)


def test_little_more_than_the_policy_allows_is_decoded(monkeypatch):
    asked, whole = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **kw: asked.append(n) or whole(self, n, **kw))
    with pytest.raises(ValueError, match="longer"):
        read(encoded(tone(10.0)), InputPolicy(max_seconds=1))
    assert asked == [2 * RATE]


@pytest.mark.parametrize(
    "source, message",
    [
        (b"no sound", "cannot be read"),
        ("nosuchfile.wav", "cannot be read"),
        ({"array": np.zeros(100)}, "sampling_rate. is missing"),
        ({"array": np.zeros(100), "sampling_rate": 0}, "between 1 and"),
        ({"array": np.zeros(100), "sampling_rate": 16e3}, "whole number"),
        ({"array": np.zeros((100, 2)), "sampling_rate": RATE}, r"\[channels, samples\], got shape \(100, 2\)"),
        ({"array": np.zeros((2, 2, 9)), "sampling_rate": RATE}, r"\[channels, samples\]"),
        ({"array": np.zeros(0), "sampling_rate": RATE}, "no sound"),
        ({"array": np.full(100, np.nan), "sampling_rate": RATE}, "NaN"),
        ({"array": np.full(100, 20_000.0), "sampling_rate": RATE}, r"must lie in -1\.\.1"),
        ({"array": np.zeros(100, np.uint8), "sampling_rate": RATE}, "signed integers"),
        ({"array": ["a"], "sampling_rate": RATE}, "signed integers"),
    ],
)
def test_what_is_no_recording_is_an_error_that_says_why(source, message):
    with pytest.raises((TypeError, ValueError), match=message):
        read(source)


@pytest.mark.parametrize("source", [np.zeros(100), 3, {"samples": [0.0]}])
def test_an_array_without_its_rate_is_an_error_that_says_what_to_pass(source):
    with pytest.raises(TypeError, match=r'cannot encode .* as audio.*"sampling_rate"'):
        parse_all([{"audio": source}])


def test_a_truncated_file_is_an_error():
    with pytest.raises(ValueError, match="cannot be read"):
        read(encoded(tone(4.0), kind="FLAC")[:20_000])


@pytest.mark.parametrize("name", ["soundfile", "soxr"])
def test_a_missing_library_is_an_error_that_says_what_to_install(monkeypatch, name):
    content = encoded(tone(rate=8_000), 8_000)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"needs {name}: pip install 'metaembed\[audio\]'"):
        read(content)


def test_formats_that_soundfile_lacks_are_decoded_by_torchcodec(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match="install torchcodec and FFmpeg"):
        read(b"\0\0\0\x20ftypM4A ")

    class Decoders:
        class AudioDecoder:
            def __init__(self, content):
                assert content.endswith(b"ftypM4A ")

            def get_samples_played_in_range(self, start, stop):
                return type("Samples", (), {"data": torch.ones(2, 800), "sample_rate": 8_000})

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Decoders)
    assert read(b"\0\0\0\x20ftypM4A ").shape == (1600,)


def test_what_a_processor_would_drop_is_an_error_with_the_seconds_it_takes():
    class Processor:
        heard: dict = {}
        calls = 0

        def prompt(self, *_):
            return "<audio>"

        def backbone_processor(self, text, audio, sampling_rate):
            self.calls += 1
            return {"input_ids": np.array([[1]]), "input_features": audio[0][: 30 * sampling_rate][None]}

    processor = Processor()
    samples = np.zeros(40 * 1000, np.float32)
    audio.check_heard(processor, samples[: 30 * 1000], {"sampling_rate": 1000})
    before = processor.calls
    audio.check_heard(processor, samples[: 20 * 1000], {"sampling_rate": 1000})
    assert processor.calls == before  # a shorter one is taken, too
    with pytest.raises(ValueError, match=r"takes 30 seconds of a recording and drops the rest.*max_seconds=30"):
        audio.check_heard(processor, samples, {"sampling_rate": 1000})

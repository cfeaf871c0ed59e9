"""What a user may pass: every form of the same picture gives the same embedding, and what cannot be read says why."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from metaembed.inputs_metaembed import count_images, is_single, read_image, to_messages


@pytest.fixture(scope="module")
def grey() -> Image.Image:
    """A picture that every mode can hold."""
    return Image.fromarray(np.arange(48 * 32, dtype=np.int64).reshape(48, 32).__mod__(256).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


MODES = {
    "L": lambda image: image,
    "RGB": lambda image: image.convert("RGB"),
    "RGBA": lambda image: image.convert("RGBA"),
    "LA": lambda image: image.convert("LA"),
    "P": lambda image: image.convert("P"),
    "16 bits": lambda image: Image.fromarray(np.asarray(image).astype(np.uint16) * 257),
    "32 bits": lambda image: Image.fromarray(np.asarray(image).astype(np.int32) * 257),
    "float": lambda image: Image.fromarray(np.asarray(image).astype(np.float32) / 255),
    "uint8 array": np.asarray,
    "uint16 array": lambda image: np.asarray(image).astype(np.uint16) * 257,
    "float array": lambda image: np.asarray(image).astype(np.float64) / 255,
    "channel array": lambda image: np.asarray(image)[..., None],
    "tensor": lambda image: torch.from_numpy(np.asarray(image.convert("RGB")).copy()),
    "PNG bytes": lambda image: encoded(image, "PNG"),
    "16-bit PNG bytes": lambda image: encoded(Image.fromarray(np.asarray(image).astype(np.uint16) * 257), "PNG"),
    "base64": lambda image: base64.b64encode(encoded(image, "PNG")).decode(),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_same_picture_gives_the_same_pixels_in_every_mode(grey, mode):
    image = read_image(MODES[mode](grey))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(grey.convert("RGB")))


def test_the_same_picture_gives_the_same_embedding_from_anywhere(qwen, grey, tmp_path):
    path = tmp_path / "grey.png"
    grey.save(path)
    expected = qwen.encode_documents(grey)
    for other in (
        path,
        {"image": path},
        {"image": str(path)},
        {"image": [grey]},
        encoded(grey, "PNG"),
        np.asarray(grey),
    ):
        assert torch.equal(qwen.encode_documents(other), expected)
    message = [{"role": "user", "content": [{"type": "image", "path": str(path)}]}]
    assert torch.equal(qwen.encode_documents(message), expected)


def test_cmyk_is_the_picture_it_prints():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    np.testing.assert_array_equal(np.asarray(read_image(red.convert("CMYK"))), np.asarray(red))


def test_transparency_is_composed_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(read_image(clear)).min() == 255
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert np.asarray(read_image(palette)).min() == 255


def test_exif_orientation_is_respected(grey):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 270 degrees
    turned = Image.open(io.BytesIO(encoded(grey, "PNG", exif=exif)))
    expected = grey.transpose(Image.Transpose.ROTATE_270).convert("RGB")
    np.testing.assert_array_equal(np.asarray(read_image(turned)), np.asarray(expected))


def test_a_truncated_file_is_an_error(qwen, grey, tmp_path):
    path = tmp_path / "half.jpg"
    path.write_bytes(encoded(grey.convert("RGB"), "JPEG")[:-200])
    for source in (path, {"image": str(path), "text": "a"}, path.read_bytes()):
        with pytest.raises(ValueError, match=r"input 0: .*cannot be read"):
            qwen.encode_documents([source])


@pytest.mark.parametrize("source", ["no/such/file.png", b"no picture", np.zeros((2, 2, 7), np.uint8), np.zeros(3)])
def test_what_is_no_picture_is_an_error(source):
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(source)


@pytest.mark.parametrize("array", [np.array([[2.0]]), np.array([[np.nan]]), np.array([[-1.0]]), np.array([[1]])])
def test_arrays_of_unclear_meaning_are_errors(array):
    with pytest.raises(ValueError, match="array must"):
        read_image(array)


def test_a_missing_file_names_the_input(qwen, tmp_path):
    with pytest.raises(ValueError, match=r"input 1: .*missing\.png"):
        qwen.processor.process_documents(["a", tmp_path / "missing.png"])


def test_a_picture_of_one_pixel_is_encoded(qwen):
    assert qwen.encode_documents(Image.new("RGB", (1, 1))).shape == (64, 64)


def test_a_picture_too_wide_for_the_backbone_is_an_error_with_its_size(qwen):
    with pytest.raises(ValueError, match=r"\(4000, 4\).*aspect ratio"):
        qwen.encode_documents(Image.new("RGB", (4000, 4)))


def test_what_is_one_input_and_what_is_a_batch(grey):
    conversation = [{"role": "user", "content": "a"}]
    singles = ["a", grey, {"text": "a"}, conversation, np.asarray(grey), encoded(grey, "PNG")]
    assert all(map(is_single, singles))
    assert not any(map(is_single, (["a"], ("a",), [{"text": "a"}], [conversation], np.array(["a", "b"]))))


def test_counting_images_loads_none(grey):
    conversation = [{"role": "user", "content": ["a", {"type": "image", "image": "nowhere.png"}, grey]}]
    assert [count_images(item) for item in ("a", grey, {"image": ["x.png"] * 3}, conversation)] == [0, 1, 3, 2]


def test_messages_keep_roles_and_order(grey):
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": ["a", {"type": "image", "image": grey}, {"type": "text", "text": "b"}]},
    ]
    first, second = to_messages(conversation)
    assert first == {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    assert [part["type"] for part in second["content"]] == ["text", "image", "text"]


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": 3, "content": "a"}, {"role": "user", "content": [3]}])
def test_malformed_messages_are_errors(message):
    with pytest.raises(TypeError, match=r"message must|cannot encode"):
        to_messages([message])

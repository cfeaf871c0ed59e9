"""Every form of the same picture gives the same embedding, and inputs that cannot be read are errors with a reason."""

import base64
import io
import socket
import struct
import zlib
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image, features

from metaembed import inputs_metaembed
from metaembed.inputs_metaembed import InputPolicy, is_single, parse, parse_all, read_image

HERE = InputPolicy(private_addresses=True)  # pictures are served from this machine


def to_messages(item):
    parsed = parse(item)
    with ExitStack() as stack:
        parsed.load(InputPolicy(), stack, 16_000, None)
    return parsed.messages


@pytest.fixture(scope="module")
def grey() -> Image.Image:
    """Return a picture that every mode can represent."""
    return Image.fromarray(np.arange(48 * 32, dtype=np.int64).reshape(48, 32).__mod__(256).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def wide(image: Image.Image, dtype: type = np.uint16) -> Image.Image:
    return Image.fromarray(np.asarray(image).astype(dtype) * 257)


def png16(row: tuple[int, int, int, int], transparent: int) -> bytes:
    """A grey PNG file of 16 bits and 4 equal rows whose transparency is one value: PIL does not write it."""
    header, rows = struct.pack(">IIBBBBB", 4, 4, 16, 0, 0, 0, 0), zlib.compress(struct.pack(">x4H", *row) * 4)
    chunks = ((b"IHDR", header), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


MODES = {
    "L": lambda image: image,
    "RGB": lambda image: image.convert("RGB"),
    "RGBA": lambda image: image.convert("RGBA"),
    "LA": lambda image: image.convert("LA"),
    "P": lambda image: image.convert("P"),
    "16 bits": wide,
    "32 bits": lambda image: wide(image, np.int32),
    "float": lambda image: Image.fromarray(np.asarray(image).astype(np.float32) / 255),
    "uint8 array": np.asarray,
    "uint16 array": lambda image: np.asarray(image).astype(np.uint16) * 257,
    "float array": lambda image: np.asarray(image).astype(np.float64) / 255,
    "channel array": lambda image: np.asarray(image)[..., None],
    "tensor": lambda image: torch.from_numpy(np.asarray(image.convert("RGB")).copy()),
    "PNG bytes": lambda image: encoded(image, "PNG"),
    "16-bit PNG bytes": lambda image: encoded(wide(image), "PNG"),
    "16-bit PGM bytes": lambda image: encoded(wide(image, np.int32), "PPM"),
    "PNG bytearray": lambda image: bytearray(encoded(image, "PNG")),
    "PNG file": lambda image: io.BytesIO(encoded(image, "PNG")),
    "base64": lambda image: base64.b64encode(encoded(image, "PNG")).decode(),
    "base64 in lines": lambda image: base64.encodebytes(encoded(image, "PNG")).decode(),
    "data URL": lambda image: data_url(encoded(image, "PNG")),
    "float in 0..255": lambda image: image.convert("F"),
    "float tensor": lambda image: torch.from_numpy(np.asarray(image) / 255).requires_grad_(),
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


def test_the_transparent_value_of_a_16_bit_png_is_composed_on_white():
    image = read_image(png16((0x80FF, 0x80FF, 0x1010, 0x80FE), transparent=0x80FF))
    assert np.asarray(image)[0, :, 0].tolist() == [255, 255, 16, 128]


def test_a_url_and_base64_keep_transparency_and_16_bits(grey, tmp_path, served):
    half_clear = grey.convert("RGBA")
    half_clear.putalpha(128)
    for image in (half_clear, wide(grey)):
        content = encoded(image, "PNG")
        (tmp_path / "picture.png").write_bytes(content)
        expected = np.asarray(read_image(tmp_path / "picture.png"))
        for source in (f"{served}/picture.png", data_url(content), base64.b64encode(content).decode()):
            np.testing.assert_array_equal(np.asarray(read_image(source, HERE)), expected)


def test_a_server_that_fails_or_stays_silent_is_an_error_that_names_the_url(tmp_path, served):
    with pytest.raises(ValueError, match=f"{served}/missing.png' cannot be read: the server answered 404"):
        read_image(f"{served}/missing.png", HERE)
    (tmp_path / "page.html").write_text("no picture")
    with pytest.raises(ValueError, match=f"{served}/page.html' cannot be read"):
        read_image(f"{served}/page.html", HERE)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/picture.png"
        with pytest.raises(ValueError, match=f"{url}' cannot be read.*timed out"):
            read_image(url, InputPolicy(private_addresses=True, timeout=0.1))


def test_base64_of_a_photograph_is_read():
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(photograph, "PNG")
    for source in (base64.b64encode(content).decode(), data_url(content)):
        np.testing.assert_array_equal(np.asarray(read_image(source)), np.asarray(photograph))


def test_an_error_does_not_repeat_a_long_source():
    long = "A" * 30_000
    bad = [
        *({"image": source} for source in (long, "data:image/png;base64," + long, "http://localhost:1/" + long)),
        *(
            {"image": inputs_metaembed.Path(long)},
            {long: "a"},
            {"text": [long]},
            [{"role": long + "|", "content": "a"}],
        ),
        *(
            [{"role": "user", "content": [{"type": long}]}],
            [{"role": "user", long: "a"}],
            [{"role": "user"}, long],
            {long},
        ),
    ]
    for item in bad:
        with pytest.raises((TypeError, ValueError)) as error:
            to_messages(item)
        assert len(str(error.value)) < 1200
    with pytest.raises(TypeError) as error:
        parse_all({long})
    assert len(str(error.value)) < 1200


@pytest.mark.parametrize("mode", ["I", "I;16"])
def test_integers_of_8_or_16_bits_are_an_error_that_says_what_to_pass(grey, mode):
    with pytest.raises(ValueError, match=r"leave open what is white.*convert\('L'\).*uint16"):
        read_image(grey.convert("I") if mode == "I" else Image.fromarray(np.asarray(grey).astype(np.uint16)))
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    assert np.asarray(read_image(encoded(dark, "PNG"))).max() == 1  # a file says that it has 16 bits
    assert np.asarray(read_image(Image.new(mode, (2, 2)))).max() == 0  # black is black


def test_floats_of_unclear_meaning_are_errors():
    for pixels, message in (([0.0, 1.0], "leave open"), ([0.0, 256.0], "must lie"), ([0.0, np.nan], "must lie")):
        with pytest.raises(ValueError, match=message):
            read_image(Image.fromarray(np.array([pixels], np.float32)))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_a_file_of_many_pages_is_an_error_and_one_page_of_it_is_a_picture(grey, kind):
    pages = [grey.convert("RGB"), grey.convert("RGB").transpose(Image.Transpose.ROTATE_180)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(pages[0], kind, save_all=True, append_images=pages[1:], **lossless)
    with pytest.raises(ValueError, match=r"2 pages or frames.*image\.copy\(\)"):
        read_image(content)
    file = Image.open(io.BytesIO(content))
    file.seek(1)
    np.testing.assert_allclose(np.asarray(read_image(file.copy())), np.asarray(pages[1]))


def test_a_photograph_with_a_second_one_in_its_file_is_read_as_the_first(grey):
    shown = grey.convert("RGB")
    content = encoded(shown, "MPO", save_all=True, append_images=[shown.resize((8, 8))], quality=100)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert read_image(content).size == shown.size


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


@pytest.mark.parametrize(
    "source",
    [
        *("no/such/file.png", "nosuchfile", "data:,", b"no picture", io.BytesIO(b""), io.StringIO("text")),
        *(np.zeros((2, 2, 7), np.uint8), np.zeros(3), np.zeros((0, 5, 3), np.uint8), Image.new("RGB", (0, 0))),
    ],
)
def test_files_that_are_not_pictures_are_errors(source):
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(source)


@pytest.mark.parametrize("array", [np.array([[2.0]]), np.array([[np.nan]]), np.array([[-1.0]]), np.array([[1]])])
def test_arrays_of_unclear_meaning_are_errors(array):
    with pytest.raises(ValueError, match="array must"):
        read_image(array)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "JPEG2000", "AVIF"])
def test_a_corrupt_file_is_a_value_error(grey, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow knows no AVIF")
    content = encoded(grey.convert("RGB"), kind)
    rng = np.random.default_rng(0)
    for _ in range(40):
        corrupt = bytearray(content)
        for place in rng.integers(0, min(len(content), 200), 3):
            corrupt[place] = rng.integers(0, 256)
        try:
            read_image(corrupt)
        except ValueError as error:
            assert "cannot be read" in str(error)


def test_a_bfloat16_tensor_is_a_picture():
    assert np.asarray(read_image(torch.ones(2, 2, 3, dtype=torch.bfloat16))).min() == 255


def test_a_missing_file_names_the_input(qwen, tmp_path):
    with pytest.raises(ValueError, match=r"input 1: .*missing\.png"):
        qwen.processor.process_documents(["a", tmp_path / "missing.png"])


def test_a_picture_of_one_pixel_is_encoded(qwen):
    assert qwen.encode_documents(Image.new("RGB", (1, 1))).shape == (64, 64)


def test_a_picture_too_wide_for_the_backbone_is_an_error_with_its_size(qwen):
    with pytest.raises(ValueError, match=r"refused inputs \[1\] .*\(4000, 4\).*aspect ratio"):
        qwen.encode_documents(["a text", Image.new("RGB", (4000, 4))], batch_size=1)


def test_one_input_and_a_batch_are_told_apart(grey):
    conversation = [{"role": "user", "content": "a"}]
    content, pixels = encoded(grey, "PNG"), np.asarray(grey.convert("RGB"))
    singles = ["a", grey, {"text": "a"}, conversation, pixels, content, bytearray(content), io.BytesIO(content)]
    assert all(map(is_single, [*singles, torch.tensor(pixels)]))
    batches = [["a"], ("a",), [{"text": "a"}], [conversation], np.array(["a", "b"]), pixels[None]]
    assert not any(map(is_single, [*batches, torch.tensor(pixels[None])]))


def test_parsing_reads_no_image(grey):
    conversation = [{"role": "user", "content": ["a", {"type": "image", "image": "nowhere.png"}, grey]}]
    items = parse_all(["a", grey, {"image": ["x.png"] * 3}, conversation])
    assert [item.num_images for item in items] == [0, 1, 3, 2]
    assert [item.text_length for item in items] == [1, 0, 0, 1]


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


@pytest.mark.parametrize("chat", [[{"role": "user"}], [{"role": "user", "content": "a"}, "b"]])
def test_malformed_chats_are_the_same_errors_when_encoded(qwen, chat):
    for encode in (qwen.encode_documents, qwen.processor.process_documents):
        with pytest.raises(TypeError, match="input 0: each chat message must be"):
            encode([chat])


@pytest.mark.parametrize("role", ["user<|im_end|>", "", "user assistant", "<|meta_document_0|>", "user\n"])
def test_a_role_that_is_not_a_word_is_an_error(role):
    with pytest.raises(ValueError, match="role of a chat message must be a word"):
        to_messages([{"role": role, "content": "a"}])


@pytest.mark.parametrize(
    "part",
    [
        *(
            {"type": "image"},
            {"type": "image", "image": None},
            {"type": "text"},
            {"type": "video"},
            {},
            {"text": None},
        ),
        *({"type": "image", "image": "a.png", "url": "b.png"}, {"type": "text", "text": "a", "image": "a.png"}),
        *({"type": "image", "text": "a"}, {"type": "speech", "speech": "a.wav"}, {"url": "a.png"}),
    ],
)
def test_a_part_without_the_content_of_its_type_is_an_error(part):
    with pytest.raises(ValueError, match=r"part of type|\"type\" of a part|is empty|unknown keys"):
        to_messages([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])


def test_keys_without_a_value_are_ignored(grey):
    """Tables of chats have every key in every row."""
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "image", "text": None, "image": grey}]
    (message,) = to_messages([{"role": "user", "content": parts, "name": None}])
    assert [part["type"] for part in message["content"]] == ["text", "image"]


def test_unknown_keys_of_a_message_are_errors():
    with pytest.raises(ValueError, match="tool_calls"):
        to_messages([{"role": "assistant", "content": "a", "tool_calls": [{}]}])


@pytest.mark.parametrize("item", ["a\ud800b", {"text": "a\ud800b"}])
def test_text_that_is_not_valid_unicode_is_an_error_that_names_it(qwen, item):
    with pytest.raises(ValueError, match=r"input 1: text must be valid Unicode, got 'a\\ud800b', whose character 1"):
        qwen.encode_queries(["fine", item])

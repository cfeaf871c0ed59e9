"""The policy limits what is read and fetched, and hostile files, servers and texts end in an error, soon."""

import gzip
import http.server
import io
import json
import struct
import sys
import threading
import time
import zlib
from collections import deque
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_inputs import encoded
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metaembed import InputPolicy, MetaEmbedConfig, MetaEmbedProcessor
from metaembed.app.fetch import is_public
from metaembed.inputs_metaembed import parse, read_image, read_video
from metaembed.sentence_metaembed import to_multi_vector_encoder

HERE = InputPolicy(private_addresses=True, timeout=1, max_bytes=2**20)


def hostile_png(width, height, rows, depth=1):
    header, chunks = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0), zlib.compress(rows, 9)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", chunks), (b"IEND", b""))
    )


class Hostile(http.server.BaseHTTPRequestHandler):
    """Serves an endless body, a bomb of gzip, a drip, and redirects."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        kind, _, target = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        self.send_response(200)
        if kind == "gzip":
            self.send_header("Content-Encoding", "gzip")
        try:
            for letter in "X-Slow: a very slow header" if kind == "headers" else "":
                self.wfile.write(letter.encode())
                time.sleep(0.3)
            self.end_headers()
            if kind == "gzip":
                self.wfile.write(gzip.compress(bytes(2**24)))
            for _ in range(200 if kind in ("endless", "drip") else 0):
                self.wfile.write(bytes(2**16 if kind == "endless" else 1))
                time.sleep(0.05 if kind == "drip" else 0)
        except OSError:
            pass


@pytest.fixture(scope="module")
def hostile():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *(("endless", "1048576 bytes"), ("gzip", "1048576 bytes")),
        *(("drip", "timed out after 1 s"), ("headers", "timed out after 1 s")),
    ],
)
def test_an_endless_body_is_an_error_in_bounded_time_and_memory(hostile, path, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        read_image(f"{hostile}/{path}", HERE)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "localhost", "[::ffff:127.0.0.1]", "[::1]"])
def test_private_addresses_are_refused_under_any_name(hostile, host):
    port = hostile.rpartition(":")[2]
    with pytest.raises(ValueError, match=r"not public|not known|cannot be read"):
        read_image(f"http://{host}:{port}/endless")


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "172.16.3.4",
        "192.168.1.1",
        "169.254.169.254",
        "127.9.9.9",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "2001:0:1::1",
        "::127.0.0.1",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert is_public(address)


def test_every_redirect_is_checked(hostile, monkeypatch):
    monkeypatch.setattr("metaembed.app.fetch.is_public", lambda address: address != "127.0.0.2")
    port = hostile.rpartition(":")[2]
    for target, message in (
        (f"http://127.0.0.2:{port}/endless", "not public"),
        ("file:///etc/passwd", "no URLs of file"),
        ("/to/" * 20, "redirects without end"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image(f"{hostile}/to/{target}")
    with pytest.raises(ValueError, match="does not allow the host"):
        read_image(f"{hostile}/to/http://127.0.0.2:{port}/", InputPolicy(hosts=("127.0.0.1",)))


def test_a_server_reads_and_fetches_nothing_and_its_errors_do_not_reveal_files(tmp_path, hostile):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    policy = InputPolicy.server()
    assert (policy.schemes, policy.folders) == ((), ())
    for kind in (str, type(tmp_path)):
        errors = []
        for name in ("a.png", "b.png"):
            with pytest.raises(ValueError, match="the policy allows no such file") as error:
                read_image(kind(tmp_path / name), policy)
            errors.append(str(error.value).replace(name, ""))
        assert errors[0] == errors[1]
    for read in (read_image, lambda source, policy: read_video(source, policy, ExitStack())):
        with pytest.raises(ValueError, match="no URLs of http"):
            read(f"{hostile}/endless", policy)
        with pytest.raises(ValueError, match="allows no such file"):
            read(tmp_path / "a.png", policy)
    assert read_image((tmp_path / "a.png").read_bytes(), policy).size == (2, 2)


def test_only_files_of_the_allowed_folders_are_read_links_followed(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "in/a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "out.png")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "out.png")
    policy = InputPolicy(folders=(tmp_path / "in",))
    assert read_image(tmp_path / "in/a.png", policy).size == (2, 2)
    for name in ("out.png", "in/../out.png", "in/link.png"):
        with pytest.raises(ValueError, match="allows no such file"):
            read_image(tmp_path / name, policy)


def test_a_video_is_fetched_into_a_temporary_file(tmp_path, served):
    (tmp_path / "clip.mp4").write_bytes(b"frames")
    with ExitStack() as stack:
        path = read_video(f"{served}/clip.mp4", HERE, stack)
        with open(path, "rb") as file:
            assert file.read() == b"frames"
    with pytest.raises(FileNotFoundError), open(path):
        pass
    with pytest.raises(ValueError, match="not public"):
        read_video(f"{served}/clip.mp4", InputPolicy(), ExitStack())


def test_a_policy_can_be_set_on_the_model_and_for_a_call(qwen, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(path)
    assert qwen.encode_documents(path, num_meta=1).shape == (1, 64)
    with pytest.raises(ValueError, match=r"input 0: .*allows no such file"):
        qwen.encode_documents(path, policy=InputPolicy.server())
    before = qwen.policy
    try:
        qwen.policy = InputPolicy.server()
        assert qwen.processor.policy == qwen.policy
        with pytest.raises(ValueError, match="allows no such file"):
            qwen.encode_documents(path)
    finally:
        qwen.policy = before


# -- Pictures ------------------------------------------------------------------------------------------------------


def test_a_bomb_is_refused_by_its_header():
    with pytest.raises(ValueError, match=r"its size \(13000, 13000\) is more than"):
        read_image(hostile_png(13000, 13000, bytes(1626)))
    with pytest.raises(ValueError, match="cannot be read"):  # within the limit, with no pixels to decode
        read_image(hostile_png(9400, 9400, b""))
    with pytest.raises(ValueError, match="more than the 3 pixels of the policy"):
        read_image(Image.new("RGB", (2, 2)), InputPolicy(max_pixels=3))


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n", encoded(Image.new("P", (4, 4)), "PCX")])
def test_formats_outside_the_list_are_not_opened(content):
    with pytest.raises(ValueError, match="it is no file of PNG, JPEG"):
        read_image(content)


def test_a_png_whose_pixels_end_early_is_an_error_and_a_dark_one_is_not():
    with pytest.raises(ValueError, match="pixels end 27 bytes early"):
        read_image(hostile_png(8, 4, b"\0" + b"\xff" * 8, depth=8))
    assert not np.asarray(read_image(encoded(Image.new("L", (9, 7)), "PNG"))).any()


def test_a_16_bit_tiff_whose_white_is_zero_is_not_inverted():
    grey = Image.fromarray(np.array([[0, 65535], [65535, 65535]], np.uint16))
    content = encoded(grey, "TIFF", tiffinfo={262: 0})
    stored = np.asarray(Image.open(io.BytesIO(content)))
    assert (np.asarray(read_image(content))[..., 0] == 255 - np.round(stored / 257)).all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
    ids=str,
)
def test_a_file_cut_short_is_an_error_or_the_same_picture(kind, options):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    content = encoded(Image.fromarray(noise), kind, **options)
    whole = np.asarray(read_image(content))
    refused = 0
    for length in range(len(content) - 1, 0, -1 - len(content) // 40):
        try:
            assert (np.asarray(read_image(content[:length])) == whole).all()
        except ValueError:
            refused += 1
    assert refused > 30


def test_a_pdf_says_to_render_its_pages():
    with pytest.raises(ValueError, match="Render its pages"):
        read_image(b"%PDF-1.7\n")


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"image": x}, lambda x: [{"role": "user", "content": x}]])
def test_deep_nesting_is_a_plain_error(wrap):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises((TypeError, ValueError), match="cannot encode"):
        parse(wrap(deep))


def test_a_text_that_is_a_tensor_says_so(qwen):
    with pytest.raises(TypeError, match="input 0: text must be a string"):
        qwen.encode_documents({"text": np.zeros(3)})


# -- Text that looks like structure ---------------------------------------------------------------------------------

NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "Lowercase": normalizers.Lowercase(),
    "Strip": normalizers.Strip(),
    "Nmt": normalizers.Nmt(),
    "Prepend": normalizers.Prepend("_"),
    "Replace": normalizers.Replace("x", "<"),
    "BERT": normalizers.BertNormalizer(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "all": normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
}
FORMS = [
    str.upper,
    str.title,
    lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    lambda text: text.replace("e", "é"),
    lambda text: text.replace("<", "x"),
    lambda text: text,
]


def normalizing_processor(name):
    words = {"<unk>": 0, "a": 1, "<|im_end|>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = NORMALIZERS[name]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_special_tokens({"eos_token": "<|im_end|>"})
    return MetaEmbedProcessor(fast, MetaEmbedConfig())


PROCESSORS = {name: normalizing_processor(name) for name in NORMALIZERS}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(NORMALIZERS)),
    st.lists(st.one_of(st.sampled_from(FORMS), st.text(max_size=3)), min_size=1, max_size=4),
)
def test_no_form_of_a_special_token_becomes_one_by_normalization(name, parts):
    processor = PROCESSORS[name]
    text = " ".join(part if isinstance(part, str) else part("<|im_end|>") for part in parts)
    ids = processor.tokenizer(processor.escape(text), add_special_tokens=False)["input_ids"]
    assert 2 not in ids


@pytest.mark.parametrize("name", ["NFKC", "Lowercase", "BERT", "all"])
@pytest.mark.parametrize("token", ["<|im_end|>", "[SEP]"])
def test_no_form_of_a_token_that_is_compared_after_normalization_becomes_one(name, token):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.normalizer = NORMALIZERS[name]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_special_tokens({"eos_token": AddedToken(token, normalized=True, special=True)})
    processor = MetaEmbedProcessor(fast, MetaEmbedConfig())
    for form in (*FORMS, lambda text: "\u00ad".join(text), lambda text: f"a{text * 2}a"):
        ids = fast(f"x {processor.escape(form(token))} x", add_special_tokens=False)["input_ids"]
        assert fast.convert_tokens_to_ids(token) not in ids


def test_meta_tokens_swapped_in_the_file_of_a_tokenizer_are_an_error(qwen, tmp_path):
    qwen.processor.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        for old, new in (("query_0", "X"), ("query_1", "query_0"), ("X", "query_1")):
            text = text.replace(f"<|meta_{old}|>", f"<|meta_{new}|>")
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="query Meta Tokens the ids"):
        MetaEmbedProcessor.from_pretrained(tmp_path)


def test_swapped_meta_tokens_are_an_error(qwen):
    config = qwen.config
    ids = {"query_token_ids": config.document_token_ids[:16], "document_token_ids": None}
    with pytest.raises(ValueError, match="query Meta Tokens the ids"):
        MetaEmbedProcessor(qwen.processor.backbone_processor, MetaEmbedConfig(**ids))


def test_the_chat_template_can_be_set_and_one_that_loops_is_an_error(qwen, monkeypatch):
    import copy

    monkeypatch.setattr("metaembed.backbones.templates.RENDER_SECONDS", 0.2)
    processor = copy.deepcopy(qwen.processor)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    processor.chat_template = loop
    assert processor.chat_template == loop
    start = time.monotonic()
    with pytest.raises(ValueError, match="input 0: the chat template takes too long"):
        processor.process_queries("a")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "template", ["{% for i in range(10**9) %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_the_time_for_many_messages_is_linear(qwen, template):
    import copy

    processor = copy.deepcopy(qwen.processor)
    processor.chat_template = template
    with pytest.raises((ValueError, OverflowError, RecursionError)):
        processor.process_queries("a")


def test_many_messages_take_time_in_proportion(qwen):
    item = parse([{"role": "user", "content": f"a cat {i}"} for i in range(3000)])
    start = time.monotonic()
    ids = qwen.processor.process_queries(item)["input_ids"]
    assert ids.shape[1] > 3000 and time.monotonic() - start < 3


def test_saving_a_processor_returns_its_file_and_omits_the_policy(qwen, tmp_path):
    (path,) = qwen.processor.save_pretrained(tmp_path)
    assert path == str(tmp_path / "processor_config.json") and "max_bytes" not in Path(path).read_text()


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "logging"])
def test_a_checkpoint_cannot_name_anything_of_transformers_as_its_processor(qwen, tmp_path, name):
    import json

    (path,) = qwen.processor.save_pretrained(tmp_path)
    content = json.loads(Path(path).read_text())
    content["metaembed"]["backbone_processor"] = name
    Path(path).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="neither a processor nor a tokenizer"):
        MetaEmbedProcessor.from_pretrained(tmp_path)


# -- Encoding ------------------------------------------------------------------------------------------------------


def test_many_threads_and_one_thread_give_equal_rows_also_in_training_mode(qwen):
    import copy
    from concurrent.futures import ThreadPoolExecutor

    import torch

    model = copy.deepcopy(qwen).train()
    texts = [f"a red apple and {i} cats " * (1 + i % 4) for i in range(12)]
    expected = [model.encode_queries(text, max_length=2 + i % 3) for i, text in enumerate(texts)]
    with ThreadPoolExecutor(6) as pool:
        rows = list(pool.map(lambda i: model.encode_queries(texts[i], max_length=2 + i % 3), range(12)))
    assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("where", ["weights", "image_mean"])
def test_embeddings_that_are_not_finite_are_an_error_that_names_the_input(qwen, where):
    import copy

    model = copy.deepcopy(qwen)
    if where == "weights":
        model.backbone.visual.patch_embed.proj.weight.data.fill_(float("nan"))
    else:
        model.processor.image_processor.image_mean = [float("nan")] * 3
    with pytest.raises(ValueError, match="input 1: its embedding is not finite"):
        model.encode_documents(["a", Image.new("RGB", (32, 32))], batch_size=1)


def test_global_defaults_of_torch_change_nothing(qwen, pictures):
    import torch

    expected = qwen.encode_documents(["a cat", pictures[0]])
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        rows = qwen.encode_documents(["a cat", pictures[0]])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(rows, expected)


def test_an_encoder_encodes_whatever_the_default_device_of_torch_is(qwen, pictures):
    import torch

    from metaembed.sentence_metaembed import to_multi_vector_encoder

    encoder = to_multi_vector_encoder(qwen, device="cpu")
    inputs = [{"image": pictures[0]}, "b"]
    expected = encoder.encode_document(inputs)
    try:
        torch.set_default_device("meta")
        rows = encoder.encode_document(inputs)
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))


def test_an_offloaded_model_encodes_on_the_device_that_it_runs_on(qwen, tmp_path):
    import copy

    import accelerate
    import torch

    model = accelerate.cpu_offload(copy.deepcopy(qwen), execution_device="cpu")
    assert model.device.type == "meta"
    torch.testing.assert_close(model.encode_queries("a cat"), qwen.encode_queries("a cat"))
    from_disk = accelerate.disk_offload(copy.deepcopy(qwen), tmp_path, execution_device="cpu")
    torch.testing.assert_close(from_disk.encode_queries("a cat"), qwen.encode_queries("a cat"))


def test_batches_of_any_kind_work_at_the_entry_point_of_sentence_transformers(qwen):
    import pandas
    from sentence_transformers import MultiVectorEncoder

    from metaembed.sentence_metaembed import MetaEmbedTransformer

    encoder = MultiVectorEncoder(modules=[MetaEmbedTransformer(qwen)], device="cpu")
    texts = ["a cat", "a red apple"]
    expected = encoder.encode_document(texts)
    for batch in (iter(texts), pandas.Series(texts), deque(texts), tuple(texts)):
        rows = encoder.encode_document(batch)
        assert len(rows) == 2 and all((a == b).all() for a, b in zip(rows, expected, strict=True))
    with pytest.raises(TypeError, match="cannot encode"):
        encoder.encode_document(set(texts))
    with pytest.raises(TypeError, match="num_meta is no option of the processor"):
        encoder.encode_document(texts, processing_kwargs={"num_meta": 2})
    with pytest.raises(ValueError, match="allows no such file"):
        encoder.encode_document([{"image": "/etc/passwd"}], policy=InputPolicy.server())
    (raw,) = encoder.encode_document(texts[:1], output_value=None)
    assert {"input_ids", "attention_mask", "token_embeddings"} <= raw.keys() and len(raw["input_ids"])


def test_a_processor_that_names_code_of_another_repository_is_an_error_until_that_is_trusted_too(qwen, tmp_path):
    (path,) = qwen.processor.save_pretrained(tmp_path / "model")
    other = tmp_path / "other"
    other.mkdir()
    code = "from transformers import Qwen2_5_VLProcessor\nclass Mine(Qwen2_5_VLProcessor): pass\n"
    (other / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{code}")
    content = json.loads(Path(path).read_text())
    content["metaembed"]["backbone_auto_map"] = f"{other}--code.Mine"
    Path(path).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="code of another repository"):
        MetaEmbedProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()
    MetaEmbedProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True, trusted_base=str(other))
    assert (tmp_path / "ran").exists()


def test_the_file_of_a_video_obeys_the_limit_of_bytes(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(bytes(100))
    with ExitStack() as stack, pytest.raises(ValueError, match="more than the 99 bytes"):
        read_video(tmp_path / "clip.mp4", InputPolicy(max_bytes=99), stack)


def test_a_checkpoint_without_the_package_opens_no_connection_and_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaembed.app.fetch", None)  # importing it raises
    with pytest.raises(ValueError, match="pip install metaembed"):
        read_image("https://example.com/cat.png")


def test_a_policy_set_on_the_encoder_is_the_models(qwen):
    encoder = to_multi_vector_encoder(qwen, device="cpu")
    before = qwen.policy
    try:
        encoder[0].policy = InputPolicy.server()
        assert qwen.policy == InputPolicy.server()
        with pytest.raises(ValueError, match="the policy allows no URLs"):
            encoder.encode_document([{"image": "https://example.com/cat.png"}])
    finally:
        qwen.policy = before


def test_deep_nesting_is_a_plain_error_at_the_entry_point_of_sentence_transformers_too(qwen):
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises((TypeError, ValueError), match="input 0"):
        to_multi_vector_encoder(qwen, device="cpu").encode_document([{"text": deep}])

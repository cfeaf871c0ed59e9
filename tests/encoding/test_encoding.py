"""Reading ahead, batches by tokens, streams and several devices: none of them changes an embedding or an error."""

import _thread
import copy
import itertools
import signal
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_models import WORDS, picture, tiny_model

from metaembed import MetaEmbedModel
from metaembed.encoding.batches import plan
from metaembed.encoding.devices import replica

SIZES = np.random.default_rng(0).integers(16, 120, (24, 2)).tolist()
MIXED = [picture(i, width, height) for i, (width, height) in enumerate(SIZES[:6])]
MIXED += ["a red cat", "", {"image": picture(6), "text": "boat"}, " ".join(WORDS * 3)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(token_projection=True)


@pytest.fixture(scope="module")
def alone(model):
    """The embeddings of a plain loop, one input at a time."""
    return torch.stack([model.encode_documents(item) for item in MIXED])


def close(rows, expected):
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@contextmanager
def spied(model, monkeypatch, before=lambda count: None):
    """Give a list of what the processor processes: numbers of inputs, and the shape of what comes out."""
    calls, process = [], model.processor.process

    def spy(items, *args, indices, **kwargs):
        before(len(calls))
        features = process(items, *args, indices=indices, **kwargs)
        calls.append((list(indices), features["input_ids"].shape))
        return features

    monkeypatch.setattr(model.processor, "process", spy)
    yield calls
    monkeypatch.undo()


@pytest.mark.parametrize(
    "options",
    [{"workers": 0}, {"workers": 1}, {"workers": 3}, {"batch_tokens": 200}, {"devices": ["cpu", "cpu:0"]}],
    ids=str,
)
def test_running_ahead_changes_no_embedding(model, alone, options):
    options = {"batch_size": None if "batch_tokens" in options else 3, **options}
    close(model.encode_documents(MIXED, **options), alone)
    pairs = model.encode_documents(MIXED, tokens=True, **options)
    close(pairs.meta, alone)
    close(pairs.tokens, model.encode_documents(MIXED, tokens=True, batch_size=len(MIXED), workers=0).tokens)


def test_without_the_package_the_plain_loop_gives_the_same(model, alone, monkeypatch):
    monkeypatch.setitem(sys.modules, "metaembed.encoding.run", None)
    close(model.encode_documents(MIXED, batch_size=3), alone)
    with pytest.raises(ImportError, match=r"needs encoding\.run of the package: pip install metaembed"):
        model.encode_documents(MIXED, batch_tokens=100)


# -- Errors and interrupts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2}, {"devices": ["cpu", "cpu:0"]}], ids=str)
def test_a_picture_that_cannot_be_read_is_the_same_error_whatever_runs_ahead(model, tmp_path, options, monkeypatch):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG not a picture")
    inputs = [picture(i) for i in range(60)]
    inputs[37] = bad
    with spied(model, monkeypatch) as calls, pytest.raises(ValueError, match=r"^input 37: the image .*bad\.png"):
        model.encode_documents(inputs, batch_size=2, **options)
    assert not running()
    done = len(calls)
    time.sleep(0.05)
    assert len(calls) == done  # nothing runs on
    assert model.encode_documents(inputs[:2]).isfinite().all()


def test_an_error_of_the_model_ends_what_runs_ahead(model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.encode_documents(MIXED, batch_size=1, workers=2)
    assert not running()


def test_an_interrupt_ends_encoding_and_leaves_nothing_behind(model, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model.train()
    inputs = [picture(i) for i in range(8)]
    slow = threading.Event()

    def interrupt(count):
        if count == 2:  # in the thread that runs ahead
            _thread.interrupt_main()
            slow.wait(0.3)

    with spied(model, monkeypatch, interrupt) as calls, pytest.raises(KeyboardInterrupt):
        model.encode_documents(inputs, batch_size=1, workers=1)
    assert not running() and len(calls) < 5
    assert all(module.training for module in model.modules())
    model.eval()
    signal.signal(signal.SIGINT, before)


# -- Batches by tokens ----------------------------------------------------------------------------------------------


def test_no_batch_has_more_tokens_than_its_budget_and_little_of_them_is_padding(model, monkeypatch):
    inputs = [picture(i, width, height) for i, (width, height) in enumerate(SIZES)] * 4
    with spied(model, monkeypatch) as calls:
        model.encode_documents(inputs, 1, batch_tokens=400)
    (overhead, *batches) = calls
    assert overhead[1][0] == 1 and sorted(i for indices, _ in batches for i in indices) == list(range(len(inputs)))
    assert all(rows * length <= 400 for _, (rows, length) in batches)
    lengths = [model.processor.process_documents([one], 1)["input_ids"].shape[1] for one in inputs[: len(SIZES)]]
    assert 1 - 4 * sum(lengths) / sum(rows * length for _, (rows, length) in batches) < 0.1
    assert len({rows for _, (rows, _) in batches}) > 2  # more of the small ones


def test_a_batch_that_is_longer_than_estimated_is_split(model, monkeypatch):
    inputs = ["\u6708" * 40] * 8  # each character is several tokens of this tokenizer
    (estimated,) = plan(model.processor, model.processor.parse(inputs), model.policy, None, 400, 10)
    with spied(model, monkeypatch) as calls:
        rows = model.encode_documents(inputs, 1, batch_tokens=400)
    kept = [shape for _, shape in calls[1:] if shape[0] * shape[1] <= 400]
    assert len(estimated) == 8 and sum(count for count, _ in kept) == 8
    close(rows, model.encode_documents(inputs, 1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"batch_tokens": 1.5}, "batch_tokens"),
        ({"workers": -1}, "workers"),
        ({"workers": True}, "workers"),
        ({"devices": "cpu"}, "devices must be a list"),
        ({"devices": []}, "devices must be a list"),
        ({"devices": ["cpu", "nowhere"]}, "nowhere"),
        ({"batch_tokens": 50, "batch_size": 0}, "batch_size"),
    ],
)
def test_bad_options_are_errors_that_name_them(model, options, match):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=match):
        model.encode_queries(["a"], **options)


# -- Streams --------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_embeddings_of_a_list_in_order(model, alone):
    chunks = list(model.stream_documents(iter(MIXED), chunk_size=4, batch_size=2))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    close(torch.cat(chunks), alone)
    arrays = list(model.stream_documents(iter(MIXED), 2, chunk_size=4, convert_to_numpy=True, workers=0))
    close(torch.from_numpy(np.concatenate(arrays)), alone[:, :2])
    (queries,) = model.stream_queries(MIXED)
    close(queries, model.encode_queries(MIXED))
    pairs = list(model.stream_documents(MIXED, chunk_size=7, tokens=2, devices=["cpu", "cpu:0"]))
    close(torch.cat([pair.tokens for pair in pairs]), model.encode_documents(MIXED, tokens=2).tokens)
    assert list(model.stream_documents(iter([]))) == []


def test_a_stream_takes_no_more_than_two_chunks_ahead(model):
    given, taken = 0, []
    endless = (taken.append(1) or "a cat" for _ in itertools.count())
    stream = model.stream_documents(endless, 1, chunk_size=5, batch_size=2)
    assert not taken
    for chunk in stream:
        given += len(chunk)
        assert len(taken) <= given + 5
        if given >= 50:
            break
    stream.close()
    assert not running()


def test_a_streams_error_names_the_input_and_comes_after_the_chunks_before_it(model):
    inputs, got = [*["a cat"] * 8, 3, "a"], []
    with pytest.raises(TypeError, match=r"^input 8: cannot encode 3"):
        for chunk in model.stream_documents(iter(inputs), chunk_size=3):
            got.append(len(chunk))
    assert got == [3, 3]
    inputs[8] = {"image": "missing.png"}
    with pytest.raises(ValueError, match=r"^input 8: the image 'missing\.png'"):
        list(model.stream_documents(iter(inputs), chunk_size=3))


def test_a_stream_leaves_the_model_in_training_between_its_chunks(model):
    model.train()
    for _ in model.stream_documents(["a", "b"], chunk_size=1):
        assert all(module.training for module in model.modules())
    model.eval()


@pytest.mark.parametrize("inputs", ["a cat", {"text": "a"}, 3, {"a", "b"}])
def test_what_is_no_stream_of_inputs_is_an_error_at_once(model, inputs):
    with pytest.raises(TypeError, match="iterable of inputs"):
        model.stream_documents(inputs)
    with pytest.raises(ValueError, match="chunk_size"):
        model.stream_documents(["a"], chunk_size=0)


# -- Devices --------------------------------------------------------------------------------------------------------


def test_a_replica_is_another_model_with_equal_weights_and_the_same_processor(model):
    other = replica(model, torch.device("cpu"))
    assert other is not model and other.processor is model.processor
    assert {id(part) for part in other.modules()}.isdisjoint(id(part) for part in model.modules())
    state, copied = model.state_dict(), other.state_dict()
    assert state.keys() == copied.keys() and all(torch.equal(state[name], copied[name]) for name in state)
    assert torch.equal(other.encode_queries("a cat"), model.encode_queries("a cat"))


def test_devices_compute_at_the_same_time(model, monkeypatch):
    together = threading.Barrier(2, timeout=30)
    forward = type(model).forward

    def wait(self, *args, **kwargs):
        if not together.broken:
            together.wait()  # would raise if the others waited for this one
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", wait)
    assert model.encode_documents(MIXED[:4], batch_size=1, devices=["cpu", "cpu:0"]).isfinite().all()


def test_autocast_holds_on_every_device(model):
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.encode_documents(MIXED[:4], batch_size=1)
        rows = model.encode_documents(MIXED[:4], batch_size=1, devices=["cpu", "cpu:0"])
    assert torch.equal(rows, expected)
    assert not torch.equal(rows, model.encode_documents(MIXED[:4], batch_size=1))


def test_a_model_that_accelerate_placed_cannot_be_copied(model):
    import accelerate

    placed = accelerate.cpu_offload(tiny_model(), execution_device="cpu")
    with pytest.raises(ValueError, match="device_map spread"):
        placed.encode_queries(["a"], devices=["cpu", "cpu:0"])


# -- Compiled models, and models that lie on a disk -----------------------------------------------------------------


def test_a_compiled_model_encodes_texts_in_one_graph(model):
    texts, compiled = ["a red cat", "fish " * 9, "boat"], copy.deepcopy(model)
    torch.compiler.reset()
    compiled.compile(backend="eager", fullgraph=True)
    close(compiled.encode_documents(texts, 4, batch_size=1), model.encode_documents(texts, 4))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


def test_models_that_are_mapped_to_a_disk_encode(model, alone, tmp_path):
    model.save_pretrained(tmp_path / "model")
    places = {"backbone.visual": "cpu", "backbone.language_model": "disk", "token_projection": "cpu"}
    for device_map in ({"": "disk"}, places):
        options = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
        placed = MetaEmbedModel.from_pretrained(tmp_path / "model", **options)
        assert any(parameter.device.type == "meta" for parameter in placed.parameters())
        close(placed.encode_documents(MIXED, batch_size=3), alone)

"""The loop of sentence-transformers, with its next batches prepared in threads: equal embeddings, order and errors."""

import copy
import pickle
import threading

import pytest
import torch
from tiny_models import picture, tiny_encoder

from metaembed.inputs_metaembed import InputPolicy

INPUTS = [picture(i, 20 + 9 * i, 90 - 8 * i) for i in range(6)]
INPUTS += ["a red cat", "", {"image": picture(7), "text": "boat"}, "fish " * 40]


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def threads_of(encoder, monkeypatch):
    """Return a set that the threads that process batches will be in."""
    threads, process = set(), encoder.processor.process

    def spy(*args, **kwargs):
        threads.add(threading.current_thread())
        return process(*args, **kwargs)

    monkeypatch.setattr(encoder.processor, "process", spy)
    return threads


@pytest.mark.parametrize("options", [{}, {"num_meta": 3, "prompt": "find"}, {"output_value": None}], ids=str)
def test_embeddings_and_order_are_those_of_the_plain_loop(encoder, options, monkeypatch):
    threads = threads_of(encoder, monkeypatch)
    for encode in (encoder.encode_query, encoder.encode_document):
        rows = encode(INPUTS, batch_size=3, **options)
        alone = [encode(item, **options) for item in INPUTS]
        if "output_value" in options:
            rows, alone = ([each["token_embeddings"] for each in found] for found in (rows, alone))
        for row, expected in zip(rows, alone, strict=True):
            torch.testing.assert_close(torch.as_tensor(row), torch.as_tensor(expected), atol=1e-5, rtol=0)
    assert len(threads) > 1 and not running()


def test_one_batch_starts_no_thread(encoder, monkeypatch):
    threads = threads_of(encoder, monkeypatch)
    encoder.encode_document(INPUTS, batch_size=10)
    assert threads == {threading.main_thread()}


def test_a_picture_that_cannot_be_read_or_may_not_be_is_an_error_and_nothing_runs_on(encoder):
    for bad, match in (({"image": "missing.png"}, r"missing\.png"), ({"image": b"nothing"}, "cannot be read")):
        with pytest.raises(ValueError, match=match):
            encoder.encode_document([*INPUTS[:5], bad], batch_size=1)
    with pytest.raises(TypeError, match="cannot encode 3"):
        encoder.encode_document([*INPUTS[:5], 3], batch_size=1)
    with pytest.raises(ValueError, match="allows no such file"):
        encoder.encode_document([*INPUTS[:5], {"image": "/etc/hostname"}], batch_size=1, policy=InputPolicy.server())
    assert not running()


def test_copies_and_what_a_process_of_a_pool_gets_encode_by_themselves(encoder):
    expected = encoder.encode_document(INPUTS, batch_size=3)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert other.preprocess.args[0] is other and other._inference.args[0] is other
        for row, right in zip(other.encode_document(INPUTS, batch_size=3), expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(row), torch.as_tensor(right), atol=1e-5, rtol=0)


def test_a_version_of_the_library_without_that_loop_is_left_alone():
    class Other:
        def _input_length(self, value):
            return 1

    other = Other()
    from metaembed.encoding.sentence import prepare_ahead

    prepare_ahead(other)
    assert vars(other) == {}


def test_concurrent_calls_of_one_encoder_do_not_mix_their_batches(encoder):
    from concurrent.futures import ThreadPoolExecutor

    halves = [INPUTS[:5], INPUTS[5:]] * 2
    expected = [encoder.encode_document(half, batch_size=2) for half in halves]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda half: encoder.encode_document(half, batch_size=2), halves))
    for rows, right in zip(found, expected, strict=True):
        for row, alone in zip(rows, right, strict=True):
            torch.testing.assert_close(torch.as_tensor(row), torch.as_tensor(alone), atol=1e-6, rtol=0)

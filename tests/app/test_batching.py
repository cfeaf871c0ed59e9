"""What the server's batches promise."""

import asyncio
import threading

import pytest
import torch

from metaembed.app.batching import Batcher, Busy


class Recorder:
    """Encodes a number as a vector of it, remembers its batches, and waits until it may go on."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()

    def __call__(self, key, inputs):
        self.batches.append((key, inputs))
        self.go.wait(10)
        if "bad" in inputs:
            raise ValueError("one is bad")
        return torch.tensor(inputs, dtype=torch.float32).view(-1, 1, 1)


async def gather(batcher, recorder, *jobs):
    """Send the first job, then the others while the model is busy with it."""
    tasks = [asyncio.create_task(batcher.encode(*jobs[0]))]
    while not recorder.batches:
        await asyncio.sleep(0.001)
    tasks += [asyncio.create_task(batcher.encode(*job)) for job in jobs[1:]]
    await asyncio.sleep(0.01)
    recorder.go.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def run(*jobs, **options):
    recorder = Recorder()

    async def main():
        async with Batcher(recorder, **options) as batcher:
            return await gather(batcher, recorder, *jobs)

    return asyncio.run(main()), recorder.batches


def test_requests_that_arrive_while_the_model_is_busy_share_a_batch():
    results, batches = run(("q", [0]), ("q", [1, 2]), ("q", [3]))
    assert batches == [("q", [0]), ("q", [1, 2, 3])]
    assert [r.flatten().tolist() for r in results] == [[0], [1, 2], [3]]


def test_unlike_requests_and_full_batches_stay_apart():
    results, batches = run(("q", [0]), ("q", [1, 2]), ("d", [3]), ("q", [4, 5]), ("q", [6]), batch_size=3)
    assert batches == [("q", [0]), ("q", [1, 2, 6]), ("d", [3]), ("q", [4, 5])]
    assert [r.flatten().tolist() for r in results] == [[0], [1, 2], [3], [4, 5], [6]]


def test_an_error_stays_with_the_request_that_caused_it():
    results, _ = run(("q", [0]), ("q", [1]), ("q", ["bad"]), ("q", [2]))
    assert isinstance(results[2], ValueError)
    assert [results[i].item() for i in (0, 1, 3)] == [0, 1, 2]


def test_too_much_waiting_is_busy():
    results, _ = run(("q", [0]), ("q", [1, 2]), ("q", [3]), most_waiting=2)
    assert isinstance(results[2], Busy)
    assert results[1].flatten().tolist() == [1, 2]


def test_what_was_accepted_is_finished_when_it_closes_and_no_more_is_accepted():
    recorder = Recorder()

    async def main():
        batcher = await Batcher(recorder).__aenter__()
        task = asyncio.create_task(batcher.encode("q", [7]))
        while not recorder.batches:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(batcher.__aexit__())
        await asyncio.sleep(0.01)
        with pytest.raises(Busy, match="shutting down"):
            await batcher.encode("q", [8])
        recorder.go.set()
        await closing
        return await task

    assert asyncio.run(main()).item() == 7


def test_a_request_that_is_gone_is_not_encoded():
    recorder = Recorder()

    async def main():
        async with Batcher(recorder) as batcher:
            first = asyncio.create_task(batcher.encode("q", [0]))
            while not recorder.batches:
                await asyncio.sleep(0.001)
            gone = asyncio.create_task(batcher.encode("q", [1]))
            await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.sleep(0.01)
            recorder.go.set()
            await first

    asyncio.run(main())
    assert recorder.batches == [("q", [0])]

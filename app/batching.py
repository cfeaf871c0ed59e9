"""Concurrent requests share the model's batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Batcher", "Busy"]


class Busy(RuntimeError):
    """Too much is waiting already."""


@dataclass(eq=False)
class _Job:
    key: Hashable
    inputs: Sequence[Any]
    result: asyncio.Future[Tensor]


class Batcher:
    """Encodes what concurrent requests ask for, several of them in one batch.

    While the model computes a batch, requests gather for the next one: a single request never waits for others to
    come, and many are encoded together. Belongs to one event loop; start it with `async with`.

    Args:
        encode: Takes a key, such as `("query", 4)`, and a list of inputs, and returns `[N, r, D]`, in a thread.
        batch_size: The most inputs that requests share a batch with. One request may have more of its own.
        most_waiting: The most inputs that wait; with more of them `encode` raises `Busy`.
        observe: Called with the number of inputs of every batch.
    """

    def __init__(
        self,
        encode: Callable[[Any, list[Any]], Tensor],
        *,
        batch_size: int = 32,
        most_waiting: int = 1024,
        observe: Callable[[int], object] = lambda size: None,
    ):
        self._encode, self._batch_size, self._most_waiting, self._observe = encode, batch_size, most_waiting, observe
        self._jobs: list[_Job] = []
        self._arrived = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *args: object) -> None:
        """Finish what was accepted."""
        self._closing = True
        self._arrived.set()
        assert self._task is not None
        await self._task
        self._thread.shutdown()

    async def encode(self, key: Hashable, inputs: Sequence[Any]) -> Tensor:
        """Encode inputs `[N]` as `[N, r, D]`.

        Raises:
            Busy: if too much is waiting, or the batcher is closing.
            Exception: what the encoder raises for these inputs; what it raises for those of others stays with them.
        """
        if self._closing:
            raise Busy("the server is shutting down")
        waiting = sum(len(job.inputs) for job in self._jobs)
        if waiting and waiting + len(inputs) > self._most_waiting:
            raise Busy(f"{waiting} inputs are waiting to be encoded already; try again later")
        job = _Job(key, inputs, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._arrived.set()
        return await job.result

    async def _run(self) -> None:
        while self._jobs or not self._closing:
            await self._arrived.wait()
            if batch := self._next():
                await self._do(batch)
            if not self._jobs and not self._closing:
                self._arrived.clear()

    def _next(self) -> list[_Job]:
        """Take the job that has waited longest, and others like it as far as the batch has room."""
        self._jobs = [job for job in self._jobs if not job.result.done()]  # whoever asked is gone
        batch: list[_Job] = []
        for job in self._jobs:
            size = sum(len(other.inputs) for other in batch) + len(job.inputs)
            if not batch or (job.key == batch[0].key and size <= self._batch_size):
                batch.append(job)
        self._jobs = [job for job in self._jobs if job not in batch]
        return batch

    async def _do(self, batch: list[_Job]) -> None:
        inputs = [one for job in batch for one in job.inputs]
        loop = asyncio.get_running_loop()
        try:
            embeddings = await loop.run_in_executor(self._thread, self._encode, batch[0].key, inputs)
            results: Sequence[Tensor] = embeddings.split([len(job.inputs) for job in batch])
        except Exception as error:
            if len(batch) > 1:  # find out whose fault it is
                for job in batch:
                    await self._do([job])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        self._observe(len(inputs))
        for job, result in zip(batch, results, strict=True):
            if not job.result.done():
                job.result.set_result(result)

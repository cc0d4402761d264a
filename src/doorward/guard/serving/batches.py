"""Requests that arrive together go through the guard as one batch; how many wait is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from doorward.guard.guard import Answers

#: How much the newest batch counts in what an input takes, on average.
NEWEST = 0.2


class QueueFullError(Exception):
    """As many inputs wait as may.

    Attributes:
        retry_after: seconds after which there should be room, a whole number.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass
class _Waiting:
    inputs: Tensor
    answer: asyncio.Future[Answers]


class Batcher:
    """Judge the inputs of several requests in one batch, in a thread of its own.

    Args:
        judge: what is done with a batch (n, c, h, w).
        largest: inputs of a batch, but for a single request that has more.
        room: inputs that may wait, those in work included.
        pause: seconds in which further requests may join.
    """

    def __init__(
        self, judge: Callable[[Tensor], Answers], *, largest: int = 64, room: int = 1024, pause: float = 0.002
    ) -> None:
        self._judge, self._largest, self._room, self._pause = judge, largest, room, pause
        self._queue: deque[_Waiting] = deque()
        self._held, self._seconds = 0, 0.0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="guard")
        self._worker: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def held(self) -> int:
        """Return how many inputs wait or are in work."""
        return self._held

    async def submit(self, inputs: Tensor) -> Answers:
        """Return the answers to the inputs (n, c, h, w) of a request.

        Raises:
            QueueFullError: if too many wait; a request that alone has more is taken when none does.
        """
        if self._closing or (self._held and self._held + len(inputs) > self._room):
            raise QueueFullError(max(1, math.ceil(self._held * self._seconds)))
        self._worker = self._worker or asyncio.create_task(self._work())
        waiting = _Waiting(inputs, asyncio.get_running_loop().create_future())
        self._held += len(inputs)
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def close(self) -> None:
        """Take nothing more, and finish what was taken."""
        self._closing = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        while True:
            if not self._queue:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
                continue
            if sum(len(one.inputs) for one in self._queue) < self._largest and not self._closing:
                await asyncio.sleep(self._pause)
            batch = list(self._next())
            alive = [one for one in batch if not one.answer.cancelled()]
            if alive:
                await self._answer(alive)
            self._held -= sum(len(one.inputs) for one in batch)

    def _next(self) -> Iterator[_Waiting]:
        """Take the requests that come first, up to a whole batch."""
        count = 0
        while self._queue and (not count or count + len(self._queue[0].inputs) <= self._largest):
            one = self._queue.popleft()
            count += len(one.inputs)
            yield one

    async def _answer(self, batch: list[_Waiting]) -> None:
        width = max(one.inputs.shape[-1] for one in batch)  # texts and recordings differ
        inputs = torch.cat([pad(one.inputs, (0, width - one.inputs.shape[-1])) for one in batch])
        begun = time.perf_counter()
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._judge, inputs)
        except Exception as error:
            if len(batch) > 1:  # one request must not spoil the others
                for one in batch:
                    await self._answer([one])
            else:
                self._settle(batch[0], error)
            return
        taken = (time.perf_counter() - begun) / len(inputs)
        self._seconds += (NEWEST if self._seconds else 1.0) * (taken - self._seconds)
        begin = 0
        for one in batch:
            end = begin + len(one.inputs)
            self._settle(one, _part(answers, begin, end))
            begin = end

    @staticmethod
    def _settle(one: _Waiting, found: Answers | Exception) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):  # its client has left meanwhile
            if isinstance(found, Exception):
                one.answer.set_exception(found)
            else:
                one.answer.set_result(found)


def _part(answers: Answers, begin: int, end: int) -> Answers:
    """Return the answers to some of the inputs."""
    own = slice(begin, end)
    return Answers(
        answers.predictions[own],
        answers.accepted[own],
        answers.reasons[own],
        np.ascontiguousarray(answers.scores[:, own]),
        answers.logits[own],
    )

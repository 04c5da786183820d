# SPDX-License-Identifier: Apache-2.0
"""Reads and writes at random through an object of the datapath, compared with a model of its content."""

from __future__ import annotations

import asyncio
import random

from target.datapath import FUA, Object


async def random_work(
    top: Object,
    model: bytearray,
    *,
    seed: int,
    operations: int = 60,
    workers: int = 4,
    largest: int = 200_000,
) -> None:
    """Each worker has a part of the disk for itself, so that the model says what every read has to give."""
    part = len(model) // workers
    await asyncio.gather(
        *(
            _work(top, model, random.Random(f"{seed} {index}"), index * part, part, operations, largest)
            for index in range(workers)
        )
    )


async def _work(
    top: Object, model: bytearray, rng: random.Random, start: int, size: int, operations: int, largest: int
) -> None:
    for _ in range(operations):
        length = rng.randint(1, min(largest, size)) if rng.random() < 0.5 else 512
        at = start + rng.randrange(size - length + 1)
        match rng.choice(("read", "read", "write", "write", "zeroes", "flush")):
            case "read":
                assert await top.read(at, length) == model[at : at + length], f"read {at}+{length}"
            case "write":
                data = rng.randbytes(length)
                await top.write(at, data, rng.choice((0, 0, FUA)))
                model[at : at + length] = data
            case "zeroes":
                await top.zeroes(at, length)
                model[at : at + length] = bytes(length)
            case _:
                await top.flush()

# SPDX-License-Identifier: Apache-2.0
"""Random requests over NBD, checked against a model in memory."""

from __future__ import annotations

import asyncio
import random

from target.exports.nbd.protocol import CommandFlag
from target.peers.nbd_client import NbdClient


class Model:
    """What [start, start + length) of the export has to hold. One worker at a time."""

    def __init__(self, start: int, length: int) -> None:
        self.start = start
        self.data = bytearray(length)


async def fill(client: NbdClient, model: Model) -> None:
    for at in range(0, len(model.data), 1 << 20):
        await client.write(model.start + at, bytes(model.data[at : at + (1 << 20)]))


async def check(client: NbdClient, model: Model) -> None:
    """Reads all of it."""
    for at in range(0, len(model.data), 1 << 20):
        wanted = model.data[at : at + (1 << 20)]
        compare(await client.read(model.start + at, len(wanted)), wanted, model.start + at)


def compare(got: bytes, wanted: bytes | bytearray, offset: int) -> None:
    if got != wanted:
        at = next(i for i in range(len(wanted)) if got[i] != wanted[i])
        raise AssertionError(f"byte {offset + at} is {got[at]:#x}, not {wanted[at]:#x}")


async def worker(client: NbdClient, model: Model, seed: int, requests: int) -> dict[str, int]:
    """So many random requests; returns how many of each kind."""
    source = random.Random(seed)
    kinds = ["write"] * 5 + ["read"] * 5 + ["zeroes", "zeroes", "trim", "flush", "cache", "fua"]
    done: dict[str, int] = {}
    for _ in range(requests):
        kind = source.choice(kinds)
        done[kind] = done.get(kind, 0) + 1
        offset, length = _range(source, len(model.data))
        await _request(client, model, kind, offset, length, source)
    return done


def _range(source: random.Random, size: int) -> tuple[int, int]:
    """Whole blocks or odd bytes; some longer than a command of the controller may be."""
    length = source.choice(
        [512, 4096, 4096, 65536, source.randrange(1, 20000), source.randrange(1, 1_200_000)]
    )
    offset = source.randrange(0, size - length)
    return (offset // 4096 * 4096, length) if source.random() < 0.6 else (offset, length)


async def _request(
    client: NbdClient, model: Model, kind: str, offset: int, length: int, source: random.Random
) -> None:
    at, end = model.start + offset, offset + length
    match kind:
        case "write" | "fua":
            data = source.randbytes(length)
            model.data[offset:end] = data
            await client.write(at, data, CommandFlag.FUA if kind == "fua" else 0)
        case "read":
            compare(await client.read(at, length), model.data[offset:end], at)
        case "zeroes":
            model.data[offset:end] = bytes(length)
            await client.write_zeroes(at, length, source.choice([0, CommandFlag.NO_HOLE]))
        case "trim":
            await client.trim(at, length)
            # It may have kept its content, or part of it.
            data = source.randbytes(length)
            model.data[offset:end] = data
            await client.write(at, data)
        case "flush":
            await client.flush()
        case "cache":
            await client.cache(at, length)


async def run(clients: list[NbdClient], models: list[Model], seed: int, requests: int) -> dict[str, int]:
    """A worker for each model, spread over the clients; then all is read again."""
    workers = [worker(clients[i % len(clients)], model, seed + i, requests) for i, model in enumerate(models)]
    totals: dict[str, int] = {}
    for counts in await asyncio.gather(*workers):
        for kind, count in counts.items():
            totals[kind] = totals.get(kind, 0) + count
    for i, model in enumerate(models):
        await check(clients[(i + 1) % len(clients)], model)
    return totals

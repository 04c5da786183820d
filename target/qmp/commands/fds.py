# SPDX-License-Identifier: Apache-2.0
"""Commands about descriptors that come over a monitor's socket (QEMU's misc.json). See target.fdsets."""

from __future__ import annotations

import os

from target.graph.errors import BlockError
from target.qmp.registry import Answer, Arguments, Context, command


class AddFdArguments(Arguments):
    fdset_id: int | None = None
    opaque: str | None = None


class RemoveFdArguments(Arguments):
    fdset_id: int
    fd: int | None = None


class FdnameArguments(Arguments):
    fdname: str


class AddfdInfo(Answer):
    fdset_id: int
    fd: int


class FdsetFdInfo(Answer):
    fd: int
    opaque: str | None = None


class FdsetInfo(Answer):
    fdset_id: int
    fds: list[FdsetFdInfo]


def _take_fd(context: Context) -> int:
    fd = context.monitor.take_fd() if context.monitor is not None else None
    if fd is None:
        raise BlockError("No file descriptor supplied via SCM_RIGHTS")
    return fd


@command("add-fd", AddFdArguments, returns=AddfdInfo)
async def add_fd(context: Context, given: AddFdArguments) -> AddfdInfo:
    fd = _take_fd(context)
    try:
        found = context.service.fds.add(fd, given.fdset_id, given.opaque)
    except BlockError:
        os.close(fd)
        raise
    return AddfdInfo(fdset_id=found.id, fd=fd)


@command("remove-fd", RemoveFdArguments)
async def remove_fd(context: Context, given: RemoveFdArguments) -> None:
    context.service.fds.remove(given.fdset_id, given.fd)


@command("query-fdsets", returns=list[FdsetInfo])
async def query_fdsets(context: Context, given: None) -> list[FdsetInfo]:
    return [
        FdsetInfo(fdset_id=found.id, fds=[FdsetFdInfo(fd=item.fd, opaque=item.opaque) for item in found.fds])
        for _, found in sorted(context.service.fds.sets.items())
    ]


@command("getfd", FdnameArguments)
async def getfd(context: Context, given: FdnameArguments) -> None:
    fd = _take_fd(context)
    try:
        context.service.fds.name(given.fdname, fd)
    except BlockError:
        os.close(fd)
        raise


@command("closefd", FdnameArguments)
async def closefd(context: Context, given: FdnameArguments) -> None:
    context.service.fds.close_named(given.fdname)

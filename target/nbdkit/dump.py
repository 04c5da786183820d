# SPDX-License-Identifier: Apache-2.0
"""Prints what a script is, as ``nbdkit python SCRIPT --dump-plugin`` does, or the exports that it offers."""

from __future__ import annotations

import sys

from target.nbdkit import module, wire
from target.nbdkit.plugin import API_MAX, Failed, Plugin
from target.nbdkit.runner import hide

MODELS = ("serialize_connections", "serialize_all_requests", "serialize_requests", "parallel")
ABI_VERSION = 3  # PEP 384
CALLBACKS = (
    *("dump_plugin", "config", "config_complete", "thread_model", "get_ready", "after_fork", "cleanup"),
    *("list_exports", "default_export", "preconnect", "open", "close", "export_description", "get_size"),
    *("block_size", "is_rotational", "can_multi_conn", "can_write", "can_flush", "can_trim", "can_zero"),
    *("can_fast_zero", "can_fua", "can_cache", "can_extents", "pread", "pwrite", "flush", "trim", "zero"),
    *("cache", "extents"),
)


def main() -> None:
    what, script, *config = sys.argv[1:]
    hide()
    server = module.Server(script, False, lambda kind: None, frozenset())
    module.install(server, wire.SHUTDOWN, wire.DISCONNECT)
    plugin = Plugin(server)
    try:
        plugin.load()
        for pair in config:
            key, _, value = pair.partition("=")
            plugin.config(key, value)
        if what == "exports":
            print_exports(plugin)
        else:
            print_fields(plugin)
    except Failed:
        sys.exit(1)


def print_fields(plugin: Plugin) -> None:
    print("name=python")
    print(f"script={plugin.script}")
    print(f"api_version={plugin.api}")
    print("max_thread_model=parallel")
    print(f"thread_model={MODELS[plugin.thread_model()]}")
    print("errno_is_preserved=0")
    for name in CALLBACKS:
        if plugin.find(name) is not None:
            print(f"has_{name}=1")
    print(f"python_version={sys.version.split()[0]}")
    print(f"python_pep_384_abi_version={ABI_VERSION}")
    print(f"nbdkit_python_maximum_api_version={API_MAX}")
    plugin.call_if("dump_plugin")


def print_exports(plugin: Plugin) -> None:
    """One a line: the name, and the description behind a tab if there is one."""
    plugin.call_if("config_complete")
    plugin.call_if("get_ready")
    for name, description in plugin.list_exports(False):
        print(f"{name}\t{description}" if description else name)
    plugin.call_if("cleanup")

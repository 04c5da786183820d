# SPDX-License-Identifier: Apache-2.0
"""A userspace storage target: a graph of block nodes, exported over NBD and vhost-user-blk."""

__version__ = "0.1.0"

# SPDX-License-Identifier: Apache-2.0
"""Nodes, edges, permissions and the graph that owns them."""

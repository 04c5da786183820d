# SPDX-License-Identifier: Apache-2.0
"""What queries answer: QAPI's structures, and how they are put together from nodes, edges and exports."""

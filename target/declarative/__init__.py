# SPDX-License-Identifier: Apache-2.0
"""A target as a file says it should be: what runs as such a file, and the way from what runs to another."""

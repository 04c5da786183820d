# SPDX-License-Identifier: Apache-2.0
"""A client of a running target, or any QMP server: the connection, words to typed values, what is shown."""

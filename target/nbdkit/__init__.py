# SPDX-License-Identifier: Apache-2.0
"""What runs an nbdkit Python plugin in a process of its own, and what the target and that process agree on.

Only the standard library is imported here, and nothing that a plugin could notice stays: the interpreter may
be another one than the target's.
"""

# SPDX-License-Identifier: Apache-2.0
"""QMP: commands with typed arguments and answers, the monitors that take them, and their schema."""

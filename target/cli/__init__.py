# SPDX-License-Identifier: Apache-2.0
"""The commands of ``blocktarget``. Thin: they parse, and call target.service."""

# SPDX-License-Identifier: Apache-2.0
"""Logs of writes, which the filter blklogwrites makes, and images rebuilt from them as after a power cut."""

from target.replay.image import Discarded, PowerCut, apply, rebuild
from target.replay.layout import Flag
from target.replay.log import Entry, LogError, WriteLog

__all__ = ["Discarded", "Entry", "Flag", "LogError", "PowerCut", "WriteLog", "apply", "rebuild"]

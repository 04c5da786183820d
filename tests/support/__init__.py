# SPDX-License-Identifier: Apache-2.0
"""What tests share: running third-party tools, and starting a target. No test lives here."""

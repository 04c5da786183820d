# SPDX-License-Identifier: Apache-2.0
"""From text (key=value, JSON, YAML) to typed options. Knows no driver and no export by name."""

# SPDX-License-Identifier: Apache-2.0
"""Mock peers that ship: clients and front ends, proper and misbehaving, to test targets with."""

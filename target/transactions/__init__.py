# SPDX-License-Identifier: Apache-2.0
"""Transactions: several actions of which all are done or none. An action registers by being defined."""

# SPDX-License-Identifier: Apache-2.0
"""Random sequences of commands on qemu-storage-daemon, on ours, and on a model: all three agree.

They agree on which commands succeed, on the text of each error (but for REVIEWED in qmp_differences), and
after each step on the graph: nodes, sizes, permissions of each edge, exports. Clients hold exports open
meanwhile, and read the same from both. BLOCKTARGET_STATEFUL multiplies the examples:
    BLOCKTARGET_STATEFUL=20 scripts/test tests/interop/test_qmp_stateful.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.qmp_export_rules import ExportRules
from tests.support.qmp_machine import make_images
from tests.support.qmp_node_rules import NodeRules
from tests.support.qmp_transaction_rules import TransactionRules

MULTIPLE = int(os.environ.get("BLOCKTARGET_STATEFUL", "1"))
EXAMPLES = 20
STEPS = 40


class Machine(NodeRules, ExportRules, TransactionRules):
    """All rules."""


@pytest.mark.timeout(300 * MULTIPLE)
def test_commands_agree_with_the_peer_and_the_model() -> None:
    with tempfile.TemporaryDirectory() as directory:
        make_images(Path(directory))
        Machine.images = Path(directory)
        run = settings(
            max_examples=EXAMPLES * MULTIPLE,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=MULTIPLE == 1,  # always the same ones in CI, others each time in a longer run
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        case = Machine.TestCase
        case.settings = run
        case().runTest()

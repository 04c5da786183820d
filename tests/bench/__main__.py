# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.bench``."""

import sys

from tests.bench.cli import main

sys.exit(main(sys.argv[1:]))

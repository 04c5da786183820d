# SPDX-License-Identifier: Apache-2.0
"""The benchmark: this target, its peers and the limit, measured in turns on the same images.

``scripts/bench`` runs it. rows.py says what is measured and what is asked of it, backends.py how each server
is started, clients.py who sends the requests, images.py which state the page cache is in; summary.py,
table.py and plot.py make figures of the samples. It measures only: what is served is tested elsewhere.
"""

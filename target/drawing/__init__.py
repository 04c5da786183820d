# SPDX-License-Identifier: Apache-2.0
"""Pictures of a running graph: what is seen through QMP (``observe``), and each form in which it is drawn."""

# SPDX-License-Identifier: Apache-2.0
"""The Python half of the datapath: loads, pins, attaches and fills what the kernel runs."""

# SPDX-License-Identifier: Apache-2.0
"""The node daemon: holds desired state, converges the kernel to it and wires pods."""

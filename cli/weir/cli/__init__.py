# SPDX-License-Identifier: Apache-2.0
"""The `weir` command: asks agents what they do, on a node or from outside."""

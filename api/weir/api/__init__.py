# SPDX-License-Identifier: Apache-2.0
"""What operator and agent share: addresses and the distribution contract. No I/O."""

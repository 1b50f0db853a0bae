# SPDX-License-Identifier: Apache-2.0
"""`make bench`: Weir against its peers and against itself, side by side in one run."""

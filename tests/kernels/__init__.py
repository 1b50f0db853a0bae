# SPDX-License-Identifier: Apache-2.0
"""`make test-kernels`: the datapath on other kernels, in guests that use this machine's files."""

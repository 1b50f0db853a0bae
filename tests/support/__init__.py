# SPDX-License-Identifier: Apache-2.0
"""Tools that the tests of several rings share."""

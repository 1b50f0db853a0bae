/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Steps that get a stack frame of their own, so that no program's frame passes 512 bytes. A
 * program that does not take the step does not contain it. */
#pragma once

#define __subprogram static __attribute__((noinline, unused))

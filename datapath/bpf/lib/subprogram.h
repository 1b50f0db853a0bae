/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Steps that get a stack frame of their own, so that no program's frame passes 512 bytes. A
 * program that does not take the step does not contain it. */
#pragma once

#define __subprogram static __attribute__((noinline, unused))

/* The same, and the verifier walks the step by itself, once for a program, where it walks a
 * __subprogram again for each call and all that is known there: judging a flow that way was most
 * of the time that loading takes. In return such a step takes the context and numbers alone (so
 * wants Linux 5.10), and gives a number that its callers know nothing of. */
#define __verified_once __attribute__((noinline))

/* SPDX-License-Identifier: Apache-2.0 */
/* What test programs assert with, and their dice. */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

/* Ends the process, whichever thread it is in, and says what was not true. */
#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                 \
            _exit(1);                                                                                                 \
        }                                                                                                             \
    } while (0)

/* Xorshift (Marsaglia, 2003); the state is not 0. */
static inline uint32_t next_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    return *state ^= *state << 5;
}

#endif

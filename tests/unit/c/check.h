/* SPDX-License-Identifier: Apache-2.0 */
/* What every test program asserts with. */
#ifndef CHECK_H
#define CHECK_H

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

#endif

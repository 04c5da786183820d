/* SPDX-License-Identifier: Apache-2.0 */
/* What the fuzz targets share: reading the input, a check that ends the program, and an I/O thread that is no
 * thread: its loop runs turn by turn inside the fuzzing thread, so that an input always does the same. */
#ifndef BT_FUZZ_H
#define BT_FUZZ_H

#include <stdio.h>

#include "core.h"

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (BT_UNLIKELY(!(condition))) {                                                                              \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                 \
            abort();                                                                                                  \
        }                                                                                                             \
    } while (0)

/* What an input does, for a look at a crash: FUZZ_TRACE=1 PROGRAM FILE. */
#define TRACE(...)                                                                                                    \
    do {                                                                                                              \
        if (BT_UNLIKELY(fuzz_trace))                                                                                  \
            fprintf(stderr, __VA_ARGS__);                                                                             \
    } while (0)
extern const char *fuzz_trace;

struct input {
    const uint8_t *at;
    size_t left;
};

/* The next byte; 0 past the end. */
static inline uint8_t take8(struct input *input)
{
    if (!input->left)
        return 0;
    input->left--;
    return *input->at++;
}
static inline uint16_t take16(struct input *input) { return (uint16_t)(take8(input) | take8(input) << 8); }
static inline uint32_t take32(struct input *input) { return take16(input) | (uint32_t)take16(input) << 16; }
static inline uint64_t take64(struct input *input) { return take32(input) | (uint64_t)take32(input) << 32; }

/* The next I/O thread of dp, without a thread of its own. */
struct bt_thread *inline_thread_new(bt_datapath *dp);
/* One turn of its loop, without waiting. */
void inline_thread_turn(struct bt_thread *thread);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* The datapath's thread.c with a way to run its loop by hand; linked in place of it. */
#include "thread.c"

#include "fuzz.h"

const char *fuzz_trace;

__attribute__((constructor)) static void read_environment(void) { fuzz_trace = getenv("FUZZ_TRACE"); }

struct bt_thread *inline_thread_new(bt_datapath *dp)
{
    int index = atomic_load(&dp->thread_count);
    CHECK(index < BT_MAX_THREADS);
    struct bt_thread *thread = thread_alloc(dp, (unsigned)index, 0);
    CHECK(thread);
    dp->threads[index] = thread;
    atomic_store(&dp->thread_count, index + 1);
    return thread;
}

void inline_thread_turn(struct bt_thread *thread)
{
    run_pollers(thread);
    run_turn(thread);
    if (thread->watches)
        run_watches(thread, 0);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Between save.c and save_wait.c: saves, and who waits for them. */
#ifndef BT_SAVE_H
#define BT_SAVE_H

#include "fence.h"

enum bt_save_how { BT_SAVE_PIECE, BT_SAVE_LARGE, BT_SAVE_HIDDEN };

struct bt_save {
    struct bt_save *next, **pprev; /* of the saver */
    struct bt_fence *fence;
    struct bt_thread *thread;
    uint64_t first, end; /* granules */
    enum bt_save_how how;
    uint64_t memory;
    struct bt_object *source, *target;
    struct bt_request *waiters, **waiters_tail;
    struct bt_request request; /* reads, then writes */
    struct iovec iov;
    void *buffer; /* PIECE bytes, or NULL */
    bool settling; /* copied; waits for those who have begun to read up to seq */
    uint64_t seq;
    bool timed;
    struct bt_timer timer;
    struct bt_message message;
};

/* A request goes to the end of a list; up to max are taken from its front. */
void bt_wait_append(struct bt_request ***tail, struct bt_request *request);
struct bt_request *bt_wait_take(struct bt_request **list, struct bt_request ***tail, unsigned max);
/* Without the lock: they look again. */
void bt_wait_wake(struct bt_request *list);
/* Without the lock: Python says what the failure means for each of them. On that thread. */
void bt_wait_fail(struct bt_fence *fence, struct bt_thread *thread, struct bt_request *list, int result);
/* The save's timer: who has waited for too long is told so. */
void bt_wait_late(struct bt_timer *timer, struct bt_thread *thread);
/* Under the lock: tells the control thread of what is over. */
void bt_wait_check(struct bt_fence *fence);

#endif

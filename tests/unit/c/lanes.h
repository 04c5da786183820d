/* SPDX-License-Identifier: Apache-2.0 */
/* What lanes share: each has one request under way, on an I/O thread, and begins the next when that is done. */
#ifndef LANES_H
#define LANES_H

#include "core.h"

/* The lane's next step, if any is left of its own; else one lane less is running. */
static inline void next_step(struct bt_request *request, struct bt_message *message, unsigned *left,
                             _Atomic unsigned *running)
{
    if (--*left)
        bt_thread_post(request->thread, message); /* not from here: operations may complete at once */
    else
        atomic_fetch_sub(running, 1);
}

static inline void begin(struct bt_request *request, bt_object *object, int op, int flags, uint64_t offset,
                         struct iovec *iov, void (*done)(struct bt_request *))
{
    request->op = (uint8_t)op;
    request->flags = (uint8_t)flags;
    request->offset = offset;
    request->length = iov->iov_len;
    request->iov = iov;
    request->iovcnt = 1;
    request->object = object;
    request->done = done;
    bt_request_start(request);
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* The core's functions for optional extensions, as one table. */
#include "device_api.h"

static const struct bt_device_api table = {
    .size = sizeof table,
    .io_size = sizeof(struct bt_io),
    .device_size = sizeof(struct bt_device),
    .thread_size = sizeof(struct bt_thread),
    .device_init = bt_device_init,
    .object_ref = bt_object_ref,
    .object_unref = bt_object_unref,
    .object_set_size = bt_object_set_size,
    .io_finish = bt_io_finish,
    .thread_get = bt_thread_get,
    .thread_post = bt_thread_post,
    .watch_add = bt_watch_add,
    .watch_modify = bt_watch_modify,
    .watch_remove = bt_watch_remove,
    .defer = bt_defer,
    .timer_add = bt_timer_add,
    .timer_cancel = bt_timer_cancel,
    .event_send = bt_event_send,
    .event_done = bt_event_done,
    .iov_slice = bt_iov_slice,
    .iov_to_buffer = bt_iov_to_buffer,
    .iov_from_buffer = bt_iov_from_buffer,
    .iov_zero = bt_iov_zero,
};

const void *bt_device_api(void) { return &table; }

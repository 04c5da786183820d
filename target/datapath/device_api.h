/* SPDX-License-Identifier: Apache-2.0 */
/* What the core gives to optional extensions that bring a kind of device (iSCSI). Such an extension is a shared
 * object of its own, which is not linked with this one: Python hands it the address of this table. It includes
 * core.h for the structures, and calls nothing of it but what is inline. */
#ifndef BT_DEVICE_API_H
#define BT_DEVICE_API_H

#include "core.h"

/* cffi: begin */
/* The table, for the constructors of extensions; the same for the life of the process. */
const void *bt_device_api(void);
/* cffi: end */

struct bt_device_api {
    /* What the extension was compiled with has to be what the core was: see bt_device_api_fits. */
    uint32_t size, io_size, device_size, thread_size;

    void (*device_init)(struct bt_device *device, bt_datapath *dp, const struct bt_device_ops *ops,
                        const struct bt_object_ops *object_ops, uint64_t tag, uint64_t size);
    void (*object_ref)(bt_object *object);
    void (*object_unref)(bt_object *object);
    void (*object_set_size)(bt_object *object, uint64_t size);
    void (*io_finish)(struct bt_io *io, int result);

    struct bt_thread *(*thread_get)(bt_datapath *dp, int index);
    void (*thread_post)(struct bt_thread *thread, struct bt_message *message);
    int (*watch_add)(struct bt_thread *thread, struct bt_watch *watch, uint32_t events);
    int (*watch_modify)(struct bt_thread *thread, struct bt_watch *watch, uint32_t events);
    void (*watch_remove)(struct bt_thread *thread, struct bt_watch *watch);
    void (*defer)(struct bt_thread *thread, struct bt_deferred *deferred);
    void (*timer_add)(struct bt_thread *thread, struct bt_timer *timer);
    void (*timer_cancel)(struct bt_thread *thread, struct bt_timer *timer);

    void (*event_send)(bt_datapath *dp, const struct bt_event *event);
    void (*event_done)(bt_datapath *dp, uint64_t cookie, int64_t result);

    int (*iov_slice)(const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length, struct iovec *out,
                     int max);
    void (*iov_to_buffer)(const struct iovec *iov, int iovcnt, uint64_t offset, void *out, uint64_t length);
    void (*iov_from_buffer)(const struct iovec *iov, int iovcnt, uint64_t offset, const void *data, uint64_t length);
    void (*iov_zero)(const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length);
};

static inline bool bt_device_api_fits(const struct bt_device_api *api)
{
    return api->size == sizeof *api && api->io_size == sizeof(struct bt_io) &&
           api->device_size == sizeof(struct bt_device) && api->thread_size == sizeof(struct bt_thread);
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* Objects: reference counts, counters, children, and those that only pass on: windows and concatenations. */
#include "request.h"
#include "throttle.h"

void bt_object_init(struct bt_object *object, bt_datapath *dp, enum bt_object_type type,
                    const struct bt_object_ops *ops, uint64_t tag, uint64_t size)
{
    object->type = type;
    object->ops = ops;
    object->dp = dp;
    object->tag = tag;
    object->size = size;
    object->refs = 1;
    object->discard_unmap = true;
    object->write_threshold = UINT64_MAX;
    object->counters = calloc(BT_MAX_THREADS, sizeof *object->counters);
    if (!object->counters)
        abort();
}

void bt_object_ref(bt_object *object) { atomic_fetch_add_explicit(&object->refs, 1, memory_order_relaxed); }

static void destroy_object(void *arg)
{
    struct bt_object *object = arg;
    struct bt_event event = {.type = BT_EVENT_RELEASED, .tag = object->tag};
    bt_datapath *dp = object->dp;
    for (int i = 0; i < object->child_count; i++)
        if (bt_child_get(&object->children[i]))
            bt_object_unref(bt_child_get(&object->children[i]));
    free(object->counters);
    object->ops->destroy(object);
    bt_event_send(dp, &event);
}

void bt_object_unref(bt_object *object)
{
    if (atomic_fetch_sub_explicit(&object->refs, 1, memory_order_acq_rel) == 1)
        bt_grace(object->dp, destroy_object, object);
}

void bt_object_set_policy(bt_object *object, bool discard_unmap, int detect_zeroes)
{
    object->discard_unmap = discard_unmap;
    object->detect_zeroes = (uint8_t)detect_zeroes;
}

void bt_object_set_fua(bt_object *object, bool takes_fua) { object->takes_fua = takes_fua; }

/* Acquire: who sees a map's new size sees the directory that was made for it. */
uint64_t bt_object_size(bt_object *object) { return atomic_load_explicit(&object->size, memory_order_acquire); }
void bt_object_set_size(bt_object *object, uint64_t size) { atomic_store(&object->size, size); }

void bt_object_counters(bt_object *object, struct bt_counters *out)
{
    memset(out, 0, sizeof *out);
    uint64_t *sum = (uint64_t *)out, written_end = 0;
    for (int t = 0; t < BT_MAX_THREADS; t++) {
        uint64_t *part = (uint64_t *)&object->counters[t];
        for (size_t i = 0; i < sizeof *out / sizeof *sum; i++)
            sum[i] += __atomic_load_n(&part[i], __ATOMIC_RELAXED);
        uint64_t end = __atomic_load_n(&object->counters[t].written_end, __ATOMIC_RELAXED);
        written_end = bt_max(written_end, end);
    }
    out->written_end = written_end;
}

void bt_object_succeed(bt_object *object, bt_object *old)
{
    memcpy(object->counters, old->counters, BT_MAX_THREADS * sizeof *object->counters);
    atomic_store(&object->write_threshold, atomic_load(&old->write_threshold));
}

void bt_child_init(bt_child *slot, struct bt_object *child)
{
    if (child)
        bt_object_ref(child);
    atomic_init(slot, child);
}

void bt_object_set_child(bt_object *object, int index, bt_object *child)
{
    if (child)
        bt_object_ref(child);
    struct bt_object *old = atomic_exchange(&object->children[index], child);
    if (old)
        bt_object_unref(old);
}

int bt_object_replace_child(bt_object *object, bt_object *old, bt_object *child)
{
    int n = 0;
    for (int i = 0; i < object->child_count; i++)
        if (bt_child_get(&object->children[i]) == old) {
            bt_object_set_child(object, i, child);
            n++;
        }
    return n;
}

void bt_object_set_write_threshold(bt_object *object, uint64_t offset)
{
    atomic_store(&object->write_threshold, offset);
}
uint64_t bt_object_write_threshold(bt_object *object) { return atomic_load(&object->write_threshold); }

/* ---- windows and concatenations ---- */

static void plain_destroy(struct bt_object *object) { free(object); }
static const struct bt_object_ops window_ops = {.destroy = plain_destroy};

bt_object *bt_window_new(bt_datapath *dp, uint64_t tag, bt_object *child, uint64_t offset, uint64_t size)
{
    struct bt_window *window = calloc(1, sizeof *window);
    uint64_t end;
    if (!window || __builtin_add_overflow(offset, size, &end)) {
        free(window);
        errno = EINVAL;
        return NULL;
    }
    bt_object_init(&window->base, dp, BT_OBJ_WINDOW, &window_ops, tag, size);
    bt_child_init(&window->child, child);
    window->base.children = &window->child;
    window->base.child_count = 1;
    window->offset = offset;
    return &window->base;
}

static const struct bt_object_ops concat_ops = {.destroy = plain_destroy};

struct cor {
    struct bt_object base;
    bt_child children[2]; /* what it passes requests on to, and the lowest map whose data are copied */
};
static const struct bt_object_ops cor_ops = {.destroy = plain_destroy};

bt_object *bt_cor_new(bt_datapath *dp, uint64_t tag, bt_object *child, bt_object *bottom)
{
    struct cor *cor = calloc(1, sizeof *cor);
    if (!cor)
        return NULL;
    bt_object_init(&cor->base, dp, BT_OBJ_COR, &cor_ops, tag, bt_object_size(child));
    bt_child_init(&cor->children[0], child);
    bt_child_init(&cor->children[1], bottom);
    cor->base.children = cor->children;
    cor->base.child_count = 2;
    return &cor->base;
}

bt_object *bt_concat_new(bt_datapath *dp, uint64_t tag, bt_object **children, int count)
{
    struct bt_concat *concat = calloc(1, sizeof *concat + (size_t)count * sizeof *children);
    uint64_t size = 0;
    for (int i = 0; concat && i < count; i++)
        if (__builtin_add_overflow(size, bt_object_size(children[i]), &size)) {
            free(concat);
            concat = NULL;
            errno = EINVAL;
        }
    if (!concat)
        return NULL;
    bt_object_init(&concat->base, dp, BT_OBJ_CONCAT, &concat_ops, tag, size);
    for (int i = 0; i < count; i++)
        bt_child_init(&concat->children[i], children[i]);
    concat->count = concat->base.child_count = count;
    concat->base.children = concat->children;
    return &concat->base;
}

static const struct bt_object_ops upcall_ops = {.destroy = plain_destroy};

bt_object *bt_upcall_new(bt_datapath *dp, uint64_t tag, uint64_t size)
{
    struct bt_device *device = calloc(1, sizeof *device);
    if (!device)
        return NULL;
    bt_device_init(device, dp, NULL, &upcall_ops, tag, size);
    device->base.type = BT_OBJ_UPCALL;
    return &device->base;
}

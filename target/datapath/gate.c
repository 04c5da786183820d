/* SPDX-License-Identifier: Apache-2.0 */
/* Gates: they hold what comes from above while what is below is changed. */
#include <limits.h>

#include "request.h"
#include "throttle.h"

static void set_drained(struct bt_gate *gate, bool drained)
{
    if (drained)
        bt_hurry(gate->base.dp, &gate->hurried);
    else
        bt_unhurry(gate->base.dp, &gate->hurried);
}

static void gate_destroy(struct bt_object *object)
{
    set_drained((struct bt_gate *)object, false);
    free(object);
}
static const struct bt_object_ops gate_ops = {.destroy = gate_destroy};

bt_object *bt_gate_new(bt_datapath *dp, uint64_t tag, bt_object *child, bool writable)
{
    struct bt_gate *gate = calloc(1, sizeof *gate);
    if (!gate)
        return NULL;
    bt_object_init(&gate->base, dp, BT_OBJ_GATE, &gate_ops, tag, bt_object_size(child));
    bt_child_init(&gate->child, child);
    gate->base.children = &gate->child;
    gate->base.child_count = 1;
    gate->writable = writable;
    gate->closed_from = UINT_MAX;
    for (int i = 0; i < BT_MAX_THREADS; i++)
        gate->parts[i].held_tail = &gate->parts[i].held;
    return &gate->base;
}

bool bt_gate_enter(struct bt_gate *gate, struct bt_request *request)
{
    struct bt_gate_part *part = &gate->parts[request->thread->index];
    unsigned closed_from = atomic_load_explicit(&gate->closed_from, memory_order_relaxed);
    if (BT_UNLIKELY(part->closed || request->thread->index >= closed_from)) {
        request->next = NULL;
        *part->held_tail = request;
        part->held_tail = &request->next;
        return false;
    }
    part->inside++;
    bt_count_request(&gate->base, request->thread, request->op, request->offset, request->length);
    return true;
}

#define DRAIN_SHIFT 32

/* One thread less to wait for; a drain that was given up meanwhile waits for none. */
static void part_drained(struct bt_gate *gate, uint32_t drain)
{
    uint64_t waiting = atomic_load(&gate->waiting), cookie;
    do {
        if (waiting >> DRAIN_SHIFT != drain || !(uint32_t)waiting)
            return;
        cookie = atomic_load(&gate->cookie); /* another drain's only when waiting is, too */
    } while (!atomic_compare_exchange_weak(&gate->waiting, &waiting, waiting - 1));
    if ((uint32_t)waiting == 1)
        bt_event_done(gate->base.dp, cookie, 0);
}

void bt_gate_leave(struct bt_gate *gate, struct bt_thread *thread)
{
    struct bt_gate_part *part = &gate->parts[thread->index];
    if (--part->inside == 0 && part->closed)
        part_drained(gate, part->drain);
}

/* To one thread: close the gate, or open it. Allocated, because a drain may be given up, and another begin, before a
 * thread that hangs in a system call has read of the first. */
struct gate_message {
    struct bt_message message;
    struct bt_gate *gate;
    uint32_t drain;
};

void bt_gate_tell_failure(bt_object *gate) { atomic_store(&((struct bt_gate *)gate)->tell_failure, true); }

/* What a client may not do is its own fault, and no failure of what is below. */
void bt_gate_failed(struct bt_gate *gate, const struct bt_request *request)
{
    if (!atomic_load_explicit(&gate->tell_failure, memory_order_relaxed) || request->ret == -EPERM)
        return;
    if (!atomic_exchange(&gate->tell_failure, false))
        return;
    struct bt_event event = {
        .type = BT_EVENT_FAILED,
        .tag = gate->base.tag,
        .op = request->op,
        .offset = request->offset,
        .length = request->length,
        .result = request->ret,
    };
    bt_event_send(gate->base.dp, &event);
}

static void close_part(struct bt_message *message, struct bt_thread *thread)
{
    struct gate_message *closing = BT_CONTAINER(message, struct gate_message, message);
    struct bt_gate *gate = closing->gate;
    struct bt_gate_part *part = &gate->parts[thread->index];
    part->closed = true;
    part->drain = closing->drain;
    if (part->inside == 0)
        part_drained(gate, part->drain);
    free(closing);
    bt_object_unref(&gate->base);
}

static void open_part(struct bt_message *message, struct bt_thread *thread)
{
    struct gate_message *opening = BT_CONTAINER(message, struct gate_message, message);
    struct bt_gate *gate = opening->gate;
    struct bt_gate_part *part = &gate->parts[thread->index];
    struct bt_request *request = part->held;
    free(opening);
    part->held = NULL;
    part->held_tail = &part->held;
    part->closed = false;
    while (request) {
        struct bt_request *next = request->next;
        bt_request_start(request);
        request = next;
    }
    bt_object_unref(&gate->base);
}

static void post_all(struct bt_gate *gate, int count, uint32_t drain,
                     void (*fn)(struct bt_message *message, struct bt_thread *thread))
{
    for (int i = 0; i < count; i++) {
        struct gate_message *message = malloc(sizeof *message);
        if (!message)
            abort();
        bt_object_ref(&gate->base);
        *message = (struct gate_message){.message.fn = fn, .gate = gate, .drain = drain};
        bt_thread_post(gate->base.dp->threads[i], &message->message);
    }
}

void bt_gate_drain(bt_object *object, uint64_t cookie)
{
    struct bt_gate *gate = (struct bt_gate *)object;
    int count = atomic_load(&object->dp->thread_count);
    uint32_t drain = (uint32_t)(atomic_load(&gate->waiting) >> DRAIN_SHIFT) + 1;
    atomic_store(&gate->waiting, (uint64_t)drain << DRAIN_SHIFT | ((uint64_t)count + 1));
    atomic_store(&gate->cookie, cookie);
    atomic_store(&gate->closed_from, (unsigned)count);
    post_all(gate, count, drain, close_part);
    set_drained(gate, true);
    part_drained(gate, drain);
}

void bt_gate_resume(bt_object *object, bt_object *child)
{
    struct bt_gate *gate = (struct bt_gate *)object;
    if (child)
        bt_object_set_child(object, 0, child);
    set_drained(gate, false);
    atomic_store(&gate->closed_from, UINT_MAX);
    post_all(gate, atomic_load(&object->dp->thread_count), 0, open_part);
}

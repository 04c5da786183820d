/* SPDX-License-Identifier: Apache-2.0 */
/* When the controller is late or wrong: timeouts, commands that are tried again, and resets. Python aborts commands
 * and resets the controller; here is what becomes of the commands. */
#include "nvme_queue.h"

#define RETRY_NS 2000000ull /* before the first retry; each further one waits twice as long */

/* ---- the timer: for what is late, and for what is to be tried again ---- */

void nvme_timer_arm(struct nvme_queue *queue, uint64_t at_ns)
{
    if (queue->timer_armed) {
        if (queue->timer.at_ns <= at_ns)
            return;
        bt_timer_cancel(queue->thread, &queue->timer);
    }
    queue->timer_armed = true;
    queue->timer.at_ns = at_ns;
    bt_timer_add(queue->thread, &queue->timer);
}

static void timer_cancel(struct nvme_queue *queue)
{
    if (queue->timer_armed)
        bt_timer_cancel(queue->thread, &queue->timer);
    queue->timer_armed = false;
}

void nvme_retry(struct nvme_queue *queue, struct nvme_slot *slot)
{
    unsigned times = slot->retries ? slot->retries - 1u : 0;
    slot->state = NVME_SLOT_RETRY;
    slot->sent_ns = nvme_now(queue) + (RETRY_NS << times);
    nvme_enter_busy(queue, slot);
    bt_count(&queue->counters.retries, 1);
    nvme_timer_arm(queue, slot->sent_ns);
}

/* When something is to happen with the slot next. */
static uint64_t due_ns(const struct nvme_queue *queue, const struct nvme_slot *slot)
{
    if (slot->state == NVME_SLOT_RETRY)
        return slot->sent_ns;
    return slot->reported == 2 ? UINT64_MAX : slot->sent_ns + (slot->reported + 1u) * queue->nvme->options.timeout_ns;
}

static uint64_t next_due_ns(const struct nvme_queue *queue)
{
    uint64_t next = UINT64_MAX;
    for (const struct nvme_slot *slot = queue->busy; slot; slot = slot->next)
        next = bt_min(next, due_ns(queue, slot));
    return next;
}

static void late(struct nvme_queue *queue, struct nvme_slot *slot)
{
    slot->reported++;
    if (slot->reported == 1) {
        bt_count(&queue->counters.timeouts, 1);
        nvme_tell(queue, BT_NVME_TIMEOUT, slot->sqe.cid);
    } else if (!queue->stuck_told) {
        queue->stuck_told = true;
        nvme_tell(queue, BT_NVME_STUCK, slot->sqe.cid);
    }
}

static bool any_late(const struct nvme_queue *queue, uint64_t now)
{
    for (const struct nvme_slot *slot = queue->busy; slot; slot = slot->next)
        if (slot->state == NVME_SLOT_SENT && due_ns(queue, slot) <= now)
            return true;
    return false;
}

static void look_at_slots(struct nvme_queue *queue, uint64_t now)
{
    struct nvme_slot *next;
    for (struct nvme_slot *slot = queue->busy; slot; slot = next) {
        next = slot->next;
        if (due_ns(queue, slot) > now)
            continue;
        if (slot->state == NVME_SLOT_RETRY) {
            nvme_leave_busy(queue, slot);
            nvme_send(queue, slot);
        } else {
            late(queue, slot);
        }
    }
}

void nvme_timer_passed(struct bt_timer *timer, struct bt_thread *thread)
{
    struct nvme_queue *queue = BT_CONTAINER(timer, struct nvme_queue, timer);
    uint64_t now = bt_now_ns();
    (void)thread;
    queue->timer_armed = false;
    if (!queue->running)
        return;
    if (any_late(queue, now))
        nvme_reap(queue); /* maybe it is not late, and only its interrupt did not come */
    if (!queue->running)
        return;
    look_at_slots(queue, now);
    uint64_t due = next_due_ns(queue);
    if (due != UINT64_MAX)
        nvme_timer_arm(queue, due);
}

/* ---- quiesce and resume ---- */

void nvme_quiesce_message(struct bt_message *message, struct bt_thread *thread)
{
    struct nvme_queue *queue = BT_CONTAINER(message, struct nvme_queue, quiesce);
    struct nvme *nvme = queue->nvme;
    (void)thread;
    nvme_reap(queue); /* what has completed is not done again */
    queue->running = false;
    timer_cancel(queue);
    if (atomic_fetch_sub(&nvme->waiting_for, 1) == 1)
        bt_event_done(nvme->device.base.dp, nvme->cookie, 0);
}

static struct nvme_slot *take_busy(struct nvme_queue *queue)
{
    struct nvme_slot *slots = queue->busy;
    queue->busy = NULL;
    queue->busy_tail = &queue->busy;
    queue->in_flight = 0;
    return slots;
}

static void fail_all(struct nvme_queue *queue, int error)
{
    struct nvme_slot *next;
    queue->dead = error;
    for (struct nvme_slot *slot = take_busy(queue); slot; slot = next) {
        next = slot->next;
        nvme_give_up(queue, slot, error);
    }
    nvme_fail_waiting(queue, error);
}

/* The rings are empty again, and so is the controller. */
static void send_again(struct nvme_queue *queue, bool broken)
{
    struct nvme_slot *next;
    for (struct nvme_slot *slot = take_busy(queue); slot; slot = next) {
        next = slot->next;
        if (slot->state == NVME_SLOT_RETRY) {
            nvme_enter_busy(queue, slot);
        } else if (broken || slot->resets++ == NVME_MAX_RESETS) {
            nvme_give_up(queue, slot, -EIO);
        } else {
            bt_count(&queue->counters.resubmitted, 1);
            nvme_send(queue, slot);
        }
    }
}

void nvme_resume_message(struct bt_message *message, struct bt_thread *thread)
{
    struct nvme_queue *queue = BT_CONTAINER(message, struct nvme_queue, resume);
    int error = queue->nvme->resume_error;
    bool broken = queue->broken;
    (void)thread;
    if (!queue->attached)
        return;
    if (error) {
        fail_all(queue, error);
        return;
    }
    bt_count(&queue->counters.resets, 1);
    nvme_queue_clear(queue);
    queue->dead = 0;
    queue->stuck_told = false;
    send_again(queue, broken);
    queue->running = true;
    nvme_pump(queue);
    if (queue->busy)
        nvme_timer_arm(queue, next_due_ns(queue));
}

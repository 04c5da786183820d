/* SPDX-License-Identifier: Apache-2.0 */
/* Throttling. A request is charged once for all of it that reaches a throttle. When the buckets are full it is parked
 * in its member's queue; clocks on I/O threads let requests go on, member after member, reads and writes in turn. */
#include "request.h"
#include "throttle.h"
#include "throttle_buckets.h"

#define NS 1e9

struct queue {
    struct bt_request *head, **tail;
};

struct throttle {
    struct bt_object base;
    bt_child child;
    _Atomic(struct bt_throttle_group *) group; /* NULL for a moment, while it moves to another: all pass */
    struct throttle *next; /* members of a group are in a ring; all below under its lock */
    struct queue queues[BT_DIRECTIONS];
    _Atomic uint64_t waited;
};

/* Goes off when the next request of a direction may go. */
struct clock {
    struct bt_timer timer;
    struct bt_throttle_group *group;
    struct bt_thread *thread; /* where it was set last */
    bool set;
    struct bt_message end;
};

struct bt_throttle_group {
    bt_datapath *dp;
    struct bt_throttle_group *next; /* of the datapath's, under its lock */
    _Atomic int refs;
    _Atomic bool limited[BT_DIRECTIONS];
    pthread_mutex_t lock; /* below */
    struct bt_buckets buckets;
    struct throttle *turn[BT_DIRECTIONS]; /* who was let go last */
    int direction;                     /* the same */
    uint64_t queued[BT_DIRECTIONS];
    struct clock clocks[BT_DIRECTIONS];
    _Atomic int ending;
};

static struct throttle *as_throttle(struct bt_object *object) { return (struct throttle *)object; }

/* ---- what a request has paid ---- */

static struct bt_payment *find_payment(struct bt_request *request, const struct bt_object *throttle)
{
    for (uint32_t i = 0; i < request->payments; i++)
        if (request->paid[i].throttle == throttle)
            return &request->paid[i];
    return NULL;
}

/* Whether the segment's beginning is paid for; the segment is cut to that. */
static bool has_paid(struct bt_segment *segment)
{
    struct bt_payment *payment = find_payment(segment->request, segment->object);
    if (!payment || segment->offset < payment->start || segment->offset >= payment->end)
        return false;
    segment->length = bt_min(segment->length, payment->end - segment->offset);
    return true;
}

/* False when it passes more throttles on its way than it can remember. */
static bool pay(struct bt_segment *segment)
{
    struct bt_request *request = segment->request;
    struct bt_payment *payment = find_payment(request, segment->object);
    if (!payment && request->payments == BT_THROTTLE_MAX_NESTED)
        return false;
    if (!payment)
        payment = &request->paid[request->payments++];
    *payment = (struct bt_payment){segment->object, segment->offset, segment->offset + segment->length};
    return true;
}

/* ---- queues; under the lock ---- */

static int direction_of(int op) { return op == BT_READ || op == BT_CACHE ? BT_READS : BT_WRITES; }

static void enqueue(struct bt_throttle_group *group, struct throttle *throttle, struct bt_segment *segment)
{
    int direction = direction_of(segment->op);
    struct queue *queue = &throttle->queues[direction];
    segment->request->next = NULL;
    *queue->tail = segment->request;
    queue->tail = &segment->request->next;
    group->queued[direction]++;
    atomic_fetch_add_explicit(&throttle->waited, 1, memory_order_relaxed);
}

/* A drain does not wait for the throttle. What was started by no export may be what another waits for. */
static bool is_hurried(const struct bt_request *request)
{
    if (!request->gated)
        return atomic_load(&request->object->dp->hurries) > 0;
    return atomic_load(&((struct bt_gate *)request->object)->hurried) ||
           (request->hurried && atomic_load(request->hurried));
}

static void let_go(struct bt_throttle_group *group, struct throttle *throttle, int direction, struct bt_request **at)
{
    struct queue *queue = &throttle->queues[direction];
    struct bt_request *request = *at;
    *at = request->next;
    if (!*at)
        queue->tail = at;
    group->queued[direction]--;
    bt_buckets_charge(&group->buckets, direction, request->fault_length);
    bt_request_wake(request);
}

static void let_hurried_go(struct bt_throttle_group *group, int direction)
{
    struct throttle *first = group->turn[direction], *throttle = first;
    do {
        struct bt_request **p = &throttle->queues[direction].head;
        while (*p)
            if (is_hurried(*p))
                let_go(group, throttle, direction, p);
            else
                p = &(*p)->next;
        throttle = throttle->next;
    } while (throttle != first);
}

static void let_next_go(struct bt_throttle_group *group, int direction)
{
    struct throttle *throttle = group->turn[direction];
    do
        throttle = throttle->next;
    while (!throttle->queues[direction].head);
    group->turn[direction] = throttle;
    group->direction = direction;
    let_go(group, throttle, direction, &throttle->queues[direction].head);
}

static bool may_next_go(struct bt_throttle_group *group, int direction)
{
    return group->queued[direction] && bt_buckets_wait(&group->buckets, direction) <= 0;
}

/* Lets go who may, and sets clocks for who may not. */
static void dispatch(struct bt_throttle_group *group, struct bt_thread *thread)
{
    uint64_t now = bt_now_ns();
    bt_buckets_leak(&group->buckets, now);
    for (int i = 0; i < BT_DIRECTIONS; i++)
        if (group->queued[i] && atomic_load(&group->dp->hurries))
            let_hurried_go(group, i);
    for (;;) {
        int direction = !group->direction;
        if (!may_next_go(group, direction))
            direction = !direction;
        if (!may_next_go(group, direction))
            break;
        let_next_go(group, direction);
    }
    for (int i = 0; i < BT_DIRECTIONS; i++) {
        struct clock *clock = &group->clocks[i];
        if (!group->queued[i] || clock->set)
            continue;
        clock->set = true;
        clock->thread = thread;
        clock->timer.at_ns = now + (uint64_t)(bt_buckets_wait(&group->buckets, i) * NS) + 1;
        bt_timer_add(thread, &clock->timer);
    }
}

static void clock_rang(struct bt_timer *timer, struct bt_thread *thread)
{
    struct clock *clock = BT_CONTAINER(timer, struct clock, timer);
    pthread_mutex_lock(&clock->group->lock);
    clock->set = false;
    dispatch(clock->group, thread);
    pthread_mutex_unlock(&clock->group->lock);
}

/* ---- new rules for those that wait ---- */

struct nudge {
    struct bt_message message;
    struct clock *clock;
};

static void stop_clock(struct clock *clock, struct bt_thread *thread)
{
    if (clock->set && clock->thread == thread) {
        bt_timer_cancel(thread, &clock->timer);
        clock->set = false;
    }
}

static void nudged(struct bt_message *message, struct bt_thread *thread)
{
    struct nudge *nudge = BT_CONTAINER(message, struct nudge, message);
    struct bt_throttle_group *group = nudge->clock->group;
    pthread_mutex_lock(&group->lock);
    stop_clock(nudge->clock, thread);
    dispatch(group, thread);
    pthread_mutex_unlock(&group->lock);
    bt_throttle_group_unref(group);
    free(nudge);
}

/* Whoever waits has a clock set: on its thread all is looked at anew. Under the lock. */
static void nudge_waiters(struct bt_throttle_group *group)
{
    for (int i = 0; i < BT_DIRECTIONS; i++) {
        struct clock *clock = &group->clocks[i];
        if (!clock->set || !group->queued[i])
            continue;
        struct nudge *nudge = malloc(sizeof *nudge);
        if (!nudge)
            abort();
        *nudge = (struct nudge){.message.fn = nudged, .clock = clock};
        atomic_fetch_add(&group->refs, 1);
        bt_thread_post(clock->thread, &nudge->message);
    }
}

static void look_anew(bt_datapath *dp)
{
    pthread_mutex_lock(&dp->lock);
    for (struct bt_throttle_group *group = dp->throttle_groups; group; group = group->next) {
        pthread_mutex_lock(&group->lock);
        nudge_waiters(group);
        pthread_mutex_unlock(&group->lock);
    }
    pthread_mutex_unlock(&dp->lock);
}

void bt_hurry(bt_datapath *dp, _Atomic bool *flag)
{
    if (atomic_exchange(flag, true))
        return;
    atomic_fetch_add(&dp->hurries, 1);
    look_anew(dp);
}

void bt_unhurry(bt_datapath *dp, _Atomic bool *flag)
{
    if (atomic_exchange(flag, false))
        atomic_fetch_sub(&dp->hurries, 1);
}

void bt_throttle_group_set(bt_throttle_group *group, const struct bt_throttle_limits *limits)
{
    pthread_mutex_lock(&group->lock);
    bt_buckets_set(&group->buckets, limits, bt_now_ns());
    for (int i = 0; i < BT_DIRECTIONS; i++)
        atomic_store_explicit(&group->limited[i], bt_buckets_limit(&group->buckets, i), memory_order_release);
    nudge_waiters(group);
    pthread_mutex_unlock(&group->lock);
}

/* ---- a request on its way ---- */

static bool others_wait(const struct bt_throttle_group *group, int direction)
{
    return group->queued[direction] || (group->buckets.shared && group->queued[!direction]);
}

static bool admit(struct throttle *throttle, int direction, struct bt_segment *segment)
{
    struct bt_throttle_group *group = atomic_load_explicit(&throttle->group, memory_order_acquire);
    if (!group)
        return true;
    pthread_mutex_lock(&group->lock);
    bool moved = atomic_load_explicit(&throttle->group, memory_order_relaxed) != group;
    bool admitted = moved || is_hurried(segment->request);
    if (!admitted && !others_wait(group, direction)) {
        bt_buckets_leak(&group->buckets, bt_now_ns());
        admitted = bt_buckets_wait(&group->buckets, direction) <= 0;
    }
    if (admitted) {
        bt_buckets_charge(&group->buckets, direction, segment->length);
    } else {
        segment->request->fault_length = segment->length;
        enqueue(group, throttle, segment);
        dispatch(group, segment->request->thread);
    }
    pthread_mutex_unlock(&group->lock);
    return admitted;
}

static bool is_limited(struct throttle *throttle, int direction)
{
    struct bt_throttle_group *group = atomic_load_explicit(&throttle->group, memory_order_acquire);
    return group && atomic_load_explicit(&group->limited[direction], memory_order_acquire);
}

bool bt_throttle_resolve(struct bt_object *object, struct bt_segment *segment)
{
    struct throttle *throttle = as_throttle(object);
    int direction = direction_of(segment->op);
    if (segment->op != BT_STATUS && is_limited(throttle, direction) && !has_paid(segment)) {
        if (!pay(segment)) {
            segment->kind = BT_SEG_ERROR;
            segment->error = -ELOOP;
            return false;
        }
        if (!admit(throttle, direction, segment)) {
            segment->kind = BT_SEG_PARKED;
            return false;
        }
    }
    bt_count_request(object, segment->request->thread, segment->op, segment->offset, segment->length);
    segment->object = bt_child_get(&throttle->child);
    return true;
}

/* ---- members ---- */

static void join(struct bt_throttle_group *group, struct throttle *throttle)
{
    atomic_fetch_add(&group->refs, 1);
    pthread_mutex_lock(&group->lock);
    struct throttle *other = group->turn[BT_READS];
    throttle->next = other ? other->next : throttle;
    if (other)
        other->next = throttle;
    for (int i = 0; i < BT_DIRECTIONS; i++)
        if (!group->turn[i])
            group->turn[i] = throttle;
    atomic_store_explicit(&throttle->group, group, memory_order_release);
    pthread_mutex_unlock(&group->lock);
}

static void leave(struct bt_throttle_group *group, struct throttle *throttle)
{
    pthread_mutex_lock(&group->lock);
    struct throttle *before = throttle;
    for (int i = 0; i < BT_DIRECTIONS; i++)
        while (throttle->queues[i].head)
            let_go(group, throttle, i, &throttle->queues[i].head);
    while (before->next != throttle)
        before = before->next;
    before->next = throttle->next;
    for (int i = 0; i < BT_DIRECTIONS; i++)
        if (group->turn[i] == throttle)
            group->turn[i] = before == throttle ? NULL : before;
    atomic_store(&throttle->group, NULL);
    pthread_mutex_unlock(&group->lock);
    bt_throttle_group_unref(group);
}

void bt_throttle_move(bt_object *object, bt_throttle_group *group)
{
    struct throttle *throttle = as_throttle(object);
    struct bt_throttle_group *old = atomic_load(&throttle->group);
    if (old == group)
        return;
    leave(old, throttle);
    join(group, throttle);
}

uint64_t bt_throttle_waited(bt_object *object) { return atomic_load(&as_throttle(object)->waited); }

static void throttle_destroy(struct bt_object *object)
{
    leave(atomic_load(&as_throttle(object)->group), as_throttle(object));
    free(object);
}
static const struct bt_object_ops throttle_ops = {.destroy = throttle_destroy};

bt_object *bt_throttle_new(bt_datapath *dp, uint64_t tag, bt_object *child, bt_throttle_group *group)
{
    struct throttle *throttle = calloc(1, sizeof *throttle);
    if (!throttle)
        return NULL;
    bt_object_init(&throttle->base, dp, BT_OBJ_THROTTLE, &throttle_ops, tag, bt_object_size(child));
    bt_child_init(&throttle->child, child);
    throttle->base.children = &throttle->child;
    throttle->base.child_count = 1;
    for (int i = 0; i < BT_DIRECTIONS; i++)
        throttle->queues[i].tail = &throttle->queues[i].head;
    join(group, throttle);
    return &throttle->base;
}

/* ---- groups come and go ---- */

bt_throttle_group *bt_throttle_group_new(bt_datapath *dp)
{
    struct bt_throttle_group *group = calloc(1, sizeof *group);
    if (!group)
        return NULL;
    group->dp = dp;
    group->refs = 1;
    pthread_mutex_init(&group->lock, NULL);
    for (int i = 0; i < BT_DIRECTIONS; i++) {
        group->clocks[i].group = group;
        group->clocks[i].timer.fn = clock_rang;
    }
    pthread_mutex_lock(&dp->lock);
    group->next = dp->throttle_groups;
    dp->throttle_groups = group;
    pthread_mutex_unlock(&dp->lock);
    return group;
}

static void end_part(struct bt_throttle_group *group)
{
    if (atomic_fetch_sub(&group->ending, 1) != 1)
        return;
    pthread_mutex_destroy(&group->lock);
    free(group);
}

static void end_clock(struct bt_message *message, struct bt_thread *thread)
{
    struct clock *clock = BT_CONTAINER(message, struct clock, end);
    pthread_mutex_lock(&clock->group->lock);
    stop_clock(clock, thread);
    pthread_mutex_unlock(&clock->group->lock);
    end_part(clock->group);
}

/* After a grace period: nobody is about to lock it. A clock may still be set, with nobody waiting. */
static void end_group(void *arg)
{
    struct bt_throttle_group *group = arg;
    atomic_store(&group->ending, BT_DIRECTIONS);
    for (int i = 0; i < BT_DIRECTIONS; i++) {
        struct clock *clock = &group->clocks[i];
        clock->end.fn = end_clock;
        if (clock->thread)
            bt_thread_post(clock->thread, &clock->end);
        else
            end_part(group);
    }
}

void bt_throttle_group_unref(bt_throttle_group *group)
{
    if (atomic_fetch_sub(&group->refs, 1) != 1)
        return;
    struct bt_datapath *dp = group->dp;
    pthread_mutex_lock(&dp->lock);
    struct bt_throttle_group **p = &dp->throttle_groups;
    while (*p != group)
        p = &(*p)->next;
    *p = group->next;
    pthread_mutex_unlock(&dp->lock);
    bt_grace(dp, end_group, group);
}

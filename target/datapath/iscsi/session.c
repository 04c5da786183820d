/* SPDX-License-Identifier: Apache-2.0 */
/* A session: a connection in the hands of one I/O thread, and the commands that go over it or wait for it. */
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

#define MAX_SENT 256
#define MANY 8 /* commands, of which more than one are likely to be answered soon */
#define MAX_RESENT 5   /* a command after which the connection breaks each time is refused at last */
#define MAX_TIMEOUTS 2
#define TICK_NS SECOND
#define IDLE_TICK_NS (5 * SECOND)
#define SILENCE_NS (5 * SECOND) /* after so much of it the target is asked whether it is there */
#define MAX_NOPS 3
#define LOGOUT_NS (2 * SECOND)

static void kicked(struct bt_deferred *deferred, struct bt_thread *thread);
static void ended(struct bt_deferred *deferred, struct bt_thread *thread);
static void ticked(struct bt_timer *timer, struct bt_thread *thread);
static void retry_due(struct bt_timer *timer, struct bt_thread *thread);

void session_init(struct session *session, struct node *node, unsigned index, struct bt_thread *thread)
{
    session->node = node;
    session->index = index;
    session->thread = thread;
    session->state = DOWN;
    session->kick.fn = kicked;
    session->end.fn = ended;
    session->tick.fn = ticked;
    session->retry.fn = retry_due;
    list_init(&session->waiting);
    list_init(&session->sent);
    list_init(&session->delayed);
}

void session_destroy(struct session *session)
{
    while (session->free) {
        struct command *command = session->free;
        session->free = command->next;
        free(command);
    }
}

void session_break(struct session *session, const char *format, ...)
{
    va_list args;
    if (session->broken)
        return;
    session->broken = true;
    pthread_mutex_lock(&session->node->lock);
    va_start(args, format);
    vsnprintf(session->reason, sizeof session->reason, format, args);
    va_end(args);
    pthread_mutex_unlock(&session->node->lock);
}

/* ---- the end of a connection ---- */

/* Commands that were answered before all of them was sent: those of which all is now, or of which nothing will be. */
static void settle_held(struct session *session, bool all)
{
    for (struct command *command = session->sent.head, *next; command && session->held; command = next) {
        next = command->next;
        if (command->held && (all || !command->unsent))
            command_settle(command);
    }
}

static void drop_connection(struct session *session)
{
    const struct bt_device_api *api = session->node->api;
    if (!session->ctx)
        return;
    api->watch_remove(session->thread, &session->watch);
    session->dying = true;
    iscsi_destroy_context(session->ctx);
    session->dying = false;
    session->ctx = NULL;
    guard_free(session->guard);
    session->guard = NULL;
    session->broken = false;
    session->refreshing = false;
    session->nops = 0;
    settle_held(session, true);
    if (session->ticking)
        api->timer_cancel(session->thread, &session->tick);
    session->ticking = false;
}

static void move_all(struct list *from, struct list *to)
{
    while (from->head) {
        struct command *command = from->head;
        list_remove(from, command);
        list_append(to, command);
    }
}

/* All that the session has, in the order in which it came; nothing is left in its lists. */
static void take_commands(struct session *session, struct list *all)
{
    list_init(all);
    move_all(&session->sent, all);
    move_all(&session->delayed, all);
    move_all(&session->waiting, all);
    if (session->retrying)
        session->node->api->timer_cancel(session->thread, &session->retry);
    session->retrying = false;
}

static void fail_commands(struct session *session, int result)
{
    struct list all;
    take_commands(session, &all);
    while (all.head) {
        struct command *command = all.head;
        list_remove(&all, command);
        command_fail(command, result);
    }
}

/* 0, or why a command that was sent is not to be sent again. */
static int why_not_again(struct session *session, struct command *command)
{
    if (command->once)
        return -ENOTCONN;
    if (command->timeouts > MAX_TIMEOUTS)
        return -ETIMEDOUT;
    if (command->resent++ >= MAX_RESENT)
        return -EIO;
    atomic_fetch_add_explicit(&session->node->resent, 1, memory_order_relaxed);
    return 0;
}

static void keep_commands(struct session *session)
{
    unsigned sent = session->sent.count;
    struct list all;
    take_commands(session, &all);
    for (; all.head; sent -= sent > 0) {
        struct command *command = all.head;
        list_remove(&all, command);
        int error = sent ? why_not_again(session, command) : 0;
        if (error)
            command_fail(command, error);
        else
            list_append(&session->waiting, command);
    }
}

static void closed(struct session *session)
{
    drop_connection(session);
    fail_commands(session, -ESHUTDOWN);
    session->state = CLOSED;
    session->node->api->defer(session->thread, &session->end);
}

static void ended(struct bt_deferred *deferred, struct bt_thread *thread)
{
    (void)thread;
    node_session_closed(BT_CONTAINER(deferred, struct session, end)->node);
}

static void lost(struct session *session)
{
    if (session->state == CLOSING) {
        closed(session);
        return;
    }
    session->state = DOWN;
    drop_connection(session);
    keep_commands(session);
    node_event(session, BT_ISCSI_LOST);
}

void session_give_up(struct session *session)
{
    if (session->state != DOWN)
        return;
    session->state = GIVEN_UP;
    fail_commands(session, -EIO);
}

/* ---- service ---- */

struct command *session_find(struct session *session, uint32_t itt)
{
    for (struct command *command = session->sent.head; command; command = command->next)
        if (command->task.itt == itt)
            return command;
    return NULL;
}

struct command *session_find_open(struct session *session, uint32_t itt, int direction)
{
    struct command *command = session ? session_find(session, itt) : NULL;
    if (!command || command->direction != direction || command->ended)
        return NULL;
    return output_has(guard_output(session->guard), command) ? command : NULL;
}

void session_ends(struct session *session, uint32_t itt)
{
    struct command *command = session ? session_find(session, itt) : NULL;
    if (command)
        command->ended = true;
}

/* Takes what has come, and sends what there is to be sent. */
static void service(struct session *session, bool pull)
{
    int ret = pull ? guard_pull(session->guard) : 0;
    if (ret == 0 && !session->broken)
        ret = guard_push(session->guard);
    if (ret < 0)
        session_break(session, "%s", guard_error(session->guard));
    if (session->broken) {
        lost(session);
        return;
    }
    settle_held(session, false);
    uint32_t wanted = (uint32_t)guard_events(session->guard);
    if (wanted != session->events) {
        session->events = wanted;
        session->node->api->watch_modify(session->thread, &session->watch, wanted);
    }
}

static void ready(struct bt_watch *watch, struct bt_thread *thread, uint32_t events)
{
    struct session *session = BT_CONTAINER(watch, struct session, watch);
    thread->from_afar = true;
    if (session->sent.count >= MANY)
        sched_yield(); /* to the target if it shares this CPU: a wake-up for each answer costs more than the answer */
    session->heard_ns = bt_now_ns();
    service(session, events & ~(uint32_t)POLLOUT);
}

/* What was started in this turn goes out together. */
static void kicked(struct bt_deferred *deferred, struct bt_thread *thread)
{
    struct session *session = BT_CONTAINER(deferred, struct session, kick);
    (void)thread;
    if (!session->ctx)
        return;
    while (session->state == UP && session->waiting.head && session->sent.count < MAX_SENT && !session->broken) {
        struct command *command = session->waiting.head;
        list_remove(&session->waiting, command);
        list_append(&session->sent, command);
        if (!command_send(command))
            session_break(session, "%s", iscsi_get_error(session->ctx));
    }
    service(session, false);
}

/* ---- time ---- */

void session_retry_later(struct session *session, struct command *command, uint64_t delay_ns)
{
    const struct bt_device_api *api = session->node->api;
    if (!delay_ns) {
        list_append(&session->waiting, command);
        api->defer(session->thread, &session->kick);
        return;
    }
    command->due_ns = bt_now_ns() + delay_ns;
    list_append(&session->delayed, command);
    if (session->retrying && session->retry.at_ns <= command->due_ns)
        return;
    if (session->retrying)
        api->timer_cancel(session->thread, &session->retry);
    session->retrying = true;
    session->retry.at_ns = command->due_ns;
    api->timer_add(session->thread, &session->retry);
}

static void retry_due(struct bt_timer *timer, struct bt_thread *thread)
{
    struct session *session = BT_CONTAINER(timer, struct session, retry);
    uint64_t now = bt_now_ns(), next_ns = UINT64_MAX;
    session->retrying = false;
    if (session->state == CLOSING) { /* no answer to the logout */
        closed(session);
        return;
    }
    for (struct command *command = session->delayed.head, *next; command; command = next) {
        next = command->next;
        if (command->due_ns > now) {
            next_ns = bt_min(next_ns, command->due_ns);
            continue;
        }
        list_remove(&session->delayed, command);
        list_append(&session->waiting, command);
    }
    session->node->api->defer(thread, &session->kick);
    if (next_ns == UINT64_MAX)
        return;
    session->retrying = true;
    session->retry.at_ns = next_ns;
    session->node->api->timer_add(thread, &session->retry);
}

static void nop_answered(struct iscsi_context *ctx, int status, void *data, void *private)
{
    struct session *session = private;
    (void)ctx, (void)data;
    if (!session->dying && status == SCSI_STATUS_GOOD)
        session->nops = 0;
}

static void check_silence(struct session *session, uint64_t now)
{
    if (now - session->heard_ns < SILENCE_NS) {
        session->nops = 0;
        return;
    }
    if (session->nops >= MAX_NOPS) {
        unsigned seconds = (unsigned)((now - session->heard_ns) / SECOND);
        session_break(session, "no sign of life for %u s", seconds);
        return;
    }
    if (now - session->heard_ns < (session->nops + 1) * SILENCE_NS)
        return;
    session->nops++;
    if (iscsi_nop_out_async(session->ctx, nop_answered, NULL, 0, session))
        session_break(session, "%s", iscsi_get_error(session->ctx));
}

static void check_limits(struct session *session, uint64_t now)
{
    uint64_t limit = session->node->timeout_ns;
    bool answering = session->answering;
    session->answering = false;
    if (!limit)
        return;
    for (struct command *command = session->sent.head; command; command = command->next) {
        if (answering && !output_has(guard_output(session->guard), command))
            command->sent_ns = now; /* libiscsi keeps it back: the target takes few at once (MaxCmdSN) */
        if (now - command->sent_ns < limit)
            continue;
        command->timeouts++;
        atomic_fetch_add_explicit(&session->node->timeouts, 1, memory_order_relaxed);
        session_break(session, "no answer to command %#x for %llu s", command->cdb[0],
                      (unsigned long long)(limit / SECOND));
    }
}

static void start_ticking(struct session *session)
{
    uint64_t busy = session->sent.count || session->nops || session->node->timeout_ns;
    session->ticking = true;
    session->tick.at_ns = bt_now_ns() + (busy ? TICK_NS : IDLE_TICK_NS);
    session->node->api->timer_add(session->thread, &session->tick);
}

static void ticked(struct bt_timer *timer, struct bt_thread *thread)
{
    struct session *session = BT_CONTAINER(timer, struct session, tick);
    uint64_t now = bt_now_ns();
    (void)thread;
    session->ticking = false;
    check_limits(session, now);
    if (session->state == UP)
        check_silence(session, now);
    service(session, false);
    if (session->ctx)
        start_ticking(session);
}

/* ---- beginning and end ---- */

void session_attach(struct session *session, struct bt_iscsi_link *link)
{
    const struct bt_device_api *api = session->node->api;
    if (session->ctx || session->state == CLOSED || session->state == CLOSING) {
        bt_iscsi_link_free(link);
        return;
    }
    session->ctx = link->ctx;
    session->guard = link->guard;
    link->ctx = NULL;
    link->guard = NULL;
    guard_serve(session->guard, session);
    session->events = (uint32_t)guard_events(session->guard);
    session->watch = (struct bt_watch){.fd = guard_fd(session->guard), .ready = ready};
    session->state = UP;
    session->heard_ns = bt_now_ns();
    if (api->watch_add(session->thread, &session->watch, session->events) < 0)
        session_break(session, "its descriptor cannot be watched");
    atomic_fetch_add_explicit(&session->node->connections, 1, memory_order_relaxed);
    node_set_blocks(session, link->lun.blocks, link->lun.block_size);
    bt_iscsi_link_free(link);
    start_ticking(session);
    api->defer(session->thread, &session->kick);
}

static void logged_out(struct iscsi_context *ctx, int status, void *data, void *private)
{
    struct session *session = private;
    (void)ctx, (void)status, (void)data;
    if (!session->dying)
        session_break(session, "logged out");
}

void session_close(struct session *session)
{
    const struct bt_device_api *api = session->node->api;
    if (session->state != UP || iscsi_logout_async(session->ctx, logged_out, session)) {
        closed(session);
        return;
    }
    if (session->retrying) /* what waited for it waits for the end now */
        api->timer_cancel(session->thread, &session->retry);
    session->state = CLOSING;
    session->retrying = true;
    session->retry.at_ns = bt_now_ns() + LOGOUT_NS;
    api->timer_add(session->thread, &session->retry);
    api->defer(session->thread, &session->kick);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Life of an NBD session: from the socket that Python hands over to the event that says it has ended. */
#define _GNU_SOURCE
#include <sys/socket.h>
#include <unistd.h>

#include "nbd.h"

/* ---- polling ----
 * A wake-up costs more than a request: while requests come, the spinning thread looks at the socket itself. */

static bool can_receive(const struct bt_nbd_session *session)
{
    return session->state != NBD_RX_CLOSED && !session->rx_stalled && !session->pausing;
}

static void unpoll(struct bt_nbd_session *session)
{
    if (session->polled)
        bt_poller_remove(session->thread, &session->poller);
    session->polled = false;
}

static bool poll_socket(struct bt_poller *poller, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(poller, struct bt_nbd_session, poller);
    uint64_t before = session->counters.received;
    if (!can_receive(session))
        return false;
    nbd_receive(session);
    if (session->counters.received == before && !session->closing) {
        if (++session->empty_polls > NBD_EMPTY_POLLS)
            unpoll(session);
        return false;
    }
    session->empty_polls = 0;
    bt_defer(thread, &session->deferred);
    return true;
}

static bool poll_arm(struct bt_poller *poller, struct bt_thread *thread)
{
    (void)poller, (void)thread;
    return false; /* the watch wakes the thread */
}

static void poll_disarm(struct bt_poller *poller, struct bt_thread *thread) { (void)poller, (void)thread; }

static void start_polling(struct bt_nbd_session *session)
{
    int polled = 0;
    if (session->polled || session->closing)
        return;
    for (struct bt_poller *p = session->thread->pollers; p; p = p->next)
        polled += p->poll == poll_socket;
    if (polled >= NBD_POLLED)
        return;
    session->polled = true;
    session->empty_polls = 0;
    bt_poller_add(session->thread, &session->poller);
}

/* ---- end ---- */

static void drop_partial_payload(struct bt_nbd_session *session)
{
    struct nbd_slot *piece = session->piece;
    session->piece = NULL;
    session->call = NULL;
    if (!piece)
        return;
    nbd_pool_put(&session->pool, piece->buffer, piece->buffer_length);
    piece->buffer = NULL;
    nbd_slot_put(session, piece);
}

void nbd_close(struct bt_nbd_session *session, int64_t result)
{
    if (session->closing)
        return;
    session->closing = true;
    session->end_result = result;
    session->state = NBD_RX_CLOSED;
    drop_partial_payload(session);
    bt_defer(session->thread, &session->deferred);
}

static void unwatch(struct bt_nbd_session *session)
{
    if (session->watched)
        bt_watch_remove(session->thread, &session->watch);
    session->watched = false;
}

void nbd_break(struct bt_nbd_session *session, int64_t result)
{
    nbd_close(session, result);
    if (session->broken)
        return;
    session->broken = true;
    nbd_discard_replies(session);
    unwatch(session); /* a hang-up would be told for ever */
    shutdown(session->watch.fd, SHUT_RDWR);
    bt_defer(session->thread, &session->deferred);
}

static void server_unref(struct bt_nbd_server *server)
{
    if (atomic_fetch_sub(&server->refs, 1) == 1)
        free(server);
}

/* The thread does not look at the session any more. */
static void detach(struct bt_nbd_session *session)
{
    unwatch(session);
    unpoll(session);
    if (session->idle_armed)
        bt_timer_cancel(session->thread, &session->idle_timer);
    if (session->linger_armed)
        bt_timer_cancel(session->thread, &session->linger_timer);
    session->idle_armed = session->linger_armed = false;
}

static void end(struct bt_nbd_session *session)
{
    nbd_discard_replies(session); /* held ones, of an ordered read that did not finish */
    detach(session);
    if (session->pausing && !session->paused)
        bt_event_done(session->thread->dp, session->pause_cookie, -ESHUTDOWN);
    nbd_pool_trim(&session->pool);
    session->ended = true;
    bt_unhurry(session->thread->dp, &session->hurried);
    struct bt_event event = {.type = BT_EVENT_SESSION, .tag = session->tag, .result = session->end_result};
    int fd = session->watch.fd;
    bt_event_send(session->thread->dp, &event); /* from here on Python may free the session */
    close(fd); /* last: who sees the end, and then asks for the export's removal, is no client of it any more */
}

/* ---- timers ---- */

static void linger_passed(struct bt_timer *timer, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(timer, struct bt_nbd_session, linger_timer);
    session->linger_armed = false;
    if (session->tx_full && session->counters.sent == session->linger_mark) {
        session->end_result = BT_NBD_END_STUCK;
        nbd_break(session, BT_NBD_END_STUCK);
    }
    bt_defer(thread, &session->deferred);
}

static void arm_linger(struct bt_nbd_session *session)
{
    if (session->linger_armed)
        return;
    session->linger_armed = true;
    session->linger_mark = session->counters.sent;
    session->linger_timer.at_ns = bt_now_ns() + NBD_LINGER_NS;
    bt_timer_add(session->thread, &session->linger_timer);
}

static void arm_idle(struct bt_nbd_session *session)
{
    if (session->idle_armed || !session->pool.bytes)
        return;
    session->idle_armed = true;
    session->idle_mark = session->counters.requests;
    session->idle_timer.at_ns = bt_now_ns() + NBD_IDLE_NS;
    bt_timer_add(session->thread, &session->idle_timer);
}

static void idle_passed(struct bt_timer *timer, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(timer, struct bt_nbd_session, idle_timer);
    (void)thread;
    session->idle_armed = false;
    if (session->counters.requests == session->idle_mark)
        nbd_pool_trim(&session->pool);
    arm_idle(session);
}

/* ---- the socket ---- */

/* The socket is watched for what the session can use; a hang-up is always told. */
static void update_watch(struct bt_nbd_session *session)
{
    uint32_t wanted = 0;
    if (can_receive(session))
        wanted |= EPOLLIN;
    if (session->tx_full)
        wanted |= EPOLLOUT;
    if (BT_LIKELY(wanted == session->watching) || !session->watched)
        return;
    session->watching = wanted;
    bt_watch_modify(session->thread, &session->watch, wanted);
}

/* ---- pauses ----
 * A session that is paused belongs to no thread: it goes on where it is resumed. What was received and not begun, and
 * replies that the client has not taken, wait in its memory meanwhile. */

static void pause_now(struct bt_nbd_session *session)
{
    detach(session);
    session->paused = true;
    bt_event_done(session->thread->dp, session->pause_cookie, 0); /* the session is not ours after it */
}

static int attach(struct bt_nbd_session *session)
{
    int ret = bt_watch_add(session->thread, &session->watch, EPOLLIN);
    session->watched = ret == 0;
    session->watching = EPOLLIN;
    return ret;
}

/* ---- the way out ---- */

/* Between two requests, with nothing to answer and nothing that waits in the socket. */
static bool is_at_rest(const struct bt_nbd_session *session)
{
    char byte;
    return session->state == NBD_RX_HEADER && session->rx_head == session->rx_tail && !session->active &&
           !session->tx.head && recv(session->watch.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN;
}

/* The end of each turn in which something happened. */
static void turn_over(struct bt_deferred *deferred, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(deferred, struct bt_nbd_session, deferred);
    (void)thread;
    deferred->queued = true; /* what happens from here on is seen below, and after the end nothing may come */
    nbd_send(session);
    while (session->rx_stalled && session->relieved && session->state != NBD_RX_CLOSED) {
        nbd_parse(session);
        nbd_send(session);
    }
    if (session->shut && !session->closing && is_at_rest(session))
        nbd_close(session, BT_NBD_END_STOPPED);
    if (session->closing && !session->active && (session->broken || !session->tx.head)) {
        end(session);
        return;
    }
    deferred->queued = false;
    if (session->paused)
        return;
    if (session->pausing && !session->active) {
        pause_now(session);
        return;
    }
    if (session->closing && session->tx_full)
        arm_linger(session);
    arm_idle(session);
    update_watch(session);
}

static void socket_ready(struct bt_watch *watch, struct bt_thread *thread, uint32_t events)
{
    struct bt_nbd_session *session = BT_CONTAINER(watch, struct bt_nbd_session, watch);
    if (events & EPOLLOUT)
        session->tx_full = false;
    if (can_receive(session)) {
        nbd_receive(session);
        start_polling(session);
    } else if (events & (EPOLLHUP | EPOLLERR)) {
        nbd_break(session, BT_NBD_END_EOF);
    }
    bt_defer(thread, &session->deferred);
}

/* ---- the control thread's side ---- */

static void session_start(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(message, struct bt_nbd_session, start);
    int ret = attach(session);
    (void)thread;
    if (ret < 0)
        nbd_break(session, ret);
}

static void session_pause(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(message, struct bt_nbd_session, pause);
    if (session->ended) {
        bt_event_done(thread->dp, session->pause_cookie, -ESHUTDOWN);
        return;
    }
    session->pausing = true;
    bt_hurry(thread->dp, &session->hurried);
    bt_defer(thread, &session->deferred);
}

static void go_on(struct bt_nbd_session *session)
{
    session->pausing = session->paused = false;
    bt_unhurry(session->thread->dp, &session->hurried);
    nbd_parse(session);
    bt_defer(session->thread, &session->deferred);
}

static void session_unpause(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(message, struct bt_nbd_session, unpause);
    uint64_t cookie = session->unpause_cookie;
    if (session->pausing && !session->paused && !session->ended) {
        bt_event_done(thread->dp, session->pause_cookie, -ECANCELED);
        go_on(session);
    }
    bt_event_done(thread->dp, cookie, 0);
}

static void session_resume(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(message, struct bt_nbd_session, resume);
    (void)thread;
    if (session->ended)
        return;
    int ret = session->broken ? 0 : attach(session);
    go_on(session);
    if (ret < 0)
        nbd_break(session, ret);
}

static void session_shut(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(message, struct bt_nbd_session, shut_message);
    if (session->ended)
        return;
    session->shut = true;
    bt_hurry(thread->dp, &session->hurried);
    bt_defer(thread, &session->deferred);
}

static void session_stop(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(message, struct bt_nbd_session, stop);
    if (session->ended)
        return;
    bt_hurry(thread->dp, &session->hurried);
    nbd_close(session, BT_NBD_END_STOPPED);
}

static void session_cut(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(message, struct bt_nbd_session, cut);
    if (session->ended)
        return;
    bt_hurry(thread->dp, &session->hurried);
    nbd_break(session, BT_NBD_END_STOPPED);
}

static void session_release(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_nbd_session *session = BT_CONTAINER(message, struct bt_nbd_session, release);
    (void)thread;
    server_unref(session->server);
    nbd_memory_free(session);
    free(session);
}

static void session_init(struct bt_nbd_session *session, int fd, uint64_t tag, const struct bt_nbd_options *options)
{
    session->tag = tag;
    session->size = options->size;
    session->mode = options->mode;
    session->allocation_id = options->allocation_id;
    session->transmission_flags = (uint16_t)options->transmission_flags;
    session->watch = (struct bt_watch){.fd = fd, .ready = socket_ready};
    session->poller = (struct bt_poller){.poll = poll_socket, .arm = poll_arm, .disarm = poll_disarm};
    session->deferred.fn = turn_over;
    session->start.fn = session_start;
    session->pause.fn = session_pause;
    session->unpause.fn = session_unpause;
    session->resume.fn = session_resume;
    session->shut_message.fn = session_shut;
    session->stop.fn = session_stop;
    session->cut.fn = session_cut;
    session->release.fn = session_release;
    session->idle_timer.fn = idle_passed;
    session->linger_timer.fn = linger_passed;
    session->rx_want = NBD_RX_BYTES;
    session->tx.tail = &session->tx.head;
    session->held.tail = &session->held.head;
}

bt_nbd_session *bt_nbd_session_new(bt_nbd_server *server, bt_object *gate, int fd, uint64_t tag,
                                   const struct bt_nbd_options *options)
{
    struct bt_thread *thread = bt_thread_get(server->dp, options->thread);
    struct bt_nbd_session *session = thread ? calloc(1, sizeof *session) : NULL;
    if (!session || !nbd_memory_init(session)) {
        free(session);
        errno = thread ? ENOMEM : EINVAL;
        return NULL;
    }
    session_init(session, fd, tag, options);
    session->thread = thread;
    session->server = session->pool.server = server;
    session->gate = gate;
    atomic_fetch_add(&server->refs, 1);
    bt_object_ref(gate);
    bt_thread_post(thread, &session->start);
    return session;
}

void bt_nbd_session_pause(bt_nbd_session *session, uint64_t cookie)
{
    session->pause_cookie = cookie;
    bt_thread_post(session->thread, &session->pause);
}

void bt_nbd_session_unpause(bt_nbd_session *session, uint64_t cookie)
{
    session->unpause_cookie = cookie;
    bt_thread_post(session->thread, &session->unpause);
}

/* What was posted before has to be read by the thread that it was posted to. */
static bool may_move(const bt_nbd_session *session)
{
    return !session->shut_posted && !session->stop_posted && !session->cut_posted;
}

void bt_nbd_session_resume(bt_nbd_session *session, int index)
{
    struct bt_thread *thread = bt_thread_get(session->server->dp, index);
    if (thread && may_move(session))
        session->thread = thread;
    bt_thread_post(session->thread, &session->resume);
}

void bt_nbd_session_set_size(bt_nbd_session *session, uint64_t size)
{
    atomic_store_explicit(&session->size, size, memory_order_relaxed);
}

void bt_nbd_session_shut(bt_nbd_session *session)
{
    if (session->shut_posted)
        return;
    session->shut_posted = true;
    bt_thread_post(session->thread, &session->shut_message);
}

void bt_nbd_session_stop(bt_nbd_session *session)
{
    if (session->stop_posted)
        return;
    session->stop_posted = true;
    bt_thread_post(session->thread, &session->stop);
}

void bt_nbd_session_cut(bt_nbd_session *session)
{
    if (session->cut_posted)
        return;
    session->cut_posted = true;
    bt_thread_post(session->thread, &session->cut);
}

void bt_nbd_session_free(bt_nbd_session *session)
{
    bt_object_unref(session->gate);
    bt_thread_post(session->thread, &session->release);
}

void bt_nbd_session_counters(bt_nbd_session *session, struct bt_nbd_counters *out)
{
    const uint64_t *from = (const uint64_t *)&session->counters;
    uint64_t *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

bt_nbd_server *bt_nbd_server_new(bt_datapath *dp, uint64_t memory)
{
    struct bt_nbd_server *server = calloc(1, sizeof *server);
    if (!server)
        return NULL;
    server->dp = dp;
    server->memory = memory;
    server->refs = 1;
    return server;
}

void bt_nbd_server_free(bt_nbd_server *server) { server_unref(server); }

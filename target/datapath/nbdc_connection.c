/* SPDX-License-Identifier: Apache-2.0 */
/* Life of a connection: from the socket that Python hands over to its loss, and what becomes of its ios then. */
#define _GNU_SOURCE
#include <sys/socket.h>
#include <unistd.h>

#include "nbdc_internal.h"

#define POLLED 4 /* connections of one thread that are polled at once */

static enum nbdc_state state_of(const struct nbdc_conn *conn)
{
    return (enum nbdc_state)atomic_load_explicit(&conn->state, memory_order_relaxed);
}

static void set_state(struct nbdc_conn *conn, enum nbdc_state state)
{
    atomic_store_explicit(&conn->state, state, memory_order_relaxed);
}

static struct bt_thread *owner(const struct nbdc_conn *conn)
{
    return atomic_load_explicit(&conn->thread, memory_order_relaxed);
}

/* ---- polling ----
 * A wake-up costs more than a request: while replies are due, the spinning thread looks at the socket itself. */

static void unpoll(struct nbdc_conn *conn)
{
    if (conn->polled)
        bt_poller_remove(owner(conn), &conn->poller);
    conn->polled = false;
}

static bool poll_socket(struct bt_poller *poller, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(poller, struct nbdc_conn, poller);
    uint64_t before = conn->counters.received;
    if (!conn->in_flight) {
        unpoll(conn);
        return false;
    }
    nbdc_receive(conn);
    if (state_of(conn) != NBDC_UP)
        return true;
    if (conn->counters.received == before) {
        if (++conn->empty_polls > NBDC_EMPTY_POLLS)
            unpoll(conn);
        return false;
    }
    conn->empty_polls = 0;
    bt_defer(thread, &conn->deferred);
    return true;
}

static bool poll_arm(struct bt_poller *poller, struct bt_thread *thread)
{
    (void)poller, (void)thread;
    return false; /* the watch wakes the thread */
}

static void poll_disarm(struct bt_poller *poller, struct bt_thread *thread) { (void)poller, (void)thread; }

static void start_polling(struct nbdc_conn *conn)
{
    int polled = 0;
    if (conn->polled || !conn->in_flight)
        return;
    for (struct bt_poller *p = owner(conn)->pollers; p; p = p->next)
        polled += p->poll == poll_socket;
    if (polled >= POLLED)
        return;
    conn->polled = true;
    conn->empty_polls = 0;
    bt_poller_add(owner(conn), &conn->poller);
}

/* ---- queueing ---- */

static void append(struct nbdc_conn *conn, struct bt_io *io)
{
    nbdc_io(io)->next = NULL;
    nbdc_io(io)->queued = true;
    *conn->waiting.tail = io;
    conn->waiting.tail = &nbdc_io(io)->next;
    conn->queued++;
}

static struct bt_io *take_waiting(struct nbdc_conn *conn)
{
    struct bt_io *list = conn->waiting.head;
    conn->waiting = (struct nbdc_queue){NULL, &conn->waiting.head};
    conn->queued = 0;
    for (struct bt_io *io = list; io; io = nbdc_io(io)->next)
        nbdc_io(io)->queued = false;
    return list;
}

void nbdc_enqueue(struct nbdc_conn *conn, struct bt_io *io)
{
    enum nbdc_state state = state_of(conn);
    struct nbdc_conn *other;
    if (BT_LIKELY(state == NBDC_UP)) {
        append(conn, io);
        bt_defer(owner(conn), &conn->deferred);
    } else if (state != NBDC_STOPPED && (other = nbdc_another(conn, NBDC_UP))) {
        nbdc_pass(io, other);
    } else if (state == NBDC_DOWN) {
        append(conn, io);
    } else if (state == NBDC_EXPIRED && (other = nbdc_another(conn, NBDC_DOWN))) {
        nbdc_pass(io, other);
    } else {
        nbdc_complete(io, -EIO);
    }
}

/* ---- loss ---- */

static void disarm_delay(struct nbdc_conn *conn)
{
    if (conn->delay_armed)
        bt_timer_cancel(owner(conn), &conn->delay_timer);
    conn->delay_armed = false;
}

/* The time for waiting is over: what waits fails, unless another connection has come up. */
static void delay_passed(struct bt_timer *timer, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(timer, struct nbdc_conn, delay_timer), *other;
    struct bt_io *next;
    (void)thread;
    conn->delay_armed = false;
    set_state(conn, NBDC_EXPIRED);
    for (struct bt_io *io = take_waiting(conn); io; io = next) {
        next = nbdc_io(io)->next;
        if ((other = nbdc_another(conn, NBDC_UP)))
            nbdc_pass(io, other);
        else
            nbdc_complete(io, -EIO);
    }
}

static void arm_delay(struct nbdc_conn *conn, uint64_t until)
{
    conn->delay_timer.at_ns = until;
    bt_timer_add(owner(conn), &conn->delay_timer);
    conn->delay_armed = true;
}

static void close_socket(struct nbdc_conn *conn)
{
    bt_watch_remove(owner(conn), &conn->watch);
    unpoll(conn);
    close(conn->watch.fd);
    conn->watch.fd = -1;
    conn->tx_head = NULL;
    conn->tx_tail = &conn->tx_head;
    conn->tx_sent = 0;
    conn->tx_full = false;
    conn->cautious = false;
    conn->rx_slot = NULL;
    conn->rx_head = conn->rx_tail = 0;
}

/* All ios of the connection, those in flight first, as if none of their requests had been made. Those that were in
 * flight have the time of the first such loss in started_ns. */
static struct bt_io *take_all(struct nbdc_conn *conn, uint64_t now)
{
    struct bt_io *list = NULL, **tail = &list;
    for (int i = 0; i < NBDC_SLOTS; i++) {
        struct bt_io *io = conn->slots[i].io;
        if (!io)
            continue;
        nbdc_slot_free(conn, &conn->slots[i]);
        io->started_ns = io->started_ns ? io->started_ns : now;
        if (--nbdc_io(io)->pending || nbdc_io(io)->queued)
            continue;
        *tail = io;
        tail = &nbdc_io(io)->next;
    }
    *tail = take_waiting(conn);
    return list;
}

/* Whether an io that was in flight is made again. A request that kills each server it meets must not go round for ever;
 * and who breaks the protocol is not asked the same again. */
static bool may_retry(struct nbdc_conn *conn, const struct bt_io *io, uint64_t now, int loss)
{
    uint64_t delay = nbdc_reconnect_ns(conn->client);
    if (loss >= BT_NBDC_PROTOCOL && !(loss & 0x8000))
        return false;
    return delay ? now - io->started_ns < delay : io->started_ns == now && nbdc_another(conn, NBDC_UP);
}

static void restart(struct nbdc_conn *conn, struct bt_io *io, uint64_t now, int loss)
{
    struct nbdc_io *nio = nbdc_io(io);
    int result = nio->result;
    nio->pos = 0;
    nio->result = 0;
    nio->stage = NBDC_PLAIN;
    if (result < 0) {
        nbdc_complete(io, result);
    } else if (!io->started_ns) {
        nbdc_enqueue(conn, io);
    } else if (may_retry(conn, io, now, loss)) {
        bt_count(&conn->counters.resent, 1);
        nbdc_enqueue(conn, io);
    } else {
        nbdc_complete(io, -EIO);
    }
}

void nbdc_lose(struct nbdc_conn *conn, int loss)
{
    struct nbdc *client = conn->client;
    uint64_t now = bt_now_ns(), delay = nbdc_reconnect_ns(client);
    struct bt_io *next;
    if (state_of(conn) != NBDC_UP)
        return;
    close_socket(conn);
    conn->move_to = NULL;
    set_state(conn, delay ? NBDC_DOWN : NBDC_EXPIRED);
    if (delay)
        arm_delay(conn, now + delay);
    bt_count(&conn->counters.losses, 1);
    /* A connection that is cut here for another is no loss. */
    for (struct bt_io *io = take_all(conn, loss == BT_NBDC_OUTDATED ? 0 : now); io; io = next) {
        next = nbdc_io(io)->next;
        restart(conn, io, now, loss);
    }
    atomic_store(&conn->attached, false);
    struct bt_event event = {
        .type = BT_EVENT_SESSION,
        .tag = client->session_tag,
        .result = (int64_t)conn->index << 16 | loss,
    };
    bt_event_send(client->device.base.dp, &event);
}

/* ---- moving to the thread that uses it ---- */

static void move(struct nbdc_conn *conn, struct bt_thread *from, struct bt_thread *to)
{
    bt_watch_remove(from, &conn->watch);
    unpoll(conn);
    conn->present = false;
    conn->move_to = NULL;
    atomic_store_explicit(&conn->thread, to, memory_order_release);
    bt_thread_post(to, &conn->arrive);
}

static void arrived(struct bt_message *message, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(message, struct nbdc_conn, arrive);
    conn->present = true;
    conn->foreign_run = 0;
    int ret = bt_watch_add(thread, &conn->watch, conn->watching);
    if (ret < 0)
        nbdc_lose(conn, 0x8000 | -ret);
    bt_defer(thread, &conn->deferred);
}

/* ---- the end of each turn in which something happened ---- */

static void turn_over(struct bt_deferred *deferred, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(deferred, struct nbdc_conn, deferred);
    if (state_of(conn) != NBDC_UP)
        return;
    nbdc_send(conn);
    if (state_of(conn) != NBDC_UP)
        return;
    uint32_t wanted = conn->tx_full ? EPOLLIN | EPOLLOUT : EPOLLIN;
    if (BT_UNLIKELY(wanted != conn->watching))
        bt_watch_modify(thread, &conn->watch, conn->watching = wanted);
    struct bt_thread *to = conn->foreign_run >= NBDC_MOVE_AFTER ? conn->foreign : conn->move_to;
    if (BT_UNLIKELY(to != NULL) && !deferred->queued)
        move(conn, thread, to);
    else
        start_polling(conn);
}

static void socket_ready(struct bt_watch *watch, struct bt_thread *thread, uint32_t events)
{
    struct nbdc_conn *conn = BT_CONTAINER(watch, struct nbdc_conn, watch);
    if (events & EPOLLOUT)
        conn->tx_full = false;
    nbdc_receive(conn);
    bt_defer(thread, &conn->deferred);
}

/* ---- messages to the owner ---- */

/* The owner may have changed while the message was on its way. */
static bool forwarded(struct nbdc_conn *conn, struct bt_message *message, struct bt_thread *thread)
{
    if (nbdc_is_mine(conn, thread))
        return false;
    bt_thread_post(atomic_load_explicit(&conn->thread, memory_order_acquire), message);
    return true;
}

bool nbdc_adopt(struct nbdc_conn *conn, struct bt_thread *thread)
{
    if (atomic_exchange(&conn->wanted, true))
        return false;
    conn->adopter = thread;
    bt_thread_post(atomic_load_explicit(&conn->thread, memory_order_acquire), &conn->adopt);
    return true;
}

/* Another thread wants the connection: with all that is in flight on it. */
static void adopted(struct bt_message *message, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(message, struct nbdc_conn, adopt);
    if (state_of(conn) == NBDC_STOPPED || forwarded(conn, message, thread))
        return;
    if (state_of(conn) == NBDC_UP && conn->adopter != thread) {
        conn->move_to = conn->adopter;
        bt_defer(thread, &conn->deferred);
    }
    atomic_store(&conn->wanted, false);
}

static void kick_others(struct nbdc_conn *conn)
{
    struct nbdc *client = conn->client;
    for (uint32_t i = 0; i < client->count; i++) {
        struct nbdc_conn *other = &client->conns[i];
        if (state_of(other) == NBDC_DOWN && !atomic_exchange(&other->kicked, true))
            bt_thread_post(atomic_load_explicit(&other->thread, memory_order_acquire), &other->kick);
    }
}

/* Another connection is up: what waits here goes there. */
static void kicked(struct bt_message *message, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(message, struct nbdc_conn, kick);
    struct bt_io *next;
    /* A client that is stopped may be freed soon: nothing more is posted then. */
    if (state_of(conn) == NBDC_STOPPED || forwarded(conn, message, thread))
        return;
    atomic_store(&conn->kicked, false);
    if (state_of(conn) != NBDC_DOWN)
        return;
    for (struct bt_io *io = take_waiting(conn); io; io = next) {
        next = nbdc_io(io)->next;
        nbdc_enqueue(conn, io);
    }
}

static void cut_others(struct nbdc_conn *conn)
{
    struct nbdc *client = conn->client;
    for (uint32_t i = 0; i < client->count; i++) {
        struct nbdc_conn *other = &client->conns[i];
        if (other != conn && state_of(other) == NBDC_UP && !atomic_exchange(&other->outdated, true))
            bt_thread_post(atomic_load_explicit(&other->thread, memory_order_acquire), &other->cut);
    }
}

static void cut(struct bt_message *message, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(message, struct nbdc_conn, cut);
    if (state_of(conn) == NBDC_STOPPED || forwarded(conn, message, thread))
        return;
    atomic_store(&conn->outdated, false);
    nbdc_lose(conn, BT_NBDC_OUTDATED);
}

static void attached(struct bt_message *message, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(message, struct nbdc_conn, attach);
    if (forwarded(conn, message, thread))
        return;
    if (state_of(conn) == NBDC_STOPPED) {
        close(conn->new_fd);
        return;
    }
    disarm_delay(conn);
    conn->link = conn->new_link;
    conn->watch.fd = conn->new_fd;
    conn->rx_want = NBDC_RX_BYTES;
    conn->watching = EPOLLIN;
    set_state(conn, NBDC_UP);
    int ret = bt_watch_add(thread, &conn->watch, EPOLLIN);
    if (ret < 0) {
        nbdc_lose(conn, 0x8000 | -ret);
        return;
    }
    kick_others(conn);
    if (conn->link.outdates)
        cut_others(conn);
    bt_defer(thread, &conn->deferred);
}

static void given_up(struct bt_message *message, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(message, struct nbdc_conn, give_up);
    if (state_of(conn) == NBDC_STOPPED || forwarded(conn, message, thread) || state_of(conn) != NBDC_DOWN)
        return;
    disarm_delay(conn);
    delay_passed(&conn->delay_timer, thread);
}

/* "Soft disconnect": only where a request may begin. */
static void say_goodbye(struct nbdc_conn *conn)
{
    uint8_t wire[NBD_EXTENDED_BYTES] = {0};
    bool extended = conn->link.mode == BT_NBDC_EXTENDED;
    if (conn->tx_head)
        return;
    nbd_put32(wire, extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC);
    nbd_put16(wire + 6, NBD_CMD_DISC);
    ssize_t n = send(conn->watch.fd, wire, extended ? NBD_EXTENDED_BYTES : NBD_REQUEST_BYTES,
                     MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)n; /* a server that does not take it sees the socket closed */
}

static void stopped(struct bt_message *message, struct bt_thread *thread)
{
    struct nbdc_conn *conn = BT_CONTAINER(message, struct nbdc_conn, stop);
    struct nbdc *client = conn->client;
    struct bt_io *next;
    if (forwarded(conn, message, thread))
        return;
    if (state_of(conn) == NBDC_UP) {
        say_goodbye(conn);
        close_socket(conn);
    }
    disarm_delay(conn);
    set_state(conn, NBDC_STOPPED);
    for (struct bt_io *io = take_all(conn, 1); io; io = next) {
        next = nbdc_io(io)->next;
        nbdc_complete(io, -EIO);
    }
    if (atomic_fetch_sub(&client->stopping, 1) == 1)
        bt_event_done(client->device.base.dp, client->stop_cookie, 0);
}

/* ---- making one ---- */

bool nbdc_conn_init(struct nbdc_conn *conn, struct nbdc *client, uint32_t index, struct bt_thread *thread)
{
    conn->client = client;
    conn->index = index;
    atomic_init(&conn->thread, thread);
    conn->present = true;
    conn->state = NBDC_EXPIRED;
    conn->watch = (struct bt_watch){.fd = -1, .ready = socket_ready};
    conn->poller = (struct bt_poller){.poll = poll_socket, .arm = poll_arm, .disarm = poll_disarm};
    conn->deferred.fn = turn_over;
    conn->delay_timer.fn = delay_passed;
    conn->attach.fn = attached;
    conn->stop.fn = stopped;
    conn->kick.fn = kicked;
    conn->cut.fn = cut;
    conn->give_up.fn = given_up;
    conn->arrive.fn = arrived;
    conn->adopt.fn = adopted;
    conn->waiting.tail = &conn->waiting.head;
    conn->tx_tail = &conn->tx_head;
    conn->slots = calloc(NBDC_SLOTS, sizeof *conn->slots);
    conn->rx = malloc(NBDC_RX_BYTES);
    if (!conn->slots || !conn->rx)
        return false;
    for (int i = NBDC_SLOTS - 1; i >= 0; i--) {
        conn->slots[i].next = conn->free_slots;
        conn->free_slots = &conn->slots[i];
    }
    return true;
}

void nbdc_conn_destroy(struct nbdc_conn *conn)
{
    free(conn->slots);
    free(conn->rx);
}

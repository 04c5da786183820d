/* SPDX-License-Identifier: Apache-2.0 */
/* The NBD client as a device: which connection an io takes, its start and its end, and what Python calls. */
#include <limits.h>

#include "nbdc_internal.h"

/* ---- ios ---- */

static void count_end(struct bt_io *io, struct bt_thread *thread, int result)
{
    if (result < 0)
        bt_count_failure(&io->device->base, thread, io->op, io->length);
    else
        bt_count(&bt_counters_of(&io->device->base, thread)->engine_done, 1);
}

static void finish_here(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_io *io = BT_CONTAINER(message, struct bt_io, message);
    int result = nbdc_io(io)->result;
    count_end(io, thread, result);
    bt_io_finish(io, result);
}

void nbdc_complete(struct bt_io *io, int result)
{
    struct nbdc_conn *conn = nbdc_io(io)->conn;
    struct bt_thread *thread = io->thread;
    if (BT_LIKELY(nbdc_is_mine(conn, thread))) {
        count_end(io, thread, result);
        bt_io_finish(io, result);
        return;
    }
    nbdc_io(io)->result = result;
    io->message.fn = finish_here;
    bt_thread_post(thread, &io->message);
}

static void take_over(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_io *io = BT_CONTAINER(message, struct bt_io, message);
    struct nbdc_conn *conn = nbdc_io(io)->conn;
    if (!nbdc_is_mine(conn, thread)) {
        bt_thread_post(atomic_load_explicit(&conn->thread, memory_order_acquire), message);
        return;
    }
    conn->foreign_run = io->thread == thread ? 0 : io->thread == conn->foreign ? conn->foreign_run + 1 : 1;
    conn->foreign = io->thread;
    nbdc_enqueue(conn, io);
}

void nbdc_pass(struct bt_io *io, struct nbdc_conn *conn)
{
    nbdc_io(io)->conn = conn;
    io->message.fn = take_over;
    bt_thread_post(atomic_load_explicit(&conn->thread, memory_order_acquire), &io->message);
}

struct nbdc_conn *nbdc_another(struct nbdc_conn *conn, enum nbdc_state state)
{
    struct nbdc *client = conn->client;
    for (uint32_t i = 1; i < client->count; i++) {
        struct nbdc_conn *other = &client->conns[(conn->index + i) % client->count];
        if (atomic_load_explicit(&other->state, memory_order_relaxed) == (int)state)
            return other;
    }
    return NULL;
}

/* ---- which connection an io takes ----
 * A thread keeps to its first connection while that has little to do: requests go out, and replies come in, many at
 * once. Beyond that it goes on to the next, and adopts those that nobody uses, or of which another thread has more. */

static bool is_up(struct nbdc_conn *conn)
{
    return atomic_load_explicit(&conn->state, memory_order_relaxed) == NBDC_UP;
}

static unsigned owned(struct nbdc *client, const struct bt_thread *thread)
{
    unsigned n = 0;
    for (uint32_t i = 0; i < client->count; i++) {
        struct nbdc_conn *conn = &client->conns[i];
        n += is_up(conn) && atomic_load_explicit(&conn->thread, memory_order_relaxed) == thread &&
             atomic_load_explicit(&conn->used, memory_order_relaxed);
    }
    return n;
}

/* Asks for the other thread's connection that is missed least. */
static void adopt_one(struct nbdc *client, struct bt_thread *thread)
{
    struct nbdc_turn *turn = &client->turns[thread->index];
    struct nbdc_conn *best = NULL;
    unsigned mine = owned(client, thread);
    uint64_t now = bt_now_ns();
    bool aged = now - turn->looked_ns >= NBDC_IDLE_NS;
    int best_rank = 0;
    turn->looked_ns = aged ? now : turn->looked_ns;
    for (uint32_t i = 0; i < client->count; i++) {
        struct nbdc_conn *conn = &client->conns[i];
        struct bt_thread *owner = atomic_load_explicit(&conn->thread, memory_order_relaxed);
        uint64_t requests = __atomic_load_n(&conn->counters.requests, __ATOMIC_RELAXED);
        bool idle = aged && requests == turn->seen[i];
        if (aged)
            turn->seen[i] = requests;
        if (owner == thread || !is_up(conn))
            continue;
        int rank = !atomic_load_explicit(&conn->used, memory_order_relaxed) ? 3
                   : idle                                                   ? 2
                   : owned(client, owner) >= mine + 2                       ? 1
                                                                            : 0;
        if (rank > best_rank) {
            best = conn;
            best_rank = rank;
        }
    }
    if (best)
        nbdc_adopt(best, thread);
}

/* For a thread that has none: one that is up, in turn; else one for which a request may wait. */
static struct nbdc_conn *pick_foreign(struct nbdc *client, struct bt_thread *thread)
{
    struct nbdc_conn *best = NULL;
    int best_rank = -1;
    uint32_t start = client->turns[thread->index].next++;
    for (uint32_t i = 0; i < client->count; i++) {
        struct nbdc_conn *conn = &client->conns[(start + i) % client->count];
        int state = atomic_load_explicit(&conn->state, memory_order_relaxed);
        int rank = state == NBDC_UP ? 2 : state == NBDC_DOWN ? 1 : 0;
        if (rank > best_rank) {
            best = conn;
            best_rank = rank;
        }
    }
    return best;
}

static struct nbdc_conn *pick(struct nbdc *client, struct bt_thread *thread)
{
    struct nbdc_conn *least = NULL;
    unsigned least_load = UINT_MAX;
    if (client->count == 1)
        return &client->conns[0];
    for (uint32_t i = 0; i < client->count && least_load >= client->depth; i++) {
        struct nbdc_conn *conn = &client->conns[i];
        if (!nbdc_is_mine(conn, thread) || !is_up(conn))
            continue;
        unsigned load = conn->in_flight + conn->queued;
        if (load < least_load) {
            least = conn;
            least_load = load;
        }
    }
    if (least_load >= client->depth && client->turns[thread->index].tries++ % NBDC_LOOK_EVERY == 0)
        adopt_one(client, thread);
    if (!least)
        return pick_foreign(client, thread);
    if (BT_UNLIKELY(!atomic_load_explicit(&least->used, memory_order_relaxed)))
        atomic_store_explicit(&least->used, true, memory_order_relaxed);
    return least;
}

static void submit(struct bt_io *io)
{
    struct nbdc *client = (struct nbdc *)io->device;
    struct nbdc_conn *conn = pick(client, io->thread);
    bt_count_request(&client->device.base, io->thread, io->op, io->offset, io->length);
    *nbdc_io(io) = (struct nbdc_io){.conn = conn};
    io->started_ns = 0;
    if (BT_LIKELY(nbdc_is_mine(conn, io->thread))) {
        conn->foreign_run = 0;
        nbdc_enqueue(conn, io);
    } else {
        nbdc_pass(io, conn);
    }
}

/* ---- the object ---- */

static void destroy(struct bt_object *object)
{
    struct nbdc *client = (struct nbdc *)object;
    for (uint32_t i = 0; i < client->count; i++)
        nbdc_conn_destroy(&client->conns[i]);
    free(client);
}

static const struct bt_device_ops ops = {.submit = submit};
static const struct bt_object_ops object_ops = {.destroy = destroy};

static uint64_t rounded(uint64_t size) { return (size + 511) & ~(uint64_t)511; }

bt_object *bt_nbdc_new(bt_datapath *dp, uint64_t tag, uint64_t session_tag, uint64_t size, uint32_t connections,
                       uint32_t depth, uint64_t reconnect_ns, bool no_flush)
{
    int threads = atomic_load(&dp->thread_count);
    bool valid = threads && size <= INT64_MAX - 511 && connections && connections <= BT_NBDC_MAX_CONNECTIONS &&
                 depth;
    struct nbdc *client = valid ? calloc(1, sizeof *client + connections * sizeof *client->conns) : NULL;
    errno = valid ? ENOMEM : EINVAL;
    if (!client)
        return NULL;
    client->session_tag = session_tag;
    client->export_size = size;
    client->reconnect_ns = reconnect_ns;
    client->no_flush = no_flush;
    client->count = connections;
    client->depth = depth;
    for (uint32_t i = 0; i < connections; i++)
        if (!nbdc_conn_init(&client->conns[i], client, i, dp->threads[i % (uint32_t)threads])) {
            destroy(&client->device.base);
            errno = ENOMEM;
            return NULL;
        }
    bt_device_init(&client->device, dp, &ops, &object_ops, tag, rounded(size));
    client->device.base.takes_fua = true;
    return &client->device.base;
}

int bt_nbdc_attach(bt_object *object, uint32_t connection, int fd, const struct bt_nbdc_link *link)
{
    struct nbdc *client = (struct nbdc *)object;
    bool power = link->block && !(link->block & (link->block - 1));
    if (connection >= client->count || link->mode > BT_NBDC_EXTENDED || !power || !link->max_payload ||
        link->max_payload > BT_NBDC_MAX_PAYLOAD || link->max_payload % link->block)
        return -EINVAL;
    struct nbdc_conn *conn = &client->conns[connection];
    if (atomic_exchange(&conn->attached, true))
        return -EBUSY;
    conn->new_fd = fd;
    conn->new_link = *link;
    bt_thread_post(atomic_load_explicit(&conn->thread, memory_order_acquire), &conn->attach);
    return 0;
}

void bt_nbdc_set_size(bt_object *object, uint64_t size)
{
    atomic_store(&((struct nbdc *)object)->export_size, size);
    bt_object_set_size(object, rounded(size));
}

void bt_nbdc_give_up(bt_object *object)
{
    struct nbdc *client = (struct nbdc *)object;
    if (atomic_exchange(&client->given_up, true))
        return;
    atomic_store(&client->reconnect_ns, 0);
    for (uint32_t i = 0; i < client->count; i++) {
        struct nbdc_conn *conn = &client->conns[i];
        bt_thread_post(atomic_load_explicit(&conn->thread, memory_order_acquire), &conn->give_up);
    }
}

void bt_nbdc_stop(bt_object *object, uint64_t cookie)
{
    struct nbdc *client = (struct nbdc *)object;
    client->stop_cookie = cookie;
    atomic_store(&client->stopping, (int)client->count);
    for (uint32_t i = 0; i < client->count; i++) {
        struct nbdc_conn *conn = &client->conns[i];
        bt_thread_post(atomic_load_explicit(&conn->thread, memory_order_acquire), &conn->stop);
    }
}

void bt_nbdc_counters(bt_object *object, uint32_t connection, struct bt_nbdc_counters *out)
{
    const uint64_t *from = (const uint64_t *)&((struct nbdc *)object)->conns[connection].counters;
    uint64_t *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

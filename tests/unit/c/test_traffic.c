/* SPDX-License-Identifier: Apache-2.0 */
/* A whole target without Python, for the thread sanitizer: NBD clients on two I/O threads and a guest's queue work on
 * one map over a file and check what they read, while other clients leave in mid-request, and the control thread
 * loads and evicts slices, grants clusters, flushes, write-protects, drains, synchronizes, stops and starts the
 * queue, and moves the connections to and fro between the threads.
 *
 * test_traffic FILE [BATCHES] [SEED]: FILE is made and overwritten. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <fcntl.h>

#include "request.h"
#include "traffic_nbd.h"
#include "traffic_vhost.h"

#define GRANULE_BITS 12
#define SLICE_BITS 4
#define SLICE_ENTRIES (1u << SLICE_BITS)
#define GRANULES (DISK_BLOCKS * BLOCK >> GRANULE_BITS)
#define SLICES (GRANULES >> SLICE_BITS)
#define CLIENTS (OWNERS - 1)
#define LEAVERS 6u
#define FAULTS 512

enum tag { TAG_CHILD = 1, TAG_MAP, TAG_GATE, TAG_CLIENT = 10, TAG_LEAVER = 20, TAG_GUEST = 50 };
enum cookie { COOKIE_DRAIN = 1, COOKIE_SYNC, COOKIE_PROTECT, COOKIE_QUEUE, COOKIE_UNSTOP, COOKIE_UNPAUSE, COOKIE_PAUSE = 100 };

static bt_datapath *dp;
static bt_object *map, *gate;
static bt_nbd_server *server;
static struct owner owners[OWNERS];
static int client_sockets[CLIENTS];
static bt_nbd_session *clients[CLIENTS], *leavers[LEAVERS];
static int leaver_sockets[LEAVERS];
static struct guest guest;
static bt_vhost *guest_backend;
static unsigned batches;
static _Atomic unsigned running = OWNERS;
static uint64_t tables[SLICES][SLICE_ENTRIES];
static uint64_t next_cluster;
static bool draining, syncing, queue_stopping, queue_gone, queue_unstopping;
static uint64_t pauses[TAG_GUEST]; /* by the session's tag: the cookie of the one that is asked for, or 0 */
static bool given_up[TAG_GUEST], unpausing[TAG_GUEST];
static uint64_t next_pause = COOKIE_PAUSE;
static uint64_t protecting = UINT64_MAX; /* the granule */
static struct bt_event later[FAULTS];    /* faults that wait for it */
static unsigned later_count, released;
static uint64_t flushes, loads, protections, left, drains, queue_stops, queue_unstops, moves, pauses_given_up;
static uint32_t control_random;

/* ---- clients' threads ---- */

static void *client_main(void *arg)
{
    struct owner *owner = arg;
    nbd_client(client_sockets[owner->id], owner, batches);
    atomic_fetch_sub(&running, 1);
    return NULL;
}

static void *guest_main(void *arg)
{
    (void)arg;
    guest_work(&guest, batches);
    atomic_fetch_sub(&running, 1);
    return NULL;
}

/* ---- what Python would do ---- */

static void flush_tables(void)
{
    uint64_t dirty[SLICES];
    int n = bt_map_dirty(map, dirty, SLICES);
    for (int i = 0; i < n; i++)
        CHECK(bt_map_clean(map, dirty[i], tables[dirty[i]]) == 0);
    flushes++;
}

static void answer_write(const struct bt_event *event, uint64_t granule)
{
    uint64_t entry;
    if (granule == protecting) {
        CHECK(later_count < FAULTS);
        later[later_count++] = *event;
        return;
    }
    if (bt_map_get(map, granule, 1, &entry) == 0 && !(entry & BT_ENTRY_ALLOC))
        bt_map_set(map, granule, entry, entry | BT_ENTRY_ALLOC, false); /* else it faults again */
    bt_fault_retry(event->request);
}

static void answer_fault(const struct bt_event *event)
{
    uint64_t granule = event->offset >> GRANULE_BITS, slice = granule >> SLICE_BITS;
    if (event->reason == BT_FAULT_LOAD) {
        int ret = bt_map_load(map, slice, tables[slice], true);
        CHECK(ret == 0 || ret == -EEXIST);
        loads++;
        bt_fault_retry(event->request);
    } else if (event->reason == BT_FAULT_GRANT) {
        CHECK(bt_map_grant(map, next_cluster << GRANULE_BITS, 3, true) == 0);
        next_cluster += 3;
        bt_fault_retry(event->request);
    } else if (event->reason == BT_FAULT_WRITE) {
        answer_write(event, granule);
    } else {
        CHECK(event->reason == BT_FAULT_FLUSH);
        flush_tables();
        bt_fault_done(event->request, 0);
    }
}

static bt_nbd_session *session_of(uint64_t tag)
{
    return tag >= TAG_LEAVER ? leavers[tag - TAG_LEAVER] : clients[tag - TAG_CLIENT];
}

static void session_ended(uint64_t tag)
{
    pauses[tag] = 0;
    if (tag >= TAG_LEAVER && tag < TAG_LEAVER + LEAVERS) {
        bt_nbd_session **leaver = &leavers[tag - TAG_LEAVER];
        bt_nbd_session_free(*leaver);
        *leaver = NULL;
        left++;
    } else {
        CHECK(tag >= TAG_CLIENT && tag < TAG_CLIENT + CLIENTS);
        bt_nbd_session_free(clients[tag - TAG_CLIENT]);
        clients[tag - TAG_CLIENT] = NULL;
    }
}

static void paused(uint64_t cookie, int64_t result)
{
    for (uint64_t tag = TAG_CLIENT; tag < TAG_LEAVER + LEAVERS; tag++) {
        if (pauses[tag] != cookie)
            continue;
        pauses[tag] = 0;
        if (result == -ECANCELED) {
            CHECK(given_up[tag]);
            pauses_given_up++;
        } else if (result == 0) {
            bt_nbd_session_resume(session_of(tag), (int)(next_random(&control_random) % 2));
            moves++;
        }
    }
}

static void done(uint64_t cookie, int64_t result)
{
    if (cookie >= COOKIE_PAUSE) {
        paused(cookie, result);
    } else if (cookie >= COOKIE_UNPAUSE) {
        unpausing[cookie - COOKIE_UNPAUSE] = false;
    } else if (cookie == COOKIE_UNSTOP) {
        queue_unstopping = false;
    } else if (cookie == COOKIE_DRAIN) {
        draining = false;
        bt_gate_resume(gate, NULL);
    } else if (cookie == COOKIE_SYNC) {
        syncing = false;
    } else if (cookie == COOKIE_QUEUE) {
        queue_stopping = false;
        queue_gone = result >= 0;
        if (queue_gone)
            bt_vhost_queue_stopped(guest_backend, 0);
        else
            queue_unstops++;
    } else {
        CHECK(cookie == COOKIE_PROTECT);
        protecting = UINT64_MAX;
        for (unsigned i = 0; i < later_count; i++)
            answer_fault(&later[i]);
        later_count = 0;
    }
}

static void handle_events(void)
{
    struct bt_event events[16];
    struct pollfd watch = {.fd = bt_datapath_eventfd(dp), .events = POLLIN};
    int n = bt_events(dp, events, 16);
    for (int i = 0; i < n; i++) {
        if (events[i].type == BT_EVENT_FAULT)
            answer_fault(&events[i]);
        else if (events[i].type == BT_EVENT_DONE)
            done(events[i].tag, events[i].result);
        else if (events[i].type == BT_EVENT_SESSION)
            session_ended(events[i].tag);
        else if (events[i].type == BT_EVENT_RELEASED)
            released++;
    }
    if (!n)
        poll(&watch, 1, 1);
}

/* ---- disturbance ---- */

static bt_nbd_session *new_session(unsigned tag, int *client)
{
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    CHECK(fcntl(pair[0], F_SETFL, O_NONBLOCK) == 0);
    struct bt_nbd_options options = {.thread = (int)(tag % 2), .size = DISK_BLOCKS * BLOCK,
                                     .transmission_flags = NBD_FLAG_SEND_FUA};
    bt_nbd_session *session = bt_nbd_session_new(server, gate, pair[0], tag, &options);
    CHECK(session);
    *client = pair[1];
    return session;
}

/* Requests to the part that nobody checks; nobody reads the replies. */
static void send_and_forget(int sock)
{
    static const uint8_t payload[8192];
    for (unsigned i = 0; i < 20; i++) {
        uint8_t wire[NBD_REQUEST_BYTES];
        uint32_t number = next_random(&control_random);
        uint16_t type = number % 3 == 0 ? NBD_CMD_READ : number % 3 == 1 ? NBD_CMD_WRITE : NBD_CMD_WRITE_ZEROES;
        uint64_t block = SCRATCH_BLOCK + number / 8 % (DISK_BLOCKS - SCRATCH_BLOCK - 16);
        nbd_encode(wire, type, 0, i, block * BLOCK, sizeof payload);
        if (send(sock, wire, sizeof wire, MSG_NOSIGNAL | MSG_DONTWAIT) != sizeof wire)
            return;
        size_t length = type == NBD_CMD_WRITE ? sizeof payload >> (number >> 28 & 1) : 0;
        if (length && send(sock, payload, length, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)length)
            return;
        if (length && length < sizeof payload)
            return; /* it leaves within a payload */
    }
}

static void come_and_go(unsigned which)
{
    if (!leavers[which]) {
        leavers[which] = new_session(TAG_LEAVER + which, &leaver_sockets[which]);
        send_and_forget(leaver_sockets[which]);
        return;
    }
    if (leaver_sockets[which] < 0)
        return;
    uint32_t how = next_random(&control_random) % 4;
    if (how == 0)
        bt_nbd_session_stop(leavers[which]);
    if (how == 1)
        bt_nbd_session_cut(leavers[which]);
    close(leaver_sockets[which]);
    leaver_sockets[which] = -1;
}

/* Without ALLOC until the synchronize is over: copy on write would miss a write in place that is under way. */
static void write_protect(uint64_t granule)
{
    uint64_t entry, bits = BT_ENTRY_WRITABLE | BT_ENTRY_ALLOC;
    if (protecting != UINT64_MAX || bt_map_get(map, granule, 1, &entry) < 0 || (entry & 11) != (BT_ENTRY_DATA | 8))
        return;
    if (bt_map_set(map, granule, entry, entry & ~bits, true) < 0)
        return;
    protecting = granule;
    protections++;
    bt_synchronize(map, COOKIE_PROTECT);
}

static void look(void)
{
    struct bt_counters counters;
    struct bt_vhost_counters queue;
    struct bt_nbd_counters connection;
    bt_object_counters(map, &counters);
    bt_vhost_get_counters(guest_backend, &queue);
    if (clients[0])
        bt_nbd_session_counters(clients[0], &connection);
}

/* Pauses a connection; it is resumed when that is done, or at once. */
static void move(uint64_t tag)
{
    if ((tag >= TAG_CLIENT + CLIENTS && tag < TAG_LEAVER) || !session_of(tag) || pauses[tag] || unpausing[tag])
        return;
    pauses[tag] = next_pause++;
    given_up[tag] = next_random(&control_random) % 4 == 0;
    bt_nbd_session_pause(session_of(tag), pauses[tag]);
    unpausing[tag] = given_up[tag];
    if (given_up[tag])
        bt_nbd_session_unpause(session_of(tag), COOKIE_UNPAUSE + tag);
}

static void stop_and_start_queue(bool give_up, int thread)
{
    if (queue_stopping || bt_vhost_queue_stop(guest_backend, 0, COOKIE_QUEUE) < 0)
        return;
    queue_stopping = true;
    queue_unstopping = give_up;
    queue_stops++;
    if (give_up)
        bt_vhost_queue_unstop(guest_backend, 0, COOKIE_UNSTOP);
    while (queue_stopping || queue_unstopping)
        handle_events();
    if (queue_gone)
        guest_start_queue(&guest, guest_backend, bt_vhost_queue_base(guest_backend, 0), thread);
}

static void disturb(unsigned turn)
{
    if (turn % 8 == 1)
        come_and_go(turn / 8 % LEAVERS);
    if (turn % 4 == 2)
        write_protect(next_random(&control_random) % GRANULES);
    if (turn % 64 == 5 && !draining) {
        draining = true;
        drains++;
        bt_gate_drain(gate, COOKIE_DRAIN);
    }
    if (turn % 64 == 21 && !syncing) {
        syncing = true;
        bt_synchronize(map, COOKIE_SYNC);
    }
    if (turn % 8 == 6)
        move(TAG_CLIENT + next_random(&control_random) % (TAG_LEAVER + LEAVERS - TAG_CLIENT));
    if (turn % 128 == 77 || turn % 128 == 45)
        stop_and_start_queue(turn % 128 == 45, (int)(turn / 128 % 2));
    if (turn % 16 == 9)
        bt_map_shrink(map, 3 * SLICE_ENTRIES * 8);
    if (turn % 32 == 30)
        look();
}

/* ---- from start to end ---- */

/* Every fourth granule of the first half is data that a snapshot shares. */
static void make_tables(int fd)
{
    static uint8_t content[1u << GRANULE_BITS];
    for (unsigned i = 0; i < GRANULES; i++) {
        uint64_t entry = BT_ENTRY_UNALLOCATED | BT_ENTRY_ALLOC;
        if (i % 4 == 0 && i < SHARED_BLOCKS * BLOCK >> GRANULE_BITS) {
            memset(content, (int)(i + 1), sizeof content);
            CHECK(pwrite(fd, content, sizeof content, (off_t)(next_cluster << GRANULE_BITS)) == sizeof content);
            entry = bt_entry_make(next_cluster++ << GRANULE_BITS, BT_ENTRY_DATA | BT_ENTRY_ALLOC);
            for (unsigned n = 0; n < 8; n++)
                owners[(8 * i + n) % OWNERS].holds[8 * i + n] = (uint8_t)(i + 1);
        }
        tables[i / SLICE_ENTRIES][i % SLICE_ENTRIES] = entry;
    }
}

static bt_object *build(const char *path, uint32_t seed)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    make_tables(fd);
    dp = bt_datapath_new();
    CHECK(dp && bt_thread_new(dp, 0) == 0 && bt_thread_new(dp, 20000) == 1);
    int engine = seed % 2 ? BT_ENGINE_THREADS : BT_ENGINE_IO_URING;
    bt_object *child = bt_file_new(dp, TAG_CHILD, fd, next_cluster << GRANULE_BITS, 0, engine, 1, 1);
    close(fd);
    map = bt_map_new(dp, TAG_MAP, GRANULE_BITS, SLICE_BITS, DISK_BLOCKS * BLOCK, child, NULL);
    gate = bt_gate_new(dp, TAG_GATE, map, true);
    server = bt_nbd_server_new(dp, 8 << 20);
    CHECK(child && map && gate && server);
    return child;
}

static void start_all(pthread_t threads[OWNERS], uint32_t seed)
{
    control_random = seed * 747796405u + 1;
    for (unsigned i = 0; i < OWNERS; i++) {
        owners[i].id = i;
        owners[i].random = seed * 2654435761u + i + 1;
    }
    guest_init(&guest, &owners[CLIENTS], seed % 2);
    guest_backend = guest_session(&guest, dp, TAG_GUEST, gate);
    guest_start_queue(&guest, guest_backend, 0, 1);
    for (unsigned i = 0; i < CLIENTS; i++) {
        clients[i] = new_session(TAG_CLIENT + i, &client_sockets[i]);
        CHECK(pthread_create(&threads[i], NULL, client_main, &owners[i]) == 0);
    }
    CHECK(pthread_create(&threads[CLIENTS], NULL, guest_main, NULL) == 0);
}

static bool any_left(void)
{
    bool any = draining || syncing || queue_stopping || protecting != UINT64_MAX;
    for (unsigned tag = 0; tag < TAG_GUEST; tag++)
        any |= pauses[tag] || unpausing[tag];
    for (unsigned i = 0; i < LEAVERS; i++) {
        if (leavers[i] && leaver_sockets[i] >= 0)
            come_and_go(i);
        any |= leavers[i] != NULL;
    }
    for (unsigned i = 0; i < CLIENTS; i++)
        any |= clients[i] != NULL;
    return any;
}

static void stop_all(bt_object *child)
{
    queue_stopping = bt_vhost_queue_stop(guest_backend, 0, COOKIE_QUEUE) == 0;
    while (any_left())
        handle_events();
    for (unsigned i = 0; i < CLIENTS; i++)
        close(client_sockets[i]);
    bt_vhost_free(guest_backend);
    guest_free(&guest);
    bt_nbd_server_free(server);
    bt_object_unref(gate);
    bt_object_unref(map);
    bt_object_unref(child);
    while (released < 3)
        handle_events();
    bt_datapath_free(dp);
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    batches = argc > 2 ? (unsigned)atoi(argv[2]) : 200;
    uint32_t seed = argc > 3 ? (uint32_t)atoi(argv[3]) : 1;
    pthread_t threads[OWNERS];
    bt_object *child = build(argv[1], seed);
    start_all(threads, seed);
    for (unsigned turn = 0; atomic_load(&running); turn++) {
        handle_events();
        disturb(turn);
    }
    for (unsigned i = 0; i < OWNERS; i++)
        pthread_join(threads[i], NULL);
    stop_all(child);
    printf("loads %lu flushes %lu protections %lu left %lu drains %lu queue stops %lu, given up %lu; moves %lu, given"
           " up %lu\n", loads, flushes, protections, left, drains, queue_stops, queue_unstops, moves, pauses_given_up);
    CHECK(loads > SLICES && flushes && protections && left && drains && queue_stops && queue_unstops && moves &&
          pauses_given_up);
    puts("ok");
    return 0;
}

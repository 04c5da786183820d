/* SPDX-License-Identifier: Apache-2.0 */
/* NBD clients and a guest on an NVMe device: what they share is used by the controller as it is, also when it comes
 * and goes under load, with resets and stops of the queue in between.
 *
 * test_nvme_traffic [BATCHES] [SEED]. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <fcntl.h>

#include "nvme_world.h"
#include "request.h"
#include "traffic_nbd.h"
#include "traffic_vhost.h"

#define CLIENTS (OWNERS - 1)

enum tag { TAG_GATE = 9, TAG_CLIENT = 10, TAG_GUEST = 50 };

static struct world world;
static bt_object *gate;
static bt_nbd_server *server;
static struct owner owners[OWNERS];
static int sockets[CLIENTS];
static bt_nbd_session *sessions[CLIENTS];
static struct guest guest;
static bt_vhost *backend;
static unsigned batches;
static _Atomic unsigned running;

static void *client_main(void *arg)
{
    struct owner *owner = arg;
    nbd_client(sockets[owner->id], owner, batches);
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

static void session_ended(uint64_t tag)
{
    CHECK(tag >= TAG_CLIENT && tag < TAG_CLIENT + CLIENTS);
    bt_nbd_session_free(sessions[tag - TAG_CLIENT]);
    sessions[tag - TAG_CLIENT] = NULL;
}

static void new_session(unsigned index)
{
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    CHECK(fcntl(pair[0], F_SETFL, O_NONBLOCK) == 0);
    struct bt_nbd_options options = {.thread = (int)(index % 2), .size = DISK_BLOCKS * BLOCK,
                                     .transmission_flags = NBD_FLAG_SEND_FUA};
    sessions[index] = bt_nbd_session_new(server, gate, pair[0], TAG_CLIENT + index, &options);
    CHECK(sessions[index]);
    sockets[index] = pair[1];
}

/* The front end takes its memory away and brings it again, as when a guest changes its memory map. */
static void move_memory(int thread)
{
    const struct bt_vhost_region region = {GUEST_BASE, GUEST_SIZE, USER_BASE, 0};
    uint64_t cookie = world_cookie(&world);
    CHECK(bt_vhost_queue_stop(backend, 0, cookie) == 0);
    world_wait(&world, cookie);
    bt_vhost_queue_stopped(backend, 0);
    CHECK(bt_vhost_clear_regions(backend) == 0);
    CHECK(bt_vhost_add_region(backend, &region, guest.memory_fd) == 0);
    guest_start_queue(&guest, backend, bt_vhost_queue_base(backend, 0), thread);
}

/* Nothing is in flight below a drained gate: no command enters the queues until it is opened again. */
static void drain(void)
{
    uint64_t cookie = world_cookie(&world);
    bt_gate_drain(gate, cookie);
    world_wait(&world, cookie);
    uint64_t before = case_counters(&world).commands;
    world_events(&world, 2);
    CHECK(case_counters(&world).commands == before);
    bt_gate_resume(gate, NULL);
}

static void until_idle(bool with_guest)
{
    for (unsigned turn = 0; atomic_load(&running); turn++) {
        world_events(&world, 1);
        if (turn % 64 == 20)
            world.needs_reset = true;
        if (turn % 32 == 5)
            drain();
        if (turn % 16 == 10 && with_guest)
            move_memory((int)(turn / 16 % 2));
        if (world.needs_reset)
            world_reset(&world, 0);
    }
}

/* The part of the commands since then that needed no copy. */
static unsigned direct_percent(const struct bt_nvme_counters *before)
{
    struct bt_nvme_counters now = case_counters(&world);
    uint64_t direct = now.aligned - before->aligned, bounced = now.unaligned - before->unaligned;
    CHECK(direct + bounced);
    return (unsigned)(100 * direct / (direct + bounced));
}

static unsigned run_clients(void)
{
    pthread_t threads[CLIENTS];
    struct bt_nvme_counters before = case_counters(&world);
    atomic_store(&running, CLIENTS);
    for (unsigned i = 0; i < CLIENTS; i++) {
        new_session(i);
        CHECK(pthread_create(&threads[i], NULL, client_main, &owners[i]) == 0);
    }
    until_idle(false);
    for (unsigned i = 0; i < CLIENTS; i++) {
        pthread_join(threads[i], NULL);
        while (sessions[i])
            world_events(&world, 10);
        close(sockets[i]);
    }
    return direct_percent(&before);
}

static unsigned run_guest(uint32_t seed)
{
    pthread_t thread;
    struct bt_nvme_counters before = case_counters(&world);
    guest_init(&guest, &owners[CLIENTS], seed % 2);
    backend = guest_session(&guest, world.dp, TAG_GUEST, gate);
    guest_start_queue(&guest, backend, 0, 1);
    atomic_store(&running, 1);
    CHECK(pthread_create(&thread, NULL, guest_main, NULL) == 0);
    until_idle(true);
    pthread_join(thread, NULL);
    uint64_t cookie = world_cookie(&world);
    CHECK(bt_vhost_queue_stop(backend, 0, cookie) == 0);
    world_wait(&world, cookie);
    bt_vhost_queue_stopped(backend, 0);
    bt_vhost_free(backend);
    guest_free(&guest);
    return direct_percent(&before);
}

static void set_up(uint32_t seed)
{
    static const struct bt_dma_limits limits = {.bytes = 64 * MIB, .mappings = 64, .piece = 2 * MIB};
    world.dp = bt_datapath_new();
    CHECK(world.dp && bt_thread_new(world.dp, 0) == 0 && bt_thread_new(world.dp, 20000) == 1);
    mock_init(&world.mock, DISK_BLOCKS * BLOCK, BLOCK, 65536, seed);
    for (unsigned i = 0; i < 2; i++)
        world.queues[world.queue_count++] = mock_queue_new(&world.mock, i + 1, 16, 64, (int)i);
    world.options.timeout_ns = 500000000;
    world.options.flags = BT_NVME_VOLATILE_CACHE | BT_NVME_DISCARD | BT_NVME_WRITE_ZEROES;
    world.session_ended = session_ended;
    world_open(&world, &limits);
    gate = bt_gate_new(world.dp, TAG_GATE, world.device, true);
    server = bt_nbd_server_new(world.dp, 8 << 20);
    CHECK(gate && server);
    for (unsigned i = 0; i < OWNERS; i++) {
        owners[i].id = i;
        owners[i].random = seed * 2654435761u + i + 1;
    }
}

int main(int argc, char **argv)
{
    batches = argc > 1 ? (unsigned)atoi(argv[1]) : 200;
    uint32_t seed = argc > 2 ? (uint32_t)atoi(argv[2]) : 1;
    set_up(seed);
    unsigned clients = run_clients(), guests = run_guest(seed);
    struct bt_dma_counters dma = dma_counters(&world);
    struct bt_nvme_counters nvme = case_counters(&world);
    printf("clients %u%% direct, guest %u%%, maps %lu unmaps %lu, commands %lu resets %lu\n", clients, guests,
           dma.maps, dma.unmaps, nvme.commands, nvme.resets);
    fflush(stdout);
    CHECK(clients > 50 && guests > 50 && nvme.resets && dma.unmaps);
    await_mapped(&world, 0); /* all that was shared is gone */
    bt_nbd_server_free(server);
    bt_object_unref(gate);
    world_close(&world);
    puts("ok");
    return 0;
}

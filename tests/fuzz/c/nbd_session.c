/* SPDX-License-Identifier: Apache-2.0 */
/* Fuzz target: the transmission phase of an NBD session, over a socket pair, on a device whose I/O completes in
 * any order. The input is what a client sends, in any number of sends: well-formed requests, parts of them, and
 * raw bytes; and when the client reads, shuts down or goes, and when the control plane drains, stops or cuts.
 * The client's model checks every byte that comes back.
 *
 * Input: the mode, then steps. */
#define _GNU_SOURCE
#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbd_model.h"
#include "ram_device.h"

#define TAG 7
#define DRAIN_COOKIE 9
#define PAUSE_COOKIE 10
#define UNPAUSE_COOKIE 11
#define TURNS_MAX 20000

static bt_datapath *dp;
static struct bt_thread *thread;
static struct ram *device;
static bt_object *gate;
static bt_nbd_server *server;
static bt_nbd_session *session;
static struct client client;
static int sock;
static size_t pushed, arrives; /* of the stream: how much the socket took, and will at most */
static bool ended, closed, cut, stopped, draining, drained, refused_by_peer;
static bool pausing, unpausing, paused;

/* ---- set-up ---- */

static void check_write(struct ram *ram, const struct bt_io *io)
{
    static uint8_t data[EXPORT_SIZE];
    (void)ram;
    bt_iov_to_buffer(io->iov, io->iovcnt, 0, data, io->length);
    CHECK(client_wrote(&client, io->offset, data, io->length));
}

/* Data, with runs of zeros of several lengths in it. */
static void make_content(void)
{
    for (uint32_t i = 0; i < EXPORT_SIZE; i++) {
        bool hole = i / 32768 % 3 == 1 || i / 4096 % 7 == 3 || i >= EXPORT_SIZE - 5000;
        client.content[i] = hole ? 0 : (uint8_t)(i / 512 + i % 509 + 1);
    }
}

static void set_up(void)
{
    dp = bt_datapath_new();
    CHECK(dp);
    thread = inline_thread_new(dp);
    make_content();
    device = ram_new(dp, 1, client.content, EXPORT_SIZE, EXPORT_SIZE);
    device->unchanging = true;
    device->written = check_write;
    device->bad_start = BAD_START;
    device->bad_end = BAD_END;
    gate = bt_gate_new(dp, 2, ram_object(device), true);
    server = bt_nbd_server_new(dp, 20 << 20);
    CHECK(gate && server);
}

static void handle_events(void)
{
    struct bt_event events[8];
    if (!atomic_load(&dp->events)) /* it is cheaper to look than to ask */
        return;
    for (int n; (n = bt_events(dp, events, 8)) > 0;)
        for (int i = 0; i < n; i++) {
            if (events[i].type == BT_EVENT_SESSION) {
                CHECK(events[i].tag == TAG && !ended && !device->held_count);
                ended = true;
            } else if (events[i].type == BT_EVENT_DONE && events[i].tag == PAUSE_COOKIE) {
                CHECK(pausing && (events[i].result || !device->held_count));
                pausing = false;
                paused = events[i].result == 0;
            } else if (events[i].type == BT_EVENT_DONE && events[i].tag == UNPAUSE_COOKIE) {
                CHECK(unpausing && !pausing);
                unpausing = false;
            } else if (events[i].type == BT_EVENT_DONE) {
                CHECK(events[i].tag == DRAIN_COOKIE && draining && !device->held_count);
                draining = false;
                drained = true;
            }
        }
}

static void turn(void)
{
    inline_thread_turn(thread);
    handle_events();
}

static void begin(struct input *in)
{
    static const uint16_t flags[] = {0, NBD_FLAG_SEND_DF | NBD_FLAG_SEND_FAST_ZERO, NBD_FLAG_READ_ONLY,
                                     NBD_FLAG_SEND_DF};
    uint8_t how = take8(in);
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    int size = how & 0x40 ? 4096 : 200000;
    setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    uint16_t told = (uint16_t)(flags[how >> 2 & 3] | NBD_FLAG_SEND_FUA);
    uint32_t mode = how & 1 ? BT_NBD_STRUCTURED | (how & 2 ? BT_NBD_ALLOCATION : 0) : 0;
    mode |= how & 0x80 ? BT_NBD_WRITETHROUGH : 0;
    if (!(mode & BT_NBD_STRUCTURED))
        told &= (uint16_t)~NBD_FLAG_SEND_DF;
    client_reset(&client, mode, told);
    device->at_once = how & 0x20;
    struct bt_nbd_options options = {
        .mode = mode, .size = EXPORT_SIZE, .allocation_id = 1, .transmission_flags = told};
    sock = pair[1];
    pushed = 0;
    arrives = SIZE_MAX;
    ended = closed = cut = stopped = draining = drained = refused_by_peer = pausing = unpausing = paused = false;
    session = bt_nbd_session_new(server, gate, pair[0], TAG, &options);
    CHECK(session);
}

/* ---- the client ---- */

/* A header that is not complete leaves only up to its cookie, which is the model's to choose. */
static size_t may_leave(void)
{
    size_t end = client.ended || client.payload_left ? client.sent : bt_min(client.sent, client.parsed + 8);
    return bt_min(end, arrives);
}

static void push(size_t most)
{
    while (!closed && pushed < may_leave() && most) {
        size_t n = bt_min(most, may_leave() - pushed);
        ssize_t sent = send(sock, client.stream + pushed, n, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN)
            return;
        if (sent < 0) {
            refused_by_peer = true; /* the session has ended */
            arrives = pushed;
            return;
        }
        pushed += (size_t)sent;
        most -= (size_t)sent;
    }
}

static bool pull(size_t most)
{
    static uint8_t data[65536];
    if (closed)
        return false;
    ssize_t n = recv(sock, data, bt_min(most, sizeof data), 0);
    if (n > 0)
        client_receive(&client, data, (size_t)n);
    return n > 0;
}

/* Fields that are mostly good. */
static void send_request(struct input *in, uint8_t how)
{
    static const uint32_t lengths[] = {0, 1, 512, 4096, 32768, 65537, 140000, EXPORT_SIZE, 0xFFFFFFFF, 70u << 20};
    uint8_t wire[NBD_REQUEST_BYTES], shape = take8(in);
    uint16_t type = how % 16 < 9 ? how % 16 : how % 16 == 9 ? NBD_CMD_WRITE : NBD_CMD_READ;
    if (type == NBD_CMD_DISC && shape & 0xF0)
        type = NBD_CMD_READ;
    uint64_t offset = shape & 0x10 ? (uint64_t)take16(in) * 16 : shape & 0x20 ? take64(in) : 0;
    uint32_t length = shape & 0x80 ? take16(in) : lengths[shape % 10];
    nbd_put32(wire, NBD_REQUEST_MAGIC);
    nbd_put16(wire + 4, how & 0x40 ? take16(in) : how & 0x20 ? 1u << take8(in) % 5 : 0);
    nbd_put16(wire + 6, type);
    nbd_put64(wire + 16, type == NBD_CMD_FLUSH && !(how & 0x80) ? 0 : offset);
    nbd_put32(wire + 24, type == NBD_CMD_FLUSH && !(how & 0x80) ? 0 : length);
    client_send(&client, wire, sizeof wire);
    if (type != NBD_CMD_WRITE || length > EXPORT_SIZE)
        return;
    static uint8_t payload[EXPORT_SIZE];
    memset(payload, take8(in), bt_min(length, sizeof payload));
    client_send(&client, payload, shape & 8 ? length / 2 : length);
}

static void send_raw(struct input *in, uint8_t length)
{
    size_t n = bt_min(length, in->left);
    client_send(&client, in->at, n);
    in->at += n;
    in->left -= n;
}

static void leave(uint8_t how)
{
    if (closed)
        return;
    if (how & 1) {
        shutdown(sock, how & 2 ? SHUT_RDWR : SHUT_WR);
        refused_by_peer |= how & 2;
        arrives = pushed;
    } else {
        close(sock);
        closed = true;
    }
}

static void drain_or_resume(void)
{
    if (drained) {
        drained = false;
        bt_gate_resume(gate, NULL);
    } else if (!draining) {
        draining = true;
        bt_gate_drain(gate, DRAIN_COOKIE);
    }
}

static void pause_or_resume(void)
{
    if (ended || unpausing)
        return;
    if (paused) {
        paused = false;
        bt_nbd_session_resume(session, -1);
    } else if (pausing) {
        unpausing = true;
        bt_nbd_session_unpause(session, UNPAUSE_COOKIE);
    } else {
        pausing = true;
        bt_nbd_session_pause(session, PAUSE_COOKIE);
    }
}

static void control(uint8_t how)
{
    if (how % 16 == 0 && !ended) {
        cut = true;
        bt_nbd_session_cut(session);
    } else if (how % 16 == 1 && !ended) {
        stopped = true;
        bt_nbd_session_stop(session);
    } else if (how % 16 == 2) {
        leave(how / 16);
    } else if (how % 4 == 3) {
        pause_or_resume();
    } else {
        drain_or_resume();
    }
}

static void step(struct input *in)
{
    uint8_t op = take8(in), how = take8(in);
    switch (op % 8) {
    case 0: case 1: case 2:
        send_request(in, how);
        break;
    case 3:
        send_raw(in, how);
        break;
    case 4:
        push(how & 0x80 ? SIZE_MAX : 1 + how);
        break;
    case 5:
        ram_finish(device, how, 0);
        break;
    case 6:
        pull(how & 0x80 ? SIZE_MAX : 1 + how);
        break;
    default:
        control(how);
    }
    if (op & 0x80)
        push(SIZE_MAX);
    if (op & 0x40)
        turn();
}

/* ---- an input from start to end ---- */

static bool move_on(void)
{
    size_t before = pushed;
    push(SIZE_MAX);
    bool moved = pushed != before;
    turn();
    while (ram_finish(device, 0, 0))
        moved = true;
    while (pull(SIZE_MAX))
        moved = true;
    if (drained) {
        drain_or_resume();
        moved = true;
    }
    if (paused) {
        pause_or_resume();
        moved = !ended;
    }
    int unread = 0; /* what the session has still to take */
    if (!closed && !refused_by_peer)
        ioctl(sock, SIOCOUTQ, &unread);
    return moved || draining || pausing || unpausing || unread;
}

/* All is sent, done and read; then the session ends by itself, or by the client's leaving. */
static void settle(void)
{
    for (unsigned quiet = 0, i = 0; quiet < 2; i++) {
        CHECK(i < TURNS_MAX);
        quiet = move_on() ? 0 : quiet + 1;
    }
    bool polite = !closed && !cut && !stopped && !refused_by_peer;
    for (unsigned i = 0; polite && i < client.count; i++)
        CHECK(client.calls[i].answered || !client.calls[i].complete || client.calls[i].end > arrives);
    leave(0);
    for (unsigned i = 0; !ended; i++) {
        CHECK(i < TURNS_MAX);
        move_on();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    if (!dp)
        set_up();
    begin(&in);
    for (int i = 0; i < 200 && in.left; i++)
        step(&in);
    settle();
    bt_nbd_session_free(session);
    turn();
    CHECK(!device->held_count && !atomic_load(&server->in_use));
    return 0;
}

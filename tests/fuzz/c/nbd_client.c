/* SPDX-License-Identifier: Apache-2.0 */
/* Fuzz target: the NBD client of the datapath, with one connection or two. The input is what happens: requests come
 * in, the server answers rightly, in part, wrongly or with any bytes, sends them in any pieces, closes and is there
 * again. Checked: every request of the client (nbd_server_model.c); what a call returns, byte by byte, as long as the
 * server has not lied; that a server that keeps to the protocol is never given up; that every call ends.
 *
 * Input: the mode (2 bytes), then steps. */
#define _GNU_SOURCE
#include <sys/socket.h>
#include <unistd.h>

#include "nbd_server_model.h"

#define LINKS 2
#define SESSION_TAG 7
#define STOP_COOKIE 1
#define CALL_COOKIE 100
#define STEPS 300
#define ATTACHES 12
#define TURNS_MAX 5000

struct call {
    uint8_t *buffer;
    uint64_t offset, length;
    struct bt_extent extents[4];
    uint8_t op;
    bool done;
};

static bt_datapath *dp;
static struct bt_thread *thread;
static bt_object *client;
static struct server_model models[LINKS];
static struct call calls[CALLS];
static struct bt_nbdc_link link_told;
static unsigned call_count, done_count, link_count, attaches;
static bool waits, stopped, lied, small_buffers;

/* ---- what comes back ---- */

static void check_read(const struct call *call)
{
    CHECK(lied || memcmp(call->buffer, model_disk + call->offset, call->length) == 0);
}

static void check_status(const struct call *call, int64_t count)
{
    uint64_t total = 0;
    CHECK(count >= 1 && count <= 4);
    for (int64_t i = 0; i < count; i++) {
        CHECK(call->extents[i].length && !(call->extents[i].flags & ~(uint32_t)(BT_EXTENT_HOLE | BT_EXTENT_ZERO)));
        total += call->extents[i].length;
    }
    CHECK(total <= call->length);
}

static void call_done(struct call *call, int64_t result)
{
    uint64_t region = call->offset / REGION;
    CHECK(!call->done);
    call->done = true;
    done_count++;
    TRACE("call %lu op %u: %ld\n", (unsigned long)region, call->op, (long)result);
    if (call->op == BT_STATUS && result >= 0)
        check_status(call, result);
    else
        CHECK(result <= 0);
    if (call->op == BT_READ && result == 0)
        check_read(call);
    if (call->op != BT_FLUSH && call->op != BT_STATUS && result >= 0 && !lied)
        CHECK(!model_failed[region]);
    if ((call->op == BT_READ || call->op == BT_WRITE) && result == 0 && !lied)
        CHECK(model_good[region] >= call->length);
}

static void link_lost(unsigned i, int loss)
{
    TRACE("connection %u lost: %d\n", i, loss);
    CHECK(i < link_count && (models[i].illegal || models[i].stopped));
    model_close(&models[i]);
}

static void handle_events(void)
{
    struct bt_event events[16];
    if (!atomic_load(&dp->events))
        return;
    for (int n; (n = bt_events(dp, events, 16)) > 0;)
        for (int i = 0; i < n; i++) {
            if (events[i].type == BT_EVENT_SESSION)
                link_lost((unsigned)(events[i].result >> 16), (int)(events[i].result & 0xffff));
            else if (events[i].type == BT_EVENT_DONE && events[i].tag == STOP_COOKIE)
                stopped = true;
            else if (events[i].type == BT_EVENT_DONE)
                call_done(&calls[events[i].tag - CALL_COOKIE], events[i].result);
        }
}

static void turn(void)
{
    inline_thread_turn(thread);
    handle_events();
}

/* ---- what happens ---- */

static void attach(unsigned i)
{
    int pair[2], size = 4096;
    if (models[i].fd >= 0 || attaches == ATTACHES)
        return;
    attaches++;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    if (small_buffers) {
        setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    }
    int result = bt_nbdc_attach(client, i, pair[0], &link_told);
    if (result) { /* the loss of the one before was not told yet */
        CHECK(result == -EBUSY);
        close(pair[0]);
        close(pair[1]);
        return;
    }
    model_begin(&models[i], pair[1], &link_told);
}

static void submit(struct input *in)
{
    static const uint8_t plain[] = {BT_READ, BT_READ, BT_WRITE, BT_STATUS, BT_FLUSH, BT_READ, BT_WRITE, BT_CACHE};
    static const uint8_t zeros[] = {BT_ZEROES, BT_DISCARD, BT_ZEROES, BT_STATUS};
    uint8_t how = take8(in), shape = take8(in);
    unsigned n = call_count;
    if (n == CALLS)
        return;
    struct call *call = &calls[call_count++];
    uint64_t block = link_told.block, most = REGION - 4096;
    call->op = n % 4 == 3 ? zeros[how % 4] : plain[how % 8];
    call->offset = (uint64_t)n * REGION + (shape & 7) * 512;
    call->length = shape & 0x80 ? 1 + take16(in) * 2u : 512u << (shape >> 3 & 7);
    call->length = bt_min((call->length + block - 1) / block * block, most);
    call->offset -= call->offset % block;
    call->done = false;
    free(call->buffer);
    call->buffer = NULL;
    if (call->op == BT_FLUSH)
        call->offset = call->length = 0;
    if (call->op == BT_READ || call->op == BT_WRITE) {
        call->buffer = malloc(call->length);
        if (call->op == BT_WRITE)
            memcpy(call->buffer, model_disk + call->offset, call->length);
        else
            memset(call->buffer, 0xEE, call->length);
    }
    uint32_t flags = how & 0x40 && call->op != BT_READ ? BT_FUA : 0;
    flags |= how & 0x20 && call->op == BT_ZEROES ? BT_UNMAP : 0;
    flags |= how & 0x10 && call->op == BT_ZEROES ? BT_FAST_ZERO : 0;
    uint64_t cookie = CALL_COOKIE + n;
    if (call->op == BT_STATUS)
        CHECK(bt_submit_status(dp, 0, client, call->offset, call->length, call->extents, 1 + how / 64, cookie) == 0);
    else
        CHECK(bt_submit(dp, 0, client, call->op, flags, call->offset, call->length, call->buffer, cookie) == 0);
}

static void step(struct input *in)
{
    uint8_t op = take8(in), how = take8(in);
    struct server_model *model = &models[op >> 4 & (link_count - 1)];
    switch (op % 8) {
    case 0: case 1:
        submit(in);
        break;
    case 2: case 3:
        model_answer(model, in);
        break;
    case 4:
        model_write(model, how & 0x80 ? SIZE_MAX : 1 + how);
        break;
    case 5:
        if (how % 4 == 0)
            model_raw(model, in, how / 4);
        else if (how % 16 == 1)
            model_close(model);
        else if (how % 16 == 2 && model->fd >= 0)
            model->illegal = shutdown(model->fd, how & 0x10 ? SHUT_WR : SHUT_RDWR) == 0;
        break;
    case 6:
        attach((unsigned)(model - models));
        break;
    default:
        model_read(model);
    }
    lied |= model->lied;
    if (op & 0x80) {
        model_read(model);
        model_write(model, SIZE_MAX);
    }
    if (op & 0x40)
        turn();
}

/* ---- an input from start to end ---- */

static void begin(struct input *in)
{
    static const uint32_t flags[] = {
        NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES |
            NBD_FLAG_SEND_CACHE,
        NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO,
        NBD_FLAG_SEND_FLUSH,
        NBD_FLAG_READ_ONLY,
    };
    uint8_t mode = take8(in), more = take8(in);
    if (!dp) {
        dp = bt_datapath_new();
        CHECK(dp);
        thread = inline_thread_new(dp);
    }
    link_told = (struct bt_nbdc_link){
        .mode = mode % 4 == 3 ? BT_NBDC_EXTENDED : mode % 4 % 3,
        .transmission_flags = flags[mode >> 2 & 3],
        .block = mode & 0x10 ? 512 : 1,
        .max_payload = mode & 0x20 ? MODEL_PAYLOAD : 4096,
        .context_id = mode & 0x40 && mode % 4 ? MODEL_CONTEXT : -1,
    };
    link_count = more & 1 ? LINKS : 1;
    waits = more & 2;
    small_buffers = more & 4;
    call_count = done_count = attaches = 0;
    stopped = lied = false;
    memset(model_good, 0, sizeof model_good);
    memset(model_failed, 0, sizeof model_failed);
    for (unsigned i = 0; i < LINKS; i++) {
        models[i].fd = -1;
        models[i].stopped = models[i].illegal = models[i].lied = false;
        models[i].count = 0;
    }
    client = bt_nbdc_new(dp, 2, SESSION_TAG, MODEL_SIZE, link_count, 1 + (more >> 4),
                         waits ? 3600000000000u : 0, more & 8);
    CHECK(client);
    for (unsigned i = 0; i < link_count; i++)
        attach(i);
}

static bool move_on(void)
{
    unsigned before = done_count;
    bool moved = false;
    for (unsigned i = 0; i < link_count; i++) {
        moved |= model_read(&models[i]);
        if (models[i].fd >= 0)
            model_answer_all(&models[i]);
        moved |= model_write(&models[i], SIZE_MAX);
        lied |= models[i].lied;
    }
    turn();
    return moved || done_count != before;
}

/* The server answers all. Where it has been proper, that ends every call. */
static void settle(void)
{
    bool proper = true;
    turn();
    for (unsigned quiet = 0, i = 0; quiet < 3; i++) {
        CHECK(i < TURNS_MAX);
        for (unsigned j = 0; j < link_count && waits; j++)
            attach(j);
        quiet = move_on() ? 0 : quiet + 1;
    }
    for (unsigned i = 0; i < link_count; i++)
        proper &= models[i].fd >= 0 && !models[i].illegal && !models[i].stopped;
    CHECK(!proper || done_count == call_count);
}

static void end(void)
{
    bt_nbdc_stop(client, STOP_COOKIE);
    for (unsigned i = 0; !stopped || done_count < call_count; i++) {
        CHECK(i < TURNS_MAX);
        turn();
    }
    bt_object_unref(client);
    turn();
    turn();
    for (unsigned i = 0; i < LINKS; i++)
        model_close(&models[i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    begin(&in);
    for (int i = 0; i < STEPS && in.left; i++)
        step(&in);
    settle();
    end();
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Fuzz target: a map on two I/O threads, with requests, faults, eviction, drains and write protection in any order,
 * against a model of the disk's bytes. Clusters that were dropped are poisoned after a synchronize and granted
 * again; those that became shared must not change after one.
 *
 * Input: the geometry, an initial entry for each granule, then a program of operations. */
#include "map_walk.h"
#include "ram_device.h"

#define LANES 8
#define FAULTS 64
#define SYNCS 16
#define TURNS_MAX 20000
#define DRAIN_COOKIE 1000

struct lane {
    struct bt_request request;
    struct iovec iov[3];
    struct bt_extent extents[8];
    uint8_t *data;
    bool active;
};

struct sync {
    bool active;
    uint64_t dropped[GRANULES_MAX];
    unsigned dropped_count;
    bool protects;
    uint64_t protected_granule, protected_cluster;
};

static bt_datapath *dp;
static struct bt_thread *threads[2];
static struct geometry g;
static struct ram *child, *backing;
static bt_object *map, *gate;
static struct lane lanes[LANES];
static struct bt_event faults[FAULTS];
static unsigned fault_count, released;
static struct sync syncs[SYNCS];
static bool protecting[GRANULES_MAX]; /* no change is permitted until the synchronize is over */
static bool failures, draining, drained, dropping;

/* ---- what Python does ---- */

static uint64_t slice_of(uint64_t granule) { return granule >> g.slice_bits; }
static uint64_t *table(uint64_t slice) { return &g.tables[slice << g.slice_bits]; }

static struct sync *start_sync(void)
{
    for (unsigned i = 0; i < SYNCS; i++)
        if (!syncs[i].active) {
            syncs[i] = (struct sync){.active = true};
            return &syncs[i];
        }
    return NULL;
}

static void sync_over(struct sync *sync)
{
    for (unsigned i = 0; i < sync->dropped_count; i++)
        cluster_free(&g, sync->dropped[i]);
    if (sync->protects) {
        cluster_freeze(&g, sync->protected_cluster);
        protecting[sync->protected_granule] = false;
    }
    sync->active = false;
}

/* Copies a dirty slice to its table; clusters that are not in it any more will be free. */
static void write_back(uint64_t slice, struct sync *sync)
{
    uint64_t now[SLICE_ENTRIES_MAX], *old = table(slice);
    CHECK(bt_map_clean(map, slice, now) == 0);
    for (unsigned i = 0; i < 1u << g.slice_bits; i++) {
        uint64_t before = entry_cluster(&g, old[i]), after = entry_cluster(&g, now[i]);
        if (before != NO_CLUSTER && before != after && g.state[before] == CLUSTER_OWN)
            sync->dropped[sync->dropped_count++] = before;
        old[i] = now[i];
    }
}

static int flush_tables(bool fail)
{
    uint64_t dirty[GRANULES_MAX], scratch[SLICE_ENTRIES_MAX];
    struct sync *sync = fail ? NULL : start_sync();
    int n = bt_map_dirty(map, dirty, GRANULES_MAX);
    for (int i = 0; i < n; i++) {
        if (sync) {
            write_back(dirty[i], sync);
            continue;
        }
        CHECK(bt_map_clean(map, dirty[i], scratch) == 0 && bt_map_redirty(map, dirty[i]) == 0);
    }
    if (sync)
        bt_synchronize(map, (uint64_t)(sync - syncs) + 1);
    return sync ? 0 : -EIO;
}

static void load(uint64_t slice)
{
    int ret = bt_map_load(map, slice, table(slice), g.writable[slice]);
    CHECK(ret == 0 || ret == -EEXIST);
    if (ret == -EEXIST)
        bt_map_set_writable(map, slice, g.writable[slice]);
}

/* A granule whose content Python has becomes an ordinary one. */
static int convert(uint64_t granule)
{
    uint64_t cluster = cluster_take(&g, 1, false), size = 1ull << g.granule_bits;
    if (cluster == NO_CLUSTER)
        return -ENOSPC;
    memcpy(g.child_bytes + cluster * size, g.fault_bytes + granule * size, size);
    g.writable[slice_of(granule)] = true;
    CHECK(bt_map_set_writable(map, slice_of(granule), true) == 0);
    CHECK(bt_map_set(map, granule, BT_ENTRY_FAULT, cluster_entry(&g, cluster, OWN_DATA), true) == 0);
    return 0;
}

static void answer_entry(const struct bt_event *fault, uint64_t granule)
{
    uint64_t entry, within = fault->offset - (granule << g.granule_bits);
    const uint8_t *content = g.fault_bytes + fault->offset;
    int ret = bt_map_get(map, granule, 1, &entry);
    CHECK(within + fault->length <= 1ull << g.granule_bits);
    if (ret < 0 || entry != BT_ENTRY_FAULT) { /* changed since */
        bt_fault_retry(fault->request);
        return;
    }
    if (fault->op == BT_READ)
        CHECK(bt_fault_put_data(fault->request, 0, content, fault->length) == 0);
    if (fault->op == BT_STATUS)
        bt_fault_put_extent(fault->request, fault->length, 0);
    if (fault->op == BT_WRITE || fault->op == BT_ZEROES) {
        ret = convert(granule);
        failures |= ret < 0;
        if (ret < 0)
            bt_fault_done(fault->request, ret);
        else
            bt_fault_retry(fault->request);
        return;
    }
    bt_fault_done(fault->request, 0);
}

static void answer_write(const struct bt_event *fault, uint64_t granule)
{
    uint64_t entry;
    g.writable[slice_of(granule)] = true;
    if (bt_map_set_writable(map, slice_of(granule), true) == 0 && bt_map_get(map, granule, 1, &entry) == 0 &&
        (entry & BT_ENTRY_KIND) != BT_ENTRY_FAULT && !(entry & BT_ENTRY_ALLOC))
        bt_map_set(map, granule, entry, entry | BT_ENTRY_ALLOC, false); /* busy or changed: it faults again */
    bt_fault_retry(fault->request);
}

static int grant(unsigned wanted, bool zeroed)
{
    for (unsigned count = wanted; count; count--) {
        uint64_t first = cluster_take(&g, count, zeroed);
        if (first == NO_CLUSTER)
            continue;
        memset(g.granted + first, true, count);
        return bt_map_grant(map, first << g.granule_bits, count, zeroed);
    }
    return -ENOSPC;
}

static void answer_grant(const struct bt_event *fault, uint8_t choice)
{
    int ret = grant(1 + choice % 5, choice & 8);
    if (ret < 0)
        ret = grant(1, !(choice & 8));
    failures |= ret < 0;
    if (ret < 0)
        bt_fault_done(fault->request, ret);
    else
        bt_fault_retry(fault->request);
}

static void answer(unsigned which, uint8_t choice)
{
    if (!fault_count)
        return;
    which %= fault_count--;
    struct bt_event fault = faults[which];
    TRACE("answer %#x to a fault: reason %d op %d at %#lx length %#lx\n", choice, fault.reason, fault.op, fault.offset,
          fault.length);
    faults[which] = faults[fault_count];
    if (choice >= 0xF0) {
        failures = true;
        bt_fault_done(fault.request, fault.reason == BT_FAULT_FLUSH ? flush_tables(true) : -EIO);
        return;
    }
    uint64_t granule = fault.offset >> g.granule_bits;
    if (fault.reason == BT_FAULT_WRITE && protecting[granule]) {
        faults[fault_count++] = fault; /* later */
    } else if (fault.reason == BT_FAULT_LOAD) {
        load(slice_of(granule));
        bt_fault_retry(fault.request);
    } else if (fault.reason == BT_FAULT_ENTRY) {
        answer_entry(&fault, granule);
    } else if (fault.reason == BT_FAULT_WRITE) {
        answer_write(&fault, granule);
    } else if (fault.reason == BT_FAULT_GRANT) {
        answer_grant(&fault, choice);
    } else {
        int ret = flush_tables(false);
        CHECK(fault.reason == BT_FAULT_FLUSH);
        failures |= ret < 0;
        bt_fault_done(fault.request, ret);
    }
}

static void drain_over(void)
{
    CHECK(draining && child->held_count == 0 && fault_count == 0 && (!backing || backing->held_count == 0));
    draining = false;
    drained = true;
}

static void handle_events(void)
{
    struct bt_event events[16];
    if (!atomic_load(&dp->events)) /* it is cheaper to look than to ask */
        return;
    for (int n; (n = bt_events(dp, events, 16)) > 0;)
        for (int i = 0; i < n; i++) {
            if (events[i].type == BT_EVENT_FAULT) {
                CHECK(fault_count < FAULTS);
                faults[fault_count++] = events[i];
            } else if (events[i].type == BT_EVENT_DONE && events[i].tag == DRAIN_COOKIE) {
                drain_over();
            } else if (events[i].type == BT_EVENT_DONE) {
                CHECK(events[i].tag >= 1 && events[i].tag <= SYNCS && syncs[events[i].tag - 1].active);
                sync_over(&syncs[events[i].tag - 1]);
            } else if (events[i].type == BT_EVENT_RELEASED) {
                released++;
            }
        }
}

static void turn(unsigned which)
{
    inline_thread_turn(threads[which & 1]);
    handle_events();
}

/* ---- requests ---- */

static void lane_done(struct bt_request *request)
{
    struct lane *lane = BT_CONTAINER(request, struct lane, request);
    CHECK(lane->active && !drained);
    lane->active = false;
    TRACE("lane %d done: %d\n", (int)(lane - lanes), request->ret);
    bool refused = request->op == BT_ZEROES && request->flags & BT_FAST_ZERO && request->ret == -ENOTSUP;
    CHECK(request->ret == 0 || failures || refused);
    struct change change = {request->op, request->offset, request->length, request->ret, lane->data};
    if (request->op == BT_STATUS && request->ret == 0)
        model_check_status(&g, request->offset, request->length, lane->extents, request->extents_count);
    else
        model_apply(&g, &change);
    free(lane->data);
    lane->data = NULL;
}

static bool is_change(int op) { return op == BT_WRITE || op == BT_ZEROES || op == BT_DISCARD; }

static bool is_free(int op, uint64_t offset, uint64_t length)
{
    for (unsigned i = 0; i < LANES; i++) {
        const struct bt_request *other = &lanes[i].request;
        if (lanes[i].active && other->op != BT_FLUSH && (is_change(op) || is_change(other->op)) &&
            other->offset < offset + length && offset < other->offset + other->length)
            return false;
    }
    return true;
}

static void set_data(struct lane *lane, struct input *in)
{
    struct bt_request *request = &lane->request;
    uint8_t how = take8(in);
    uint64_t cut = request->length * (how & 0x7F) / 128;
    lane->data = malloc(request->length);
    CHECK(lane->data);
    memset(lane->data, request->op == BT_READ ? 0xA5 : how & 0x80 ? 0 : 1 + how % 0xC0, request->length);
    lane->iov[0] = (struct iovec){lane->data, cut};
    lane->iov[1] = (struct iovec){NULL, 0};
    lane->iov[2] = (struct iovec){lane->data + cut, request->length - cut};
    request->iov = lane->iov;
    request->iovcnt = 3;
}

static void submit(struct input *in, uint8_t how)
{
    struct lane *lane = NULL;
    for (unsigned i = 0; i < LANES && !lane; i++)
        if (!lanes[i].active)
            lane = &lanes[i];
    int op = how % BT_OPS;
    uint64_t offset = take16(in) % g.size, most = bt_min(g.size - offset, 5ull << g.granule_bits);
    uint64_t length = 1 + take16(in) % most;
    if (how & 0x40) { /* whole granules */
        offset &= ~((1ull << g.granule_bits) - 1);
        length = bt_min(g.size - offset, (1 + length / 2048) << g.granule_bits);
    }
    if (!lane || (op != BT_FLUSH && !is_free(op, offset, length)))
        return;
    struct bt_request *request = &lane->request;
    request->op = (uint8_t)op;
    request->flags = take8(in) & (op == BT_ZEROES ? 7 : is_change(op) ? BT_FUA : 0);
    request->offset = op == BT_FLUSH ? 0 : offset;
    request->length = op == BT_FLUSH ? 0 : length;
    request->iovcnt = 0;
    request->extents = lane->extents;
    request->extents_max = 1 + how / 32;
    request->object = gate;
    request->thread = threads[how >> 7];
    request->done = lane_done;
    if (op == BT_READ || op == BT_WRITE)
        set_data(lane, in);
    lane->active = true;
    TRACE("lane %d: op %d flags %d at %#lx length %#lx data %#x\n", (int)(lane - lanes), op, request->flags,
          request->offset, request->length, lane->data ? lane->data[0] : 0);
    dropping |= op == BT_ZEROES || op == BT_DISCARD || g.policy;
    bt_request_start(request);
}

/* ---- other things that happen ---- */

static void write_protect(uint64_t granule)
{
    uint64_t entry;
    struct sync *sync;
    if (bt_map_get(map, granule, 1, &entry) < 0 || (entry & 15) != (BT_ENTRY_DATA | BT_ENTRY_WRITABLE))
        return;
    if (!(sync = start_sync()))
        return;
    /* Without ALLOC, too: copy on write would miss a write in place that is under way. */
    int ret = bt_map_set(map, granule, entry, entry & ~(uint64_t)(BT_ENTRY_WRITABLE | BT_ENTRY_ALLOC), true);
    CHECK(ret == 0);
    sync->protects = protecting[granule] = true;
    sync->protected_granule = granule;
    sync->protected_cluster = entry_cluster(&g, entry);
    g.state[sync->protected_cluster] = CLUSTER_SHARED;
    bt_synchronize(map, (uint64_t)(sync - syncs) + 1);
}

static void revoke(void)
{
    struct bt_grant runs[8];
    for (int n; (n = bt_map_revoke(map, runs, 8)) > 0;)
        for (int i = 0; i < n; i++)
            for (uint64_t k = 0; k < runs[i].count; k++) {
                uint64_t cluster = (runs[i].host_offset >> g.granule_bits) + k;
                CHECK(g.state[cluster] == CLUSTER_OWN);
                cluster_free(&g, cluster);
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

static void finish_one(struct input *in, uint8_t how)
{
    uint8_t which = take8(in);
    int error = how % 8 != 7 ? 0 : how & 0x80 ? -ENOSPC : -EIO;
    struct ram *ram = backing && which & 0x80 ? backing : child;
    failures |= error && ram->held_count;
    ram_finish(ram, which & 0x7F, error);
}

static void step(struct input *in)
{
    uint8_t op = take8(in), how = take8(in);
    TRACE("step %d how %#x\n", op % 16, how);
    switch (op % 16) {
    case 0: case 1: case 2: case 3:
        submit(in, how);
        break;
    case 4: case 5: case 6:
        finish_one(in, how);
        break;
    case 7: case 8:
        answer(how, take8(in));
        break;
    case 9:
        bt_map_shrink(map, (uint64_t)how % 8 * (8ull << g.slice_bits));
        break;
    case 10:
        write_protect(how % g.granules);
        break;
    case 11:
        drain_or_resume();
        break;
    case 12:
        if (how & 1)
            revoke();
        else
            grant(1 + how % 7, how & 16);
        break;
    case 13:
        child->at_once = how & 1;
        bt_map_hold_flush(map, how & 2);
        break;
    default:
        turn(how);
    }
    if (op & 0x80)
        turn(op >> 4);
}

/* ---- an input from start to end ---- */

static bool any_active(void)
{
    bool active = draining || fault_count;
    for (unsigned i = 0; i < LANES; i++)
        active |= lanes[i].active;
    for (unsigned i = 0; i < SYNCS; i++)
        active |= syncs[i].active;
    return active;
}

static void settle(void)
{
    for (unsigned i = 0; i < 4 || any_active(); i++) {
        CHECK(i < TURNS_MAX); /* something is parked for ever */
        if (drained)
            drain_or_resume();
        turn(i);
        for (unsigned n = fault_count; n > 0; n--)
            answer(n - 1, (uint8_t)(i % 16));
        while (ram_finish(child, 0, 0) || (backing && ram_finish(backing, 0, 0)))
            ;
    }
}

static void run_one(int op, uint64_t offset, uint64_t length)
{
    struct lane *lane = &lanes[0];
    struct bt_request *request = &lane->request;
    *lane = (struct lane){.active = true};
    request->op = (uint8_t)op;
    request->offset = offset;
    request->length = length;
    request->object = gate;
    request->thread = threads[0];
    request->done = lane_done;
    if (length) {
        lane->data = malloc(length);
        CHECK(lane->data);
        lane->iov[0] = (struct iovec){lane->data, length};
        request->iov = lane->iov;
        request->iovcnt = 1;
    }
    bt_request_start(request);
    settle();
    CHECK(request->ret == 0);
}

static void check_everything(void)
{
    uint64_t list[4];
    bt_map_hold_flush(map, false);
    for (uint64_t at = 0; at < g.size; at += 5000)
        run_one(BT_READ, at, bt_min(5000, g.size - at));
    run_one(BT_FLUSH, 0, 0);
    CHECK(bt_map_dirty(map, list, 4) == 0 && bt_map_claims(map) == 0);
    revoke();
    clusters_check(&g, dropping);
}

static void build(struct input *in)
{
    geometry_read(&g, in);
    child = ram_new(dp, 1, g.child_bytes, g.clusters << g.granule_bits, g.clusters << g.granule_bits);
    backing = g.backing_size ? ram_new(dp, 2, g.backing_bytes, g.backing_size, g.backing_size) : NULL;
    map = bt_map_new(dp, 3, g.granule_bits, g.slice_bits, g.size, ram_object(child),
                     backing ? ram_object(backing) : NULL);
    CHECK(map);
    bt_map_set_zero_entries(map, g.zero_entries);
    bt_object_set_policy(map, !(g.policy & 1), (g.policy >> 1) % 3);
    gate = bt_gate_new(dp, 4, map, true);
    CHECK(gate);
    fault_count = released = 0;
    failures = draining = drained = dropping = false;
}

static void tear_down(void)
{
    unsigned objects = backing ? 4 : 3;
    bt_object_unref(gate);
    bt_object_unref(map);
    bt_object_unref(ram_object(child));
    if (backing)
        bt_object_unref(ram_object(backing));
    for (unsigned i = 0; released < objects; i++) {
        CHECK(i < 1000);
        turn(i);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    if (!dp) {
        dp = bt_datapath_new();
        CHECK(dp);
        threads[0] = inline_thread_new(dp);
        threads[1] = inline_thread_new(dp);
    }
    build(&in);
    for (int i = 0; i < 300 && in.left; i++)
        step(&in);
    child->at_once = false;
    settle();
    check_everything();
    tear_down();
    return 0;
}

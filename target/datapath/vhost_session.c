/* SPDX-License-Identifier: Apache-2.0 */
/* A front end's session as the control thread sees it: what it sets up, and which queues run. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vhost.h"

#define FEATURE_INDIRECT (1ull << 28)
#define FEATURE_EVENT_IDX (1ull << 29)

bt_vhost *bt_vhost_new(bt_datapath *dp, uint64_t tag, bt_object *gate, uint32_t queues, uint64_t capacity,
                       uint32_t block_size, bool writable, const char *serial)
{
    if (!queues || queues > BT_VHOST_MAX_QUEUES || block_size < 512 || block_size & (block_size - 1)) {
        errno = EINVAL;
        return NULL;
    }
    struct bt_vhost *session = calloc(1, sizeof *session + queues * sizeof session->queues[0]);
    if (!session)
        return NULL;
    session->dp = dp;
    session->tag = tag;
    session->gate = gate;
    session->memory.dp = dp;
    session->block_size = block_size;
    session->writable = writable;
    session->write_through = true;
    session->capacity = capacity;
    memcpy(session->serial, serial, BT_VHOST_SERIAL);
    session->queue_count = queues;
    for (uint32_t i = 0; i < queues; i++) {
        struct vhost_queue *queue = &session->queues[i];
        queue->session = session;
        queue->index = i;
        queue->kick_fd = queue->err_fd = -1;
        queue->call_fd = -1;
    }
    bt_object_ref(gate);
    return session;
}

static void close_descriptor(int fd)
{
    if (fd >= 0)
        close(fd);
}

void bt_vhost_free(bt_vhost *session)
{
    for (uint32_t i = 0; i < session->queue_count; i++) {
        struct vhost_queue *queue = &session->queues[i];
        close_descriptor(queue->kick_fd);
        close_descriptor(queue->err_fd);
        close_descriptor(atomic_load(&queue->call_fd));
    }
    vhost_memory_clear(&session->memory);
    bt_object_unref(session->gate);
    free(session);
}

void bt_vhost_set_capacity(bt_vhost *session, uint64_t capacity)
{
    atomic_store_explicit(&session->capacity, capacity, memory_order_relaxed);
}

void bt_vhost_set_write_through(bt_vhost *session, bool on)
{
    atomic_store_explicit(&session->write_through, on, memory_order_relaxed);
}

static bool any_running(const struct bt_vhost *session)
{
    for (uint32_t i = 0; i < session->queue_count; i++)
        if (session->queues[i].running)
            return true;
    return false;
}

int bt_vhost_set_features(bt_vhost *session, uint64_t features)
{
    if (any_running(session))
        return -EBUSY;
    session->features = features;
    return 0;
}

/* ---- memory ---- */

int bt_vhost_add_region(bt_vhost *session, const struct bt_vhost_region *region, int fd)
{
    return any_running(session) ? -EBUSY : vhost_memory_add(&session->memory, region, fd);
}

int bt_vhost_remove_region(bt_vhost *session, const struct bt_vhost_region *region)
{
    return any_running(session) ? -EBUSY : vhost_memory_remove(&session->memory, region);
}

int bt_vhost_clear_regions(bt_vhost *session)
{
    if (any_running(session))
        return -EBUSY;
    vhost_memory_clear(&session->memory);
    return 0;
}

/* ---- queues ---- */

static struct vhost_queue *stopped_queue(bt_vhost *session, uint32_t index, int *error)
{
    *error = index >= session->queue_count ? -EINVAL : session->queues[index].running ? -EBUSY : 0;
    return *error ? NULL : &session->queues[index];
}

int bt_vhost_queue_set_size(bt_vhost *session, uint32_t index, uint32_t size)
{
    int error;
    struct vhost_queue *queue = stopped_queue(session, index, &error);
    if (!queue)
        return error;
    if (!size || size > BT_VHOST_MAX_QUEUE_SIZE || size & (size - 1))
        return -EINVAL;
    queue->size = (uint16_t)size;
    return 0;
}

int bt_vhost_queue_set_base(bt_vhost *session, uint32_t index, uint32_t base)
{
    int error;
    struct vhost_queue *queue = stopped_queue(session, index, &error);
    if (!queue)
        return error;
    if (base > UINT16_MAX)
        return -EINVAL;
    queue->base = (uint16_t)base;
    return 0;
}

int bt_vhost_queue_set_addresses(bt_vhost *session, uint32_t index, uint64_t desc, uint64_t avail, uint64_t used)
{
    int error;
    struct vhost_queue *queue = stopped_queue(session, index, &error);
    if (!queue)
        return error;
    queue->place = (struct vhost_ring_place){desc, avail, used};
    queue->placed = true;
    return 0;
}

/* A duplicate of fd that does not block; only what can be waited for and cannot block a writer for long. */
static int adopt(int fd)
{
    struct stat st;
    if (fd < 0)
        return -1;
    if (fstat(fd, &st) < 0)
        return -errno;
    /* Eventfds have no file type: their inode is anonymous. */
    if (!S_ISFIFO(st.st_mode) && (st.st_mode & S_IFMT) != 0)
        return -EINVAL;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    return own < 0 ? -errno : own;
}

static int set_descriptor(bt_vhost *session, uint32_t index, bool kick, int fd)
{
    int error;
    struct vhost_queue *queue = stopped_queue(session, index, &error);
    if (!queue)
        return error;
    int own = adopt(fd);
    if (own < 0 && fd >= 0)
        return own;
    int *place = kick ? &queue->kick_fd : &queue->err_fd;
    close_descriptor(*place);
    *place = own;
    return 0;
}

int bt_vhost_queue_set_kick(bt_vhost *session, uint32_t index, int fd)
{
    return set_descriptor(session, index, true, fd);
}

int bt_vhost_queue_set_error(bt_vhost *session, uint32_t index, int fd)
{
    return set_descriptor(session, index, false, fd);
}

static void close_retired(void *arg) { close((int)(intptr_t)arg); }

int bt_vhost_queue_set_call(bt_vhost *session, uint32_t index, int fd)
{
    if (index >= session->queue_count)
        return -EINVAL;
    struct vhost_queue *queue = &session->queues[index];
    int own = adopt(fd);
    if (own < 0 && fd >= 0)
        return own;
    int old = atomic_exchange_explicit(&queue->call_fd, own, memory_order_acq_rel);
    if (old >= 0 && queue->running)
        bt_grace(session->dp, close_retired, (void *)(intptr_t)old); /* its thread may be writing to it now */
    else
        close_descriptor(old);
    if (own >= 0 && queue->running) {
        uint64_t one = 1; /* a notification may have gone to the old one, which nobody reads any more */
        ssize_t n = write(own, &one, sizeof one);
        (void)n;
    }
    return 0;
}

int bt_vhost_queue_start(bt_vhost *session, uint32_t index, int thread_index)
{
    int error;
    struct vhost_queue *queue = stopped_queue(session, index, &error);
    struct bt_thread *thread = bt_thread_get(session->dp, thread_index);
    if (!queue)
        return error;
    if (!thread || !queue->size || !queue->placed)
        return -EINVAL;
    error = vhost_ring_attach(&queue->ring, &session->memory, &queue->place, queue->size, queue->base);
    if (!error)
        error = vhost_queue_alloc(queue);
    if (error)
        return error;
    queue->ring.event_idx = session->features & FEATURE_EVENT_IDX;
    queue->ring.indirect = session->features & FEATURE_INDIRECT;
    atomic_store(&queue->interrupted, false);
    queue->running = true;
    queue->thread = thread;
    queue->start.fn = vhost_queue_run;
    bt_thread_post(thread, &queue->start);
    return 0;
}

static void interrupted(int number) { (void)number; }

void bt_vhost_interrupt(bt_vhost *session, uint64_t age_ns)
{
    struct sigaction action = {.sa_handler = interrupted}; /* without SA_RESTART */
    uint64_t now = bt_now_ns();
    for (uint32_t i = 0; i < session->queue_count; i++) {
        struct vhost_queue *queue = &session->queues[i];
        uint64_t since = atomic_load_explicit(&queue->signalling_ns, memory_order_relaxed);
        if (!queue->running || !since || now < since + age_ns)
            continue;
        atomic_store(&queue->interrupted, true);
        sigaction(VHOST_INTERRUPT, &action, NULL);
        pthread_kill(queue->thread->pthread, VHOST_INTERRUPT);
    }
}

int bt_vhost_queue_stop(bt_vhost *session, uint32_t index, uint64_t cookie)
{
    if (index >= session->queue_count)
        return -EINVAL;
    struct vhost_queue *queue = &session->queues[index];
    if (!queue->running)
        return -EALREADY;
    bt_hurry(session->dp, &queue->hurried); /* what is throttled does not hold it up */
    queue->stop_cookie = cookie;
    queue->stop.fn = vhost_queue_halt;
    bt_thread_post(queue->thread, &queue->stop);
    return 0;
}

void bt_vhost_queue_unstop(bt_vhost *session, uint32_t index, uint64_t cookie)
{
    struct vhost_queue *queue = &session->queues[index];
    bt_unhurry(session->dp, &queue->hurried);
    queue->unstop_cookie = cookie;
    queue->unstop.fn = vhost_queue_unhalt;
    bt_thread_post(queue->thread, &queue->unstop);
}

void bt_vhost_queue_stopped(bt_vhost *session, uint32_t index)
{
    struct vhost_queue *queue = &session->queues[index];
    bt_unhurry(session->dp, &queue->hurried);
    queue->base = queue->ring.last_avail;
    queue->running = false;
    vhost_queue_release(queue);
}

uint32_t bt_vhost_queue_base(bt_vhost *session, uint32_t index)
{
    return session->queues[index].base;
}

static void add_counters(struct bt_vhost_counters *sum, const struct bt_vhost_counters *part)
{
    uint64_t *to = (uint64_t *)sum;
    const uint64_t *from = (const uint64_t *)part;
    for (size_t i = 0; i < sizeof *sum / sizeof *to; i++)
        to[i] += __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

void bt_vhost_get_counters(bt_vhost *session, struct bt_vhost_counters *out)
{
    *out = (struct bt_vhost_counters){0};
    for (uint32_t i = 0; i < session->queue_count; i++)
        add_counters(out, &session->queues[i].counters);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* An I/O thread whose poller has work again and again, found while it spins, still sees its other descriptors.
 * Prints how often the poller was asked until a descriptor that was readable from the start was served. */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "check.h"
#include "core.h"

#define ENOUGH 10000u /* times that the poller finds work; far more than a fair thread lets pass */
static struct bt_poller poller;
static struct bt_watch watch;
static struct bt_message begin;
static unsigned asked, found;
static _Atomic bool over;

static void finish(struct bt_thread *thread)
{
    bt_poller_remove(thread, &poller);
    atomic_store(&over, true);
}

/* Work every third time: once a turn has begun and found nothing, so that it is the spinning that finds it. */
static bool poll_often(struct bt_poller *self, struct bt_thread *thread)
{
    (void)self;
    if (++asked % 3)
        return false;
    if (++found > ENOUGH && !atomic_load(&over))
        finish(thread);
    return true;
}

static bool arm(struct bt_poller *self, struct bt_thread *thread)
{
    (void)self, (void)thread;
    return true;
}

static void disarm(struct bt_poller *self, struct bt_thread *thread) { (void)self, (void)thread; }

static void ready(struct bt_watch *self, struct bt_thread *thread, uint32_t events)
{
    (void)events;
    bt_watch_remove(thread, self);
    finish(thread);
}

static void start(struct bt_message *message, struct bt_thread *thread)
{
    (void)message;
    CHECK(bt_watch_add(thread, &watch, EPOLLIN) == 0);
    bt_poller_add(thread, &poller);
}

int main(void)
{
    bt_datapath *dp = bt_datapath_new();
    watch = (struct bt_watch){.fd = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC), .ready = ready};
    poller = (struct bt_poller){.poll = poll_often, .arm = arm, .disarm = disarm};
    begin.fn = start;
    CHECK(dp && watch.fd >= 0 && bt_thread_new(dp, 32768) == 0);
    bt_thread_post(bt_thread_get(dp, 0), &begin);
    while (!atomic_load(&over))
        usleep(1000);
    bt_datapath_free(dp);
    close(watch.fd);
    printf("%u\n", found);
    CHECK(found < ENOUGH / 10);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Events from the I/O threads to Python: a lock-free stack that the control thread takes whole, and an
 * eventfd that is written only when the stack was empty, so a batch costs one wake-up. */
#include <sys/eventfd.h>
#include <unistd.h>

#include "core.h"

void bt_event_push(bt_datapath *dp, struct bt_event_node *node)
{
    struct bt_event_node *head = atomic_load_explicit(&dp->events, memory_order_relaxed);
    do {
        node->next = head;
    } while (!atomic_compare_exchange_weak_explicit(&dp->events, &head, node, memory_order_release,
                                                    memory_order_relaxed));
    if (!head) {
        uint64_t one = 1;
        ssize_t n = write(dp->event_fd, &one, sizeof one);
        (void)n; /* the counter cannot overflow: it is reset at each drain */
    }
}

void bt_event_send(bt_datapath *dp, const struct bt_event *event)
{
    struct bt_event_node *node = malloc(sizeof *node);
    if (!node)
        abort(); /* losing an event would park a request for ever */
    node->event = *event;
    node->allocated = true;
    bt_event_push(dp, node);
}

void bt_event_done(bt_datapath *dp, uint64_t cookie, int64_t result)
{
    struct bt_event event = {.type = BT_EVENT_DONE, .tag = cookie, .result = result};
    bt_event_send(dp, &event);
}

int bt_datapath_eventfd(bt_datapath *dp) { return dp->event_fd; }

static void take_new_events(bt_datapath *dp)
{
    uint64_t count;
    ssize_t n = read(dp->event_fd, &count, sizeof count);
    (void)n; /* EAGAIN: a drain before this one took them all */
    struct bt_event_node *node = atomic_exchange_explicit(&dp->events, NULL, memory_order_acquire);
    struct bt_event_node *oldest = NULL;
    while (node) {
        struct bt_event_node *next = node->next;
        node->next = oldest;
        oldest = node;
        node = next;
    }
    dp->event_backlog = oldest;
}

int bt_events(bt_datapath *dp, struct bt_event *out, int max)
{
    int count = 0;
    if (!dp->event_backlog)
        take_new_events(dp);
    while (count < max && dp->event_backlog) {
        struct bt_event_node *node = dp->event_backlog;
        dp->event_backlog = node->next;
        out[count++] = node->event;
        if (node->allocated)
            free(node);
    }
    return count;
}

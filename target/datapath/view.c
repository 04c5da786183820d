/* SPDX-License-Identifier: Apache-2.0 */
/* Views of a fence: what its child held before it was changed, from where that was saved, or where it still is. Who
 * reads what is noted until he is done, so that nothing is changed under him. */
#include "fence.h"

struct bt_view {
    struct bt_object base;
    bt_child fence;
};

bool bt_is_read(const struct bt_saver *saver, uint64_t first, uint64_t end, uint64_t seq)
{
    for (const struct bt_reading *reading = saver->readings; reading; reading = reading->next)
        if (reading->seq <= seq && reading->first < end && first < reading->end)
            return true;
    return false;
}

static struct bt_reading *reading_of(const struct bt_request *request, const struct bt_fence *fence)
{
    struct bt_reading *reading = request->readings;
    while (reading && reading->fence != fence)
        reading = reading->of_request;
    return reading;
}

/* Under the lock. */
static void reading_new(struct bt_fence *fence, struct bt_request *request, uint64_t first, uint64_t end)
{
    struct bt_saver *saver = &fence->saver;
    struct bt_reading *reading = saver->free_readings;
    if (reading)
        saver->free_readings = reading->next;
    else if (!(reading = malloc(sizeof *reading)))
        abort();
    *reading = (struct bt_reading){.fence = fence, .first = first, .end = end, .seq = ++saver->seq};
    reading->of_request = request->readings;
    request->readings = reading;
    reading->next = saver->readings;
    reading->pprev = &saver->readings;
    if (reading->next)
        reading->next->pprev = &reading->next;
    saver->readings = reading;
}

/* To be called before it is looked where the granules are. */
static void begin_reading(struct bt_fence *fence, struct bt_request *request, uint64_t first, uint64_t end)
{
    struct bt_reading *reading = reading_of(request, fence);
    if (reading && reading->first <= first && end <= reading->end)
        return;
    pthread_mutex_lock(&fence->saver.lock);
    if (reading) {
        reading->first = bt_min(reading->first, first);
        reading->end = bt_max(reading->end, end);
    } else {
        reading_new(fence, request, first, end);
    }
    pthread_mutex_unlock(&fence->saver.lock);
}

void bt_readings_end(struct bt_request *request)
{
    struct bt_reading *reading = request->readings;
    request->readings = NULL;
    while (reading) {
        struct bt_reading *of_request = reading->of_request;
        struct bt_saver *saver = &reading->fence->saver;
        pthread_mutex_lock(&saver->lock);
        *reading->pprev = reading->next;
        if (reading->next)
            reading->next->pprev = reading->pprev;
        bt_saver_reading_ended(reading->fence);
        reading->next = saver->free_readings;
        saver->free_readings = reading;
        pthread_mutex_unlock(&saver->lock);
        reading = of_request;
    }
}

bool bt_view_resolve(struct bt_thread *thread, struct bt_object *object, struct bt_segment *segment)
{
    struct bt_fence *fence = bt_as_fence(bt_child_get(&object->children[0]));
    if (segment->op == BT_WRITE || segment->op == BT_ZEROES || segment->op == BT_DISCARD)
        return bt_hold(segment, BT_FAULT_ENTRY);
    uint64_t first = bt_granule_of(fence, segment->offset), last = bt_last_granule(fence, segment);
    begin_reading(fence, segment->request, first, last);
    if (bt_is_marked(fence, BT_FENCE_HIDDEN, first)) {
        segment->kind = BT_SEG_ERROR;
        segment->error = -EACCES;
        return false;
    }
    bool saved = bt_is_marked(fence, BT_FENCE_SAVED, first);
    last = bt_mark_run(fence, BT_FENCE_HIDDEN, first, last, false);
    bt_narrow(fence, segment, bt_mark_run(fence, BT_FENCE_SAVED, first, last, saved));
    bt_count_request(object, thread, segment->op, segment->offset, segment->length);
    segment->object = bt_child_get(&fence->children[saved]);
    return true;
}

static void view_destroy(struct bt_object *object) { free(object); }
static const struct bt_object_ops view_ops = {.destroy = view_destroy};

bt_object *bt_view_new(bt_datapath *dp, uint64_t tag, bt_object *fence, uint64_t size)
{
    struct bt_view *view = bt_child_get(&fence->children[1]) ? calloc(1, sizeof *view) : NULL;
    if (!view)
        return NULL;
    bt_object_init(&view->base, dp, BT_OBJ_VIEW, &view_ops, tag, size);
    bt_child_init(&view->fence, fence);
    view->base.children = &view->fence;
    view->base.child_count = 1;
    return &view->base;
}

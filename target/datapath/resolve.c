/* SPDX-License-Identifier: Apache-2.0 */
/* The walk from an object to where its data lives. Each step narrows the segment to what is alike. */
#include "request.h"
#include "throttle.h"

static void end_with(struct bt_segment *segment, enum bt_segment_kind kind, uint32_t extent_flags)
{
    segment->kind = kind;
    segment->extent_flags = extent_flags;
}

static void end_with_error(struct bt_segment *segment, int error)
{
    segment->kind = BT_SEG_ERROR;
    segment->error = error;
}

/* Past the end of an inner object reads give zeros (a short backing file); changes have no place to go. */
static bool clip(struct bt_segment *segment, uint64_t size)
{
    if (segment->offset < size) {
        segment->length = bt_min(segment->length, size - segment->offset);
        return true;
    }
    if (segment->op == BT_WRITE || segment->op == BT_ZEROES)
        end_with_error(segment, -EIO);
    else
        end_with(segment, BT_SEG_ZERO, BT_EXTENT_HOLE | BT_EXTENT_ZERO);
    return false;
}

/* What a node's discard and detect-zeroes options do to a request that passes. */
static bool apply_policy(struct bt_object *object, struct bt_segment *segment)
{
    if (segment->op == BT_WRITE)
        segment->detect_zeroes = (uint8_t)bt_max(segment->detect_zeroes, object->detect_zeroes);
    if (object->discard_unmap)
        return true;
    if (segment->op == BT_ZEROES)
        segment->flags &= (uint8_t)~BT_UNMAP;
    if (segment->op != BT_DISCARD)
        return true;
    end_with(segment, BT_SEG_SKIP, 0);
    return false;
}

static bool step_concat(struct bt_concat *concat, struct bt_segment *segment)
{
    uint64_t start = 0;
    for (int i = 0; i < concat->count; i++) {
        struct bt_object *child = bt_child_get(&concat->children[i]);
        uint64_t size = bt_object_size(child);
        if (segment->offset - start < size) {
            segment->offset -= start;
            segment->object = child;
            segment->length = bt_min(segment->length, size - segment->offset);
            return true;
        }
        start += size;
    }
    return clip(segment, start);
}

static bool step_window(struct bt_thread *thread, struct bt_window *window, struct bt_segment *segment)
{
    if (!clip(segment, bt_object_size(&window->base)))
        return false;
    bt_count_request(&window->base, thread, segment->op, segment->offset, segment->length);
    segment->offset += window->offset;
    segment->object = bt_child_get(&window->child);
    return true;
}

static bool step_cor(struct bt_thread *thread, struct bt_object *object, struct bt_segment *segment)
{
    if (segment->op == BT_READ || segment->op == BT_CACHE) {
        segment->populate = true;
        segment->bottom = bt_child_get(&object->children[1]);
    }
    bt_count_request(object, thread, segment->op, segment->offset, segment->length);
    segment->object = bt_child_get(&object->children[0]);
    return true;
}

/* Told once; who wants to hear of the next sets it anew. */
static void tell_threshold(struct bt_object *object, const struct bt_segment *segment)
{
    if (segment->op != BT_WRITE && segment->op != BT_ZEROES)
        return;
    uint64_t end = segment->offset + segment->length, threshold = atomic_load(&object->write_threshold);
    if (end <= threshold || !atomic_compare_exchange_strong(&object->write_threshold, &threshold, UINT64_MAX))
        return;
    struct bt_event event = {
        .type = BT_EVENT_THRESHOLD, .tag = object->tag, .offset = threshold, .length = end - threshold};
    bt_event_send(object->dp, &event);
}

static bool step(struct bt_thread *thread, struct bt_segment *segment)
{
    struct bt_object *object = segment->object;
    if (BT_UNLIKELY(segment->offset + segment->length >
                    atomic_load_explicit(&object->write_threshold, memory_order_relaxed)))
        tell_threshold(object, segment);
    if (!apply_policy(object, segment))
        return false;
    switch (object->type) {
    case BT_OBJ_GATE:
        segment->object = bt_child_get(&((struct bt_gate *)object)->child);
        return true;
    case BT_OBJ_WINDOW:
        return step_window(thread, (struct bt_window *)object, segment);
    case BT_OBJ_CONCAT:
        return step_concat((struct bt_concat *)object, segment);
    case BT_OBJ_MAP:
        return clip(segment, bt_object_size(object)) && bt_map_resolve(thread, bt_as_map(object), segment);
    case BT_OBJ_FENCE:
        return bt_fence_resolve(thread, object, segment);
    case BT_OBJ_VIEW:
        return clip(segment, bt_object_size(object)) && bt_view_resolve(thread, object, segment);
    case BT_OBJ_THROTTLE:
        return bt_throttle_resolve(object, segment);
    case BT_OBJ_COR:
        return step_cor(thread, object, segment);
    case BT_OBJ_UPCALL:
        segment->kind = BT_SEG_FAULT;
        segment->reason = BT_FAULT_UPCALL;
        return false;
    case BT_OBJ_DEVICE:
        segment->kind = BT_SEG_IO;
        return false;
    }
    end_with_error(segment, -EIO);
    return false;
}

/* Data that were found behind a map that is to get them. False: walk again. */
static bool populate(struct bt_segment *segment)
{
    bool found = segment->kind != BT_SEG_FAULT || segment->reason == BT_FAULT_ENTRY || segment->reason == BT_FAULT_UPCALL;
    if (!found || segment->kind == BT_SEG_ERROR || segment->kind == BT_SEG_PARKED)
        return true;
    return bt_map_populate(segment);
}

void bt_resolve(struct bt_request *request, int op, uint32_t flags, uint64_t offset, uint64_t length,
                struct bt_segment *segment)
{
    do {
        memset(segment, 0, sizeof *segment);
        segment->request = request;
        segment->op = (uint8_t)op;
        segment->flags = (uint8_t)(flags & ~BT_POPULATE);
        segment->populate = flags & BT_POPULATE;
        segment->object = request->object;
        segment->offset = offset;
        segment->length = length;
        while (step(request->thread, segment))
            ;
    } while (BT_UNLIKELY(segment->into) && !populate(segment));
    if (BT_UNLIKELY(flags & BT_POPULATE) && op == BT_CACHE && segment->kind <= BT_SEG_ZERO)
        segment->kind = BT_SEG_SKIP;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The grant pool of a map: clusters that Python has allocated ahead, for claims to place. Under the map's lock. */
#include "request.h"

static void report_low(struct bt_map *map)
{
    if (map->granted >= map->low_water || map->low_reported)
        return;
    map->low_reported = true;
    struct bt_event event = {
        .type = BT_EVENT_GRANTS, .tag = map->base.tag, .length = map->granted << map->granule_bits};
    bt_event_send(map->base.dp, &event);
}

bool bt_grant_take(struct bt_map *map, uint64_t wanted, struct bt_grant *out)
{
    pthread_mutex_lock(&map->lock);
    bool any = map->grants_count > 0;
    if (any) {
        struct bt_grant *first = &map->grants[0];
        *out = *first;
        out->count = bt_min(wanted, first->count);
        first->host_offset += out->count << map->granule_bits;
        first->count -= out->count;
        map->granted -= out->count;
        if (!first->count) {
            map->grants_count--;
            memmove(first, first + 1, (size_t)map->grants_count * sizeof *first);
        }
    }
    report_low(map);
    pthread_mutex_unlock(&map->lock);
    return any;
}

static int grant_add(struct bt_map *map, struct bt_grant grant, bool front)
{
    if (map->grants_count == map->grants_capacity) {
        int capacity = map->grants_capacity ? 2 * map->grants_capacity : 16;
        struct bt_grant *grants = realloc(map->grants, (size_t)capacity * sizeof *grants);
        if (!grants)
            return -ENOMEM;
        map->grants = grants;
        map->grants_capacity = capacity;
    }
    int at = front ? 0 : map->grants_count;
    memmove(&map->grants[at + 1], &map->grants[at], (size_t)(map->grants_count - at) * sizeof *map->grants);
    map->grants[at] = grant;
    map->grants_count++;
    map->granted += grant.count;
    return 0;
}

/* The pool's array had room for it a moment ago. */
void bt_grant_give_back(struct bt_map *map, struct bt_grant grant, bool front)
{
    if (!grant.count)
        return;
    pthread_mutex_lock(&map->lock);
    if (grant_add(map, grant, front) < 0)
        abort();
    pthread_mutex_unlock(&map->lock);
}

int bt_map_grant(bt_object *object, uint64_t host_offset, uint64_t count, bool zeroed)
{
    struct bt_map *map = bt_as_map(object);
    if (!count || (host_offset & ((1u << BT_SECTOR_BITS) - 1)))
        return -EINVAL;
    pthread_mutex_lock(&map->lock);
    int ret = grant_add(map, (struct bt_grant){host_offset, count, zeroed}, false);
    if (map->granted >= map->low_water)
        map->low_reported = false;
    pthread_mutex_unlock(&map->lock);
    return ret;
}

int bt_map_revoke(bt_object *object, struct bt_grant *out, int max)
{
    struct bt_map *map = bt_as_map(object);
    int n = 0;
    pthread_mutex_lock(&map->lock);
    while (n < max && map->grants_count > 0) {
        out[n] = map->grants[--map->grants_count];
        map->granted -= out[n++].count;
    }
    pthread_mutex_unlock(&map->lock);
    return n;
}

uint64_t bt_map_granted(bt_object *object)
{
    struct bt_map *map = bt_as_map(object);
    pthread_mutex_lock(&map->lock);
    uint64_t granted = map->granted;
    pthread_mutex_unlock(&map->lock);
    return granted;
}

void bt_map_set_low_water(bt_object *object, uint64_t granules)
{
    struct bt_map *map = bt_as_map(object);
    pthread_mutex_lock(&map->lock);
    map->low_water = granules;
    if (map->granted >= map->low_water)
        map->low_reported = false;
    pthread_mutex_unlock(&map->lock);
}

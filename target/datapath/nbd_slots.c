/* SPDX-License-Identifier: Apache-2.0 */
/* Memory of an NBD session: the slots of its requests, the receive buffer, and a page that nobody may touch. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "nbd.h"

#define PAGE 4096u
#define SLOTS_BYTES ((NBD_SLOTS * sizeof(struct nbd_slot) + PAGE - 1) / PAGE * PAGE)
#define MEMORY_BYTES (SLOTS_BYTES + NBD_RX_BYTES + PAGE)

bool nbd_memory_init(struct bt_nbd_session *session)
{
    void *memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    mprotect((char *)memory + SLOTS_BYTES + NBD_RX_BYTES, PAGE, PROT_NONE);
    session->memory = memory;
    session->slots = memory;
    session->rx = (uint8_t *)memory + SLOTS_BYTES;
    return true;
}

void nbd_memory_free(struct bt_nbd_session *session) { munmap(session->memory, MEMORY_BYTES); }

struct nbd_slot *nbd_slot_get(struct bt_nbd_session *session)
{
    struct nbd_slot *slot = session->free_slots;
    if (slot)
        session->free_slots = slot->next;
    else if (session->made_slots < NBD_SLOTS)
        slot = &session->slots[session->made_slots++];
    else
        return NULL;
    slot->session = session;
    session->used_slots++;
    slot->buffer = NULL;
    slot->reason = NULL;
    return slot;
}

void nbd_slot_put(struct bt_nbd_session *session, struct nbd_slot *slot)
{
    slot->next = session->free_slots;
    session->free_slots = slot;
    session->used_slots--;
    session->relieved = true;
}

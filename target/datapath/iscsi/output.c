/* SPDX-License-Identifier: Apache-2.0 */
/* What has left libiscsi. It sends data from where they are, PDU by PDU, also when the command that they are of has
 * ended meanwhile: a target may refuse a write before it has taken the data. So the end of a command is told when
 * libiscsi has nothing to say for it any more; then its memory may be used for something else.
 *
 * Names on the wire: RFC 7143 section 11.
 */
#include "internal.h"

enum {
    SCSI_COMMAND = 0x01,
    DATA_OUT = 0x05,
    FINAL = 0x80,
};

/* A sequence of PDUs ends with a final one: the command with the data that nobody asked for; what an R2T asks for. */
static void pdu_passes(struct output *output, struct session *session)
{
    const unsigned char *header = output->header;
    int opcode = header[0] & 0x3f;
    bool final = header[1] & FINAL;
    if (opcode == SCSI_COMMAND)
        output->cmd_sn = get32(header + 24);
    if (!session || (opcode == SCSI_COMMAND ? final : opcode != DATA_OUT || !final))
        return;
    struct command *command = session_find(session, get32(header + 16));
    if (command && opcode == SCSI_COMMAND)
        command->unsent++;
    else if (command && command->unsent)
        command->unsent--;
}

void output_passes(struct output *output, struct session *session, uint32_t header_bytes, const unsigned char *bytes,
                   uint32_t length)
{
    while (length) {
        uint32_t n;
        if (output->have < header_bytes) {
            n = (uint32_t)bt_min(header_bytes - output->have, length);
            memcpy(output->header + output->have, bytes, n);
            output->have += n;
            if (output->have == header_bytes)
                output->left = ((get32(output->header + 4) & 0xffffff) + 3) & ~3u;
        } else {
            n = (uint32_t)bt_min(output->left, length);
            output->left -= n;
        }
        bytes += n;
        length -= n;
        if (output->have < header_bytes || output->left)
            continue;
        output->have = 0;
        pdu_passes(output, session);
    }
}

bool output_has(const struct output *output, const struct command *command)
{
    return (int32_t)(output->cmd_sn - command->task.cmdsn) >= 0;
}

/* io_uring over the raw system calls: ring set-up, submission, and provided buffer rings.
 *
 * There is no liburing here on purpose: the limit that headrace is measured against must not need a library that
 * headrace doesn't need, and the constants below are newer than the headers of today's stable distributions. */
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/io_uring.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef IORING_RECVSEND_BUNDLE /* kernel 6.10 */
#define IORING_RECVSEND_BUNDLE (1U << 4)
#endif
#ifndef IORING_CQE_F_BUF_MORE /* kernel 6.12 */
#define IORING_CQE_F_BUF_MORE (1U << 4)
#endif
/* These four are enumerators in newer headers, so #ifndef can't see them: names of our own. */
#define SETUP_NO_SQARRAY (1U << 16) /* kernel 6.6 */
#define PBUF_RING_INC 2             /* kernel 6.12 */
#define ENTER_REGISTERED_RING (1U << 4)
#define REGISTER_RING_FDS 20

/* Older headers have `pad` where the flags are now. */
struct buffer_registration {
    uint64_t ring_addr;
    uint32_t ring_entries;
    uint16_t bgid;
    uint16_t flags;
    uint64_t resv[3];
};

struct buffer_entry {
    uint64_t addr;
    uint32_t len;
    uint16_t bid;
    uint16_t resv; /* entry 0: the tail of the whole ring */
};

struct ring {
    int fd;
    int enter_fd; /* fd, or its registered index */
    unsigned enter_flags, setup_flags;
    unsigned *sq_head, *sq_tail, *sq_flags;
    unsigned *cq_head, *cq_tail;
    unsigned sq_mask, sq_entries, cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    unsigned filled;    /* submission entries filled by us */
    unsigned submitted; /* of those, taken by the kernel */
    uint64_t enters;
};

static inline int ring_register(struct ring *ring, unsigned operation, void *argument, unsigned count)
{
    return (int)syscall(__NR_io_uring_register, ring->fd, operation, argument, count);
}

static int ring_map(struct ring *ring, struct io_uring_params *params)
{
    int has_array = !(params->flags & SETUP_NO_SQARRAY);
    size_t sq_size = params->sq_off.array + (has_array ? params->sq_entries * sizeof(unsigned) : 0);
    size_t cq_size = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    size_t size = sq_size > cq_size ? sq_size : cq_size;
    int protection = PROT_READ | PROT_WRITE, kind = MAP_SHARED | MAP_POPULATE;

    char *rings = mmap(NULL, size, protection, kind, ring->fd, IORING_OFF_SQ_RING);
    if (rings == MAP_FAILED)
        return -errno;
    ring->sqes = mmap(NULL, params->sq_entries * sizeof(struct io_uring_sqe), protection, kind, ring->fd,
                      IORING_OFF_SQES);
    if (ring->sqes == MAP_FAILED)
        return -errno;
    ring->sq_head = (unsigned *)(rings + params->sq_off.head);
    ring->sq_tail = (unsigned *)(rings + params->sq_off.tail);
    ring->sq_flags = (unsigned *)(rings + params->sq_off.flags);
    ring->sq_mask = *(unsigned *)(rings + params->sq_off.ring_mask);
    ring->sq_entries = params->sq_entries;
    ring->cq_head = (unsigned *)(rings + params->cq_off.head);
    ring->cq_tail = (unsigned *)(rings + params->cq_off.tail);
    ring->cq_mask = *(unsigned *)(rings + params->cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(rings + params->cq_off.cqes);
    if (has_array) {
        unsigned *array = (unsigned *)(rings + params->sq_off.array);
        for (unsigned i = 0; i < params->sq_entries; i++)
            array[i] = i;
    }
    return 0;
}

/* A registered ring saves the kernel a descriptor look-up per enter; without it everything works as well. */
static void ring_register_itself(struct ring *ring)
{
    struct {
        uint32_t offset, resv;
        uint64_t data;
    } update = {-1U, 0, (uint64_t)ring->fd};
    if (ring_register(ring, REGISTER_RING_FDS, &update, 1) == 1) {
        ring->enter_fd = (int)update.offset;
        ring->enter_flags |= ENTER_REGISTERED_RING;
    }
}

static int ring_init(struct ring *ring, unsigned entries, unsigned cq_entries, unsigned flags, int register_ring)
{
    struct io_uring_params params = {
        /* SUBMIT_ALL: else one bad entry stops the batch behind it. */
        .flags = flags | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | IORING_SETUP_SUBMIT_ALL,
        .cq_entries = cq_entries,
    };
    memset(ring, 0, sizeof *ring);
    ring->fd = ring->enter_fd = (int)syscall(__NR_io_uring_setup, entries, &params);
    if (ring->fd < 0)
        return -errno;
    ring->setup_flags = params.flags;
    int error = ring_map(ring, &params);
    if (!error && register_ring)
        ring_register_itself(ring);
    return error;
}

/* Publishes what was filled, submits it and waits for completions: one system call. */
static inline int ring_submit_and_wait(struct ring *ring, unsigned completions)
{
    unsigned flags = IORING_ENTER_GETEVENTS | ring->enter_flags;
    unsigned count = ring->filled - ring->submitted;
    int polled = ring->setup_flags & IORING_SETUP_SQPOLL;
    __atomic_store_n(ring->sq_tail, ring->filled, __ATOMIC_RELEASE);
    if (polled) {
        ring->submitted = ring->filled;
        if (__atomic_load_n(ring->sq_flags, __ATOMIC_ACQUIRE) & IORING_SQ_NEED_WAKEUP)
            flags |= IORING_ENTER_SQ_WAKEUP;
    }
    ring->enters++;
    int result = (int)syscall(__NR_io_uring_enter, ring->enter_fd, count, completions, flags, NULL, 0);
    if (result < 0)
        return -errno;
    if (!polled)
        ring->submitted += result;
    return result;
}

/* A zeroed submission entry. A full queue is submitted without waiting. */
static inline struct io_uring_sqe *ring_entry(struct ring *ring)
{
    while (ring->filled - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) >= ring->sq_entries)
        ring_submit_and_wait(ring, 0);
    struct io_uring_sqe *entry = &ring->sqes[ring->filled++ & ring->sq_mask];
    memset(entry, 0, sizeof *entry);
    return entry;
}

/* Buffers that the kernel takes for receives, in the order of the ring. */
struct buffers {
    struct buffer_entry *ring;
    unsigned mask;
    uint16_t tail, published;
    uint16_t head; /* our view of what was consumed: bundles take buffers in ring order, not in id order */
    char *memory;
    size_t size; /* of one buffer */
};

static inline void buffers_set(struct buffers *buffers, unsigned slot, unsigned id)
{
    struct buffer_entry *entry = &buffers->ring[slot & buffers->mask];
    entry->addr = (uint64_t)(buffers->memory + (size_t)id * buffers->size);
    entry->len = buffers->size;
    entry->bid = id; /* never `resv`: slot 0's holds the tail */
}

static inline void buffers_publish(struct buffers *buffers)
{
    if (buffers->published == buffers->tail)
        return;
    __atomic_store_n(&buffers->ring[0].resv, buffers->tail, __ATOMIC_RELEASE);
    buffers->published = buffers->tail;
}

static int buffers_init(struct ring *ring, struct buffers *buffers, unsigned count, size_t size, unsigned flags)
{
    int protection = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
    size_t ring_size = count * sizeof(struct buffer_entry);
    memset(buffers, 0, sizeof *buffers);
    buffers->mask = count - 1;
    buffers->size = size;
    buffers->ring = mmap(NULL, ring_size < 4096 ? 4096 : ring_size, protection, kind | MAP_POPULATE, -1, 0);
    buffers->memory = mmap(NULL, size * count, protection, kind, -1, 0);
    if (buffers->ring == MAP_FAILED || buffers->memory == MAP_FAILED)
        return -errno;
    struct buffer_registration registration = {
        .ring_addr = (uint64_t)buffers->ring, .ring_entries = count, .flags = flags};
    if (ring_register(ring, IORING_REGISTER_PBUF_RING, &registration, 1) < 0)
        return -errno;
    for (unsigned id = 0; id < count; id++)
        buffers_set(buffers, id, id);
    buffers->tail = count;
    buffers_publish(buffers);
    return 0;
}

static inline void buffers_recycle(struct buffers *buffers, unsigned id)
{
    buffers_set(buffers, buffers->tail++, id);
}

/* The kernel's io_uring interface, as far as headrace uses it: structures, one ring, one provided buffer ring.
 *
 * Written against the kernel ABI (include/uapi/linux/io_uring.h of 6.12+), not against liburing, and self-contained:
 * the headers of long-lived distributions lack half of what a current kernel offers. Every function returns 0 or a
 * count, or -errno.
 */
#ifndef HEADRACE_URING_ABI_H
#define HEADRACE_URING_ABI_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup 425
#define __NR_io_uring_enter 426
#define __NR_io_uring_register 427
#endif

enum {
    HR_OP_POLL_ADD = 6, HR_OP_SENDMSG = 9, HR_OP_ACCEPT = 13, HR_OP_ASYNC_CANCEL = 14, HR_OP_READ = 22,
    HR_OP_SEND = 26, HR_OP_RECV = 27,

    HR_SETUP_CQSIZE = 1 << 3, HR_SETUP_CLAMP = 1 << 4, HR_SETUP_SUBMIT_ALL = 1 << 7, /* 5.18 */
    HR_SETUP_COOP_TASKRUN = 1 << 8, HR_SETUP_TASKRUN_FLAG = 1 << 9,                  /* 5.19 */
    HR_SETUP_SINGLE_ISSUER = 1 << 12,                                               /* 6.0 */
    HR_SETUP_DEFER_TASKRUN = 1 << 13,                                               /* 6.1 */
    HR_SETUP_NO_SQARRAY = 1 << 16,                                                  /* 6.6 */

    HR_ENTER_GETEVENTS = 1 << 0, HR_ENTER_EXT_ARG = 1 << 3,
    HR_SQ_CQ_OVERFLOW = 1 << 1, HR_SQ_TASKRUN = 1 << 2,

    HR_SQE_ASYNC = 1 << 4, HR_SQE_BUFFER_SELECT = 1 << 5, HR_SQE_CQE_SKIP_SUCCESS = 1 << 6,
    HR_ACCEPT_MULTISHOT = 1 << 0, HR_RECV_MULTISHOT = 1 << 1,
    HR_CANCEL_ALL = 1 << 0, HR_CANCEL_ANY = 1 << 2,

    HR_CQE_F_BUFFER = 1 << 0, HR_CQE_F_MORE = 1 << 1, HR_CQE_F_BUF_MORE = 1 << 4,

    HR_REGISTER_PROBE = 8, HR_OP_SUPPORTED = 1 << 0,
    HR_REGISTER_PBUF_RING = 22, HR_UNREGISTER_PBUF_RING = 23,
    HR_PBUF_RING_INC = 2, /* 6.12 */
};
#define HR_OFF_SQES 0x10000000ULL

struct hr_sqe {
    uint8_t opcode, flags;
    uint16_t ioprio;
    int32_t fd;
    uint64_t off, addr;
    uint32_t len, op_flags; /* msg_flags, accept_flags, poll32_events, cancel_flags: one union */
    uint64_t user_data;
    uint16_t buf_group, personality;
    uint32_t optlen; /* in a union with file_index and splice_fd_in */
    uint64_t addr3, pad;
};
struct hr_cqe { uint64_t user_data; int32_t res; uint32_t flags; };

struct hr_sq_offsets { uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, resv1; uint64_t user_addr; };
struct hr_cq_offsets { uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv1; uint64_t user_addr; };
struct hr_params {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, resv[3];
    struct hr_sq_offsets sq_off;
    struct hr_cq_offsets cq_off;
};
struct hr_timespec { int64_t tv_sec, tv_nsec; };
struct hr_getevents_arg { uint64_t sigmask; uint32_t sigmask_sz, min_wait_usec; uint64_t ts; };
struct hr_buf { uint64_t addr; uint32_t len; uint16_t bid, resv; };
struct hr_buf_reg { uint64_t ring_addr; uint32_t ring_entries; uint16_t bgid, flags; uint64_t resv[3]; };

struct hr_probe_op { uint8_t op, resv; uint16_t flags; uint32_t resv2; };
struct hr_probe { uint8_t last_op, ops_len; uint16_t resv; uint32_t resv2[3]; struct hr_probe_op ops[64]; };

struct hr_ring {
    int fd;
    uint32_t setup_flags, features;
    uint32_t *sq_head, *sq_tail, *sq_flags, *cq_head, *cq_tail;
    uint32_t sq_mask, sq_entries, cq_mask, cq_entries;
    struct hr_sqe *sqes;
    struct hr_cqe *cqes;
    void *rings;
    size_t rings_size, sqes_size;
    uint32_t tail; /* SQEs filled in, counted */
    /* the provided buffer ring */
    struct hr_buf *bufs;
    uint32_t buf_entries;
    uint16_t buf_tail;
};

static inline uint32_t hr_load(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void hr_store(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

/* The mappings must not reach a child: it could not use them, and the kernel would keep them alive there. */
static void *hr_map(int fd, size_t size, uint64_t offset) {
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)offset);
    if (p != MAP_FAILED) madvise(p, size, MADV_DONTFORK);
    return p;
}

static void hr_ring_close(struct hr_ring *r, int in_child) {
    if (!in_child) {
        if (r->sqes) munmap(r->sqes, r->sqes_size);
        if (r->rings) munmap(r->rings, r->rings_size);
        if (r->bufs) munmap(r->bufs, r->buf_entries * sizeof(struct hr_buf));
    }
    if (r->fd >= 0) close(r->fd);
    memset(r, 0, sizeof *r);
    r->fd = -1;
}

static int hr_ring_open(struct hr_ring *r, unsigned entries, unsigned cq_entries, uint32_t flags) {
    struct hr_params p;
    memset(&p, 0, sizeof p);
    memset(r, 0, sizeof *r);
    p.flags = flags | HR_SETUP_CQSIZE | HR_SETUP_CLAMP | HR_SETUP_SUBMIT_ALL;
    p.cq_entries = cq_entries;
    r->fd = (int)syscall(__NR_io_uring_setup, entries, &p);
    if (r->fd < 0) return -errno;
    r->setup_flags = p.flags;
    r->features = p.features;
    /* One mapping serves both queues (IORING_FEAT_SINGLE_MMAP, 5.4; everything here needs 6.0). */
    size_t sq_size = p.sq_off.array + ((p.flags & HR_SETUP_NO_SQARRAY) ? 0 : p.sq_entries * sizeof(uint32_t));
    size_t cq_size = p.cq_off.cqes + p.cq_entries * sizeof(struct hr_cqe);
    r->rings_size = sq_size > cq_size ? sq_size : cq_size;
    r->sqes_size = p.sq_entries * sizeof(struct hr_sqe);
    char *rings = hr_map(r->fd, r->rings_size, 0);
    if (rings == MAP_FAILED) { int e = errno; hr_ring_close(r, 0); return -e; }
    r->rings = rings;
    void *sqes = hr_map(r->fd, r->sqes_size, HR_OFF_SQES);
    if (sqes == MAP_FAILED) { int e = errno; hr_ring_close(r, 0); return -e; }
    r->sqes = sqes;
    r->sq_head = (uint32_t *)(rings + p.sq_off.head);
    r->sq_tail = (uint32_t *)(rings + p.sq_off.tail);
    r->sq_flags = (uint32_t *)(rings + p.sq_off.flags);
    r->sq_mask = *(uint32_t *)(rings + p.sq_off.ring_mask);
    r->sq_entries = p.sq_entries;
    r->cq_head = (uint32_t *)(rings + p.cq_off.head);
    r->cq_tail = (uint32_t *)(rings + p.cq_off.tail);
    r->cq_mask = *(uint32_t *)(rings + p.cq_off.ring_mask);
    r->cq_entries = p.cq_entries;
    r->cqes = (struct hr_cqe *)(rings + p.cq_off.cqes);
    if (!(p.flags & HR_SETUP_NO_SQARRAY)) {
        uint32_t *array = (uint32_t *)(rings + p.sq_off.array);
        for (uint32_t i = 0; i < p.sq_entries; i++) array[i] = i;
    }
    return 0;
}

/* SQEs that the kernel hasn't taken. */
static inline uint32_t hr_unsubmitted(struct hr_ring *r) { return r->tail - hr_load(r->sq_head); }

/* Submits what is filled in and, with `min` or `reap`, collects completions. timeout_ns < 0: none. */
static int hr_enter(struct hr_ring *r, unsigned min, int reap, int64_t timeout_ns) {
    struct hr_timespec ts;
    struct hr_getevents_arg arg;
    unsigned flags = reap ? HR_ENTER_GETEVENTS : 0;
    void *argp = NULL;
    size_t size = 0;
    uint32_t n = hr_unsubmitted(r);
    hr_store(r->sq_tail, r->tail);
    if (min && timeout_ns >= 0) {
        ts.tv_sec = timeout_ns / 1000000000;
        ts.tv_nsec = timeout_ns % 1000000000;
        memset(&arg, 0, sizeof arg);
        arg.ts = (uint64_t)(uintptr_t)&ts;
        argp = &arg;
        size = sizeof arg;
        flags |= HR_ENTER_EXT_ARG;
    }
    int ret = (int)syscall(__NR_io_uring_enter, r->fd, n, min, flags, argp, size);
    return ret < 0 ? -errno : ret;
}

/* A cleared SQE, or NULL when the queue is full. */
static inline struct hr_sqe *hr_sqe(struct hr_ring *r) {
    if (hr_unsubmitted(r) >= r->sq_entries) return NULL;
    struct hr_sqe *s = &r->sqes[r->tail & r->sq_mask];
    r->tail++;
    memset(s, 0, sizeof *s);
    return s;
}

static int hr_bufs_register(struct hr_ring *r, unsigned entries, int incremental) {
    struct hr_buf_reg reg;
    if (!r->bufs) {
        void *p = mmap(NULL, entries * sizeof(struct hr_buf), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (p == MAP_FAILED) return -errno;
        madvise(p, entries * sizeof(struct hr_buf), MADV_DONTFORK);
        r->bufs = p;
        r->buf_entries = entries;
    }
    memset(r->bufs, 0, entries * sizeof(struct hr_buf));
    r->buf_tail = 0;
    memset(&reg, 0, sizeof reg);
    reg.ring_addr = (uint64_t)(uintptr_t)r->bufs;
    reg.ring_entries = entries;
    reg.flags = incremental ? HR_PBUF_RING_INC : 0; /* where older headers have padding */
    return syscall(__NR_io_uring_register, r->fd, HR_REGISTER_PBUF_RING, &reg, 1) < 0 ? -errno : 0;
}

static int hr_bufs_unregister(struct hr_ring *r) {
    struct hr_buf_reg reg;
    memset(&reg, 0, sizeof reg);
    int ret = syscall(__NR_io_uring_register, r->fd, HR_UNREGISTER_PBUF_RING, &reg, 1) < 0 ? -errno : 0;
    if (r->bufs) munmap(r->bufs, r->buf_entries * sizeof(struct hr_buf));
    r->bufs = NULL;
    return ret;
}

/* Posts a buffer and publishes it. The ring's tail lives in the first entry's `resv`, which is left alone here. */
static inline void hr_bufs_post(struct hr_ring *r, void *memory, uint32_t size, uint16_t bid) {
    struct hr_buf *b = &r->bufs[r->buf_tail & (r->buf_entries - 1)];
    b->addr = (uint64_t)(uintptr_t)memory;
    b->len = size;
    b->bid = bid;
    r->buf_tail++;
    __atomic_store_n(&r->bufs[0].resv, r->buf_tail, __ATOMIC_RELEASE);
}

/* The opcodes that this kernel has, of the first 64: bit n stands for opcode n. */
static uint64_t hr_opcodes(struct hr_ring *r) {
    struct hr_probe probe;
    uint64_t found = 0;
    memset(&probe, 0, sizeof probe);
    if (syscall(__NR_io_uring_register, r->fd, HR_REGISTER_PROBE, &probe, 64) < 0) return 0;
    for (unsigned i = 0; i < 64 && i < probe.ops_len; i++)
        if (probe.ops[i].flags & HR_OP_SUPPORTED) found |= 1ULL << probe.ops[i].op;
    return found;
}

static int hr_eventfd(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }
static int hr_gettid(void) { return (int)syscall(SYS_gettid); }

#endif

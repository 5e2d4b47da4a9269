/* What the programs and their reader share: the maps' keys and values. `ebpf/layout.py` has the same in Python, and the
 * loader refuses a program whose sizes differ from it. Times are CLOCK_MONOTONIC nanoseconds. */
#pragma once

enum layer { DRIVER = 0, RUNTIME = 1, TENSORS = 2 /* PyTorch's caching allocator */ };

enum kind {
  DEVICE = 0,  /* memory of a GPU */
  HOST = 1,    /* page-locked memory of the host */
  MANAGED = 2, /* wanders between the two */
  VIRTUAL = 3, /* physical memory of a GPU from cuMemCreate */
  MAPPED = 4,  /* addresses to which cuMemMap gave physical memory: no memory of its own, never added to the others */
  UNKNOWN = 5, /* freed, but allocated before the probes were there */
};

enum op {
  OP_ALLOC = 0,
  OP_ALLOC_32, /* the first version of a call, with 32-bit addresses and sizes */
  OP_PITCH,
  OP_PITCH_32,
  OP_FREE,
  OP_CREATE,
  OP_MAP,
  OP_UNMAP,
  OP_RELEASE,
  OP_RETAIN,
  OP_CONTEXT_CREATE,
  OP_CONTEXT_DESTROY,
  OP_PRIMARY_RETAIN,
  OP_PRIMARY_RELEASE,
  OP_PRIMARY_RESET,
  OP_RUNTIME_RESET,
};

enum event_type { EVENT_FAILURE = 0, EVENT_LARGE = 1, EVENT_SAMPLE = 2, EVENT_EXEC = 3, EVENT_TYPES = 4 };

enum end_reason { ALIVE = 0, LEADER_EXITED = 1, EXECED = 2 };

/* What is counted when something could not be kept. */
enum loss {
  LOST_PROCESS = 0, /* the table of processes is full: its calls are not seen */
  LOST_CALL,        /* the table of threads is full: this call is not counted */
  LOST_TOTALS,      /* the table of sums is full: this call is not counted */
  LOST_LIVE,        /* the table of live allocations is full: this one is counted as allocated, not as live */
  LOST_FAILURE,     /* the table of failures by code is full */
  LOST_CONTEXT,     /* the tables of contexts are full: the allocation's context is unknown */
  LOST_STACK,       /* the table of stacks is full: the allocation has no stack */
  LOST_EVENT,       /* the ring is full */
  LOST_RESULT,      /* the address that a call had written could not be read */
  LOST_UNMAP,       /* one cuMemUnmap covered more mappings than are looked at */
  HELD_BACK,        /* + event type: more events in a second than are wanted */
  LOSSES = HELD_BACK + EVENT_TYPES,
};

#define SIZE_SLOTS 40    /* by power of two: slot n holds sizes above 2^(n-1) up to 2^n, the last one all above */
#define LATENCY_SLOTS 34 /* nanoseconds, likewise */
#define CONTEXT_DEPTH 8
#define STACK_DEPTH 31 /* frames kept of a stack, innermost first */
#define UNMAP_LIMIT 32

/* Bits of a live allocation's address: what the entry is. Addresses of user space have at most 57 bits. */
#define OF_RUNTIME (1ULL << 63)
#define OF_OBJECT (1ULL << 62)  /* the address is a handle of cuMemCreate */
#define OF_MAPPING (1ULL << 61) /* the address is one that cuMemMap mapped */
#define OF_TENSOR (1ULL << 60)  /* what PyTorch's allocator gave out: a part of memory that another entry holds */
#define OF_PRIMARY (1ULL << 63) /* a context's handle: the number of a device whose primary context it is */

struct settings {
  __u64 large_bytes;                /* allocations from this size on are told one by one */
  __u32 per_second[EVENT_TYPES];    /* most events of each type */
  __u32 only_listed;                /* trace only the processes in `filter` */
  __u32 stacks;                     /* note the user's stack of each allocation */
  __u64 second[EVENT_TYPES];        /* the program's own: the current one, and events told in it */
  __u64 taken[EVENT_TYPES];
};

/* processes: tgid -> */
struct process {
  __u64 id; /* tgid and time of the first call: names one life of one program */
  __u32 ignored;
  __u32 pad;
};

/* records: id -> */
struct record {
  __u64 first_ns;
  __u64 ended_ns;
  __u64 calls;
  __u64 spent_ns; /* in the programs; what the kernel needs to get there comes on top */
  __u64 lost;     /* of `enum loss`, what makes this process's ledger inexact */
  __u64 launches;
  __u64 graph_launches;
  __u64 driver_reset_ns;  /* allocations of unknown context until then went with the last context */
  __u64 runtime_reset_ns; /* allocations of the runtime's ledger until then went with cudaDeviceReset */
  __s64 contexts;
  __u32 tgid;
  __u32 reason;
  char comm[16];
};

struct live {
  __u64 size; /* 0: none */
  __u64 time_ns;
  __u64 context; /* number of the context; of a mapping: the object's handle */
  __s32 stack;   /* negative: none */
  __s16 device;  /* CUDA's ordinal in that process; -1: unknown */
  __u8 kind;
  __u8 pad;
  __u32 references; /* of an object: created and retained, less released */
  __u32 mappings;   /* of an object */
};

struct call {
  __u64 start_ns; /* 0: none is under way */
  __u64 sp;
  __u64 id;
  __u64 out; /* where the result is written */
  __u64 size;
  __u64 address;
  __u32 op;
  __u16 kind;
  __s16 device;
  struct live taken; /* what a free took out of the ledger when it began */
};

/* stacks: hash -> */
struct stack {
  __u64 depth; /* what lies behind it means nothing */
  __u64 addresses[STACK_DEPTH];
};

/* threads: tid and tgid -> what a thread that makes calls is at. Only the thread itself changes it. */
struct thread {
  __u64 id;
  __u64 calls;    /* booked, and not yet in its process's record */
  __u64 spent_ns;
  __u64 depth;
  __u64 handles[CONTEXT_DEPTH]; /* its contexts, the last one is current */
  struct call under_way[2];     /* by layer */
  __u64 ip, frame;              /* of the caller, when a call returns */
  __u64 known_stack;            /* the last that is in the table for certain */
  struct stack stack;           /* room to gather one */
};

/* Where a static probe's argument is, as the library's note says. */
enum place { IN_REGISTER = 0, IN_MEMORY = 1 /* at the register's address and `offset` */, IS_CONSTANT = 2 };

struct argument {
  __s64 offset;
  __u16 of_register; /* bytes from the beginning of the registers */
  __u8 place;
  __u8 unused_bits; /* of 64: those above the argument's size */
  __u32 pad;
};

#define SITES 512

/* sites: what the probe's cookie says -> */
struct site {
  struct argument address, size;
};

/* live: */
struct live_key {
  __u64 id;
  __u64 address;
};

/* totals: */
struct totals_key {
  __u64 id;
  __u64 context;
  __s16 device;
  __u8 layer;
  __u8 kind;
  __u32 pad;
};

struct totals {
  __u64 live_bytes;
  __u64 live_count;
  __u64 allocated_bytes;
  __u64 allocations;
  __u64 freed_bytes;
  __u64 frees;
  __u64 implicit_bytes; /* freed with their context */
  __u64 implicit_frees;
  __u64 allocate_ns;
  __u64 free_ns;
  __u64 sizes[SIZE_SLOTS];
  __u64 latencies[LATENCY_SLOTS]; /* of successful allocations */
};

/* failures: -> count */
struct failure_key {
  __u64 id;
  __u32 code;
  __u8 layer;
  __u8 kind;
  __u8 op;
  __u8 pad;
};

/* contexts: */
struct context_key {
  __u64 id;
  __u64 handle;
};

struct context {
  __u64 number; /* of an OF_PRIMARY key: the handle */
  __s32 device;
  __u32 retained;
};

struct event {
  __u64 time_ns;
  __u64 id;
  __u64 address;
  __u64 size;
  __u64 latency_ns;
  __u32 tgid;
  __u32 tid;
  __s32 stack;
  __u32 code;
  __u8 type;
  __u8 op;
  __u8 kind;
  __u8 layer;
  __s16 device;
  __u16 pad;
};

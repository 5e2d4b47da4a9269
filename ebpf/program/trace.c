/* Keeps the ledger of CUDA memory in the kernel: what each process allocated and has not freed, by the calls that it
 * makes into libcuda (and, apart from that, libcudart).
 *
 * A probe at a function's entry notes the call, the probe at its return books it if it succeeded. Rules that keep the
 * ledger exact:
 * - a call is known by thread, layer and stack pointer: what the library calls within itself is not counted twice, and a
 *   call that never returned (a signal handler that jumped, a thread that ended) is told from a nested one;
 * - a free takes its allocation out of the ledger when it begins and puts it back if it fails, because another thread may
 *   be given the same address before the free's return is seen;
 * - physical memory (cuMemCreate) is freed when its last handle is released and its last mapping undone;
 * - a process's life is named by tgid and time, so that exec and a reused pid begin anew.
 *
 * This file may be used under the Apache License 2.0, the MIT License or the GNU General Public License 2.0: the kernel
 * gives some helpers only to programs that the last one allows.
 */
#include "dialect.h"
#include "layout.h"

DECLARE_MAP(settings, BPF_MAP_TYPE_ARRAY, __u32, struct settings)
DECLARE_MAP(filter, BPF_MAP_TYPE_HASH, __u32, __u32)
DECLARE_MAP(processes, BPF_MAP_TYPE_HASH, __u32, struct process)
DECLARE_MAP(records, BPF_MAP_TYPE_HASH, __u64, struct record)
DECLARE_MAP(threads, BPF_MAP_TYPE_HASH, __u64, struct thread)
DECLARE_MAP(no_thread, BPF_MAP_TYPE_ARRAY, __u32, struct thread)
DECLARE_MAP(live, BPF_MAP_TYPE_HASH, struct live_key, struct live)
DECLARE_MAP(totals, BPF_MAP_TYPE_HASH, struct totals_key, struct totals)
DECLARE_MAP(nothing, BPF_MAP_TYPE_ARRAY, __u32, struct totals)
DECLARE_MAP(failures, BPF_MAP_TYPE_HASH, struct failure_key, __u64)
DECLARE_MAP(contexts, BPF_MAP_TYPE_HASH, struct context_key, struct context)
DECLARE_MAP(destroyed, BPF_MAP_TYPE_HASH, __u64, __u64)
DECLARE_MAP(losses, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64)
DECLARE_MAP(stacks, BPF_MAP_TYPE_HASH, __u32, struct stack)
DECLARE_MAP(sites, BPF_MAP_TYPE_ARRAY, __u32, struct site)
DECLARE_MAP(events, BPF_MAP_TYPE_RINGBUF, __u32, __u32)

#define ADD(field, amount) __sync_fetch_and_add(&(field), (amount))
#define LOOKUP(name, key) bpf_map_lookup_elem(MAP(name), key)
#define STORE(name, key, value) bpf_map_update_elem(MAP(name), key, value, BPF_ANY)
#define STORE_NEW(name, key, value) bpf_map_update_elem(MAP(name), key, value, BPF_NOEXIST)
#define REMOVE(name, key) bpf_map_delete_elem(MAP(name), key)

INLINE void count_loss(__u32 what) {
  __u64 *counter = LOOKUP(losses, &what);
  if (counter)
    *counter += 1; /* each processor has its own */
}

INLINE void count_loss_of(__u64 id, __u32 what) {
  struct record *record = LOOKUP(records, &id);
  if (record)
    ADD(record->lost, 1);
  count_loss(what);
}

#define MEASURED 15 /* one call in sixteen of a thread is timed, its first among them */

/* Who calls */

INLINE __u64 first_call(__u32 tgid) {
  __u32 zero = 0;
  struct settings *settings = LOOKUP(settings, &zero);
  if (!settings)
    return 0;
  if (settings->only_listed && !LOOKUP(filter, &tgid))
    return 0;
  __u64 now = bpf_ktime_get_ns();
  struct process process = {};
  process.id = (__u64)tgid << 32 | (__u32)(now >> 16);
  struct record record = {};
  record.first_ns = now;
  record.tgid = tgid;
  bpf_get_current_comm(record.comm, sizeof(record.comm));
  if (STORE_NEW(records, &process.id, &record)) {
    count_loss(LOST_PROCESS);
    return 0;
  }
  if (STORE_NEW(processes, &tgid, &process)) {
    REMOVE(records, &process.id);
    struct process *other = LOOKUP(processes, &tgid); /* another thread was first */
    if (other)
      return other->id;
    count_loss(LOST_PROCESS);
    return 0;
  }
  return process.id;
}

INLINE __u64 caller(__u64 who) {
  __u32 tgid = who >> 32;
  struct process *process = LOOKUP(processes, &tgid);
  if (process)
    return process->ignored ? 0 : process->id;
  return first_call(tgid);
}

/* The calling thread, if its process is traced. Found by one look for all calls but the first. */
INLINE struct thread *this_thread(__u64 who) {
  struct thread *thread = LOOKUP(threads, &who);
  if (thread)
    return thread;
  __u64 id = caller(who);
  if (!id)
    return 0;
  __u32 zero = 0;
  struct thread *nothing = LOOKUP(no_thread, &zero);
  if (nothing)
    STORE_NEW(threads, &who, nothing);
  thread = LOOKUP(threads, &who);
  if (!thread) {
    count_loss_of(id, LOST_CALL);
    return 0;
  }
  thread->id = id;
  return thread;
}

/* Sums */

/* Floor of the binary logarithm, without a branch: the verifier follows each branch, and this stands in the middle. */
INLINE __u32 log2_slot(__u64 value, __u32 slots) {
  value |= value >> 1;
  value |= value >> 2;
  value |= value >> 4;
  value |= value >> 8;
  value |= value >> 16;
  value |= value >> 32;
  value -= value >> 1 & 0x5555555555555555ULL; /* now count the bits */
  value = (value & 0x3333333333333333ULL) + (value >> 2 & 0x3333333333333333ULL);
  value = (value + (value >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
  value = (value * 0x0101010101010101ULL >> 56) - 1;
  return value < slots ? value : slots - 1;
}

INLINE struct totals *totals_of(__u64 id, __u64 context, __s16 device, __u8 layer, __u8 kind) {
  struct totals_key key = {};
  key.id = id;
  key.context = context;
  key.device = device;
  key.layer = layer;
  key.kind = kind;
  struct totals *totals = LOOKUP(totals, &key);
  if (totals)
    return totals;
  __u32 zero = 0;
  struct totals *nothing = LOOKUP(nothing, &zero);
  if (!nothing)
    return 0;
  STORE_NEW(totals, &key, nothing);
  totals = LOOKUP(totals, &key);
  if (!totals)
    count_loss_of(id, LOST_TOTALS);
  return totals;
}

/* The sums of a live entry; a mapping's `context` is a handle and no context. */
INLINE struct totals *totals_of_live(__u64 id, struct live *live, __u8 layer) {
  return totals_of(id, live->kind == MAPPED ? 0 : live->context, live->device, layer, live->kind);
}

INLINE void book_free(__u64 id, struct live *live, __u8 layer, __u64 ns) {
  struct totals *totals = totals_of_live(id, live, layer);
  if (!totals)
    return;
  ADD(totals->live_bytes, -live->size);
  ADD(totals->live_count, -1);
  ADD(totals->freed_bytes, live->size);
  ADD(totals->frees, 1);
  ADD(totals->free_ns, ns);
}

/* `full`: its entry could not be kept. */
INLINE struct totals *book_allocation(__u64 id, struct live *live, __u8 layer, long full) {
  struct totals *totals = totals_of_live(id, live, layer);
  if (!totals)
    return 0;
  ADD(totals->allocated_bytes, live->size);
  ADD(totals->allocations, 1);
  if (full) {
    count_loss_of(id, LOST_LIVE);
  } else {
    ADD(totals->live_bytes, live->size);
    ADD(totals->live_count, 1);
  }
  return totals;
}

INLINE void book_unknown_free(__u64 id, __u8 layer, __u64 ns) {
  struct totals *totals = totals_of(id, 0, -1, layer, UNKNOWN);
  if (!totals)
    return;
  ADD(totals->frees, 1);
  ADD(totals->free_ns, ns);
}

/* Whether the allocation went with its context already, and only its entry is still there. */
INLINE int went_with_context(__u64 id, struct live *live, __u8 layer) {
  if (live->kind > MANAGED)
    return 0;
  if (layer == DRIVER && live->context)
    return LOOKUP(destroyed, &live->context) != 0;
  struct record *record = LOOKUP(records, &id);
  if (!record)
    return 0;
  return live->time_ns <= (layer == DRIVER ? record->driver_reset_ns : record->runtime_reset_ns);
}

/* Events */

INLINE int may_tell(struct settings *settings, __u32 type, __u64 now) {
  if (type >= EVENT_TYPES)
    return 0;
  __u64 second = now >> 30;
  if (settings->second[type] != second) {
    settings->second[type] = second;
    settings->taken[type] = 0;
  }
  if (settings->taken[type] >= settings->per_second[type]) {
    if (type != EVENT_SAMPLE)
      count_loss(HELD_BACK + type);
    return 0;
  }
  ADD(settings->taken[type], 1);
  return 1;
}

INLINE struct event *new_event(struct settings *settings, __u32 type, __u64 now, __u64 id, __u64 who) {
  if (!may_tell(settings, type, now))
    return 0;
  struct event *event = bpf_ringbuf_reserve(MAP(events), sizeof(struct event), 0);
  if (!event) {
    count_loss(LOST_EVENT);
    return 0;
  }
  __builtin_memset(event, 0, sizeof(*event));
  event->time_ns = now;
  event->id = id;
  event->tgid = who >> 32;
  event->tid = (__u32)who;
  event->type = type;
  event->stack = -1;
  event->device = -1;
  return event;
}

/* The caller's stack, by its frame pointers. The kernel's own walk takes three times as long. */
INLINE __s32 stack_of(struct thread *thread, struct settings *settings) {
  if (!settings->stacks)
    return -1;
  __u64 frame[2], at = thread->frame, depth = 1;
  __u64 hash = (0xcbf29ce484222325ULL ^ thread->ip) * 0x100000001b3ULL; /* FNV-1a, by words */
  thread->stack.addresses[0] = thread->ip;
  for (int i = 1; i < STACK_DEPTH; i++) {
    if (bpf_probe_read_user(frame, sizeof(frame), (void *)at) || !frame[1])
      break;
    thread->stack.addresses[i] = frame[1];
    depth += 1;
    hash = (hash ^ frame[1]) * 0x100000001b3ULL;
    if (frame[0] <= at) /* stacks grow downwards: no frame pointer */
      break;
    at = frame[0];
  }
  if (hash == thread->known_stack)
    return (hash ^ hash >> 32) & 0x7fffffff;
  __u32 id = (hash ^ hash >> 32) & 0x7fffffff;
  thread->stack.depth = depth;
  if (!LOOKUP(stacks, &id) && STORE_NEW(stacks, &id, &thread->stack) && !LOOKUP(stacks, &id)) {
    count_loss(LOST_STACK);
    return -1;
  }
  thread->known_stack = hash;
  return id;
}

/* Contexts */

INLINE struct context *context_of(__u64 id, __u64 handle, __s32 device) {
  struct context_key key = {};
  key.id = id;
  key.handle = handle;
  struct context *context = LOOKUP(contexts, &key);
  if (!context) {
    struct context fresh = {};
    fresh.number = bpf_ktime_get_ns();
    fresh.device = device;
    STORE_NEW(contexts, &key, &fresh);
    context = LOOKUP(contexts, &key);
    if (!context) {
      count_loss(LOST_CONTEXT);
      return 0;
    }
    struct record *record = LOOKUP(records, &id);
    if (record)
      ADD(record->contexts, 1);
  }
  if (context->device < 0)
    context->device = device;
  return context;
}

INLINE void set_current(struct thread *thread, __u64 handle, int push) {
  __u64 depth = thread->depth;
  if (push || !depth)
    depth += 1;
  thread->depth = depth;
  if (depth >= 1 && depth <= CONTEXT_DEPTH)
    thread->handles[(depth - 1) & (CONTEXT_DEPTH - 1)] = handle;
}

INLINE void pop_current(struct thread *thread) {
  if (thread->depth)
    thread->depth -= 1;
}

INLINE __u64 current_handle(struct thread *thread) {
  __u64 depth = thread->depth;
  if (!depth || depth > CONTEXT_DEPTH)
    return 0;
  return thread->handles[(depth - 1) & (CONTEXT_DEPTH - 1)];
}

INLINE void free_with_context(__u64 id, __u64 number, __s16 device, __u8 layer) {
  for (int kind = DEVICE; kind <= MANAGED; kind++) {
    struct totals_key key = {};
    key.id = id;
    key.context = number;
    key.device = device;
    key.layer = layer;
    key.kind = kind;
    struct totals *totals = LOOKUP(totals, &key);
    if (!totals)
      continue;
    __u64 bytes = totals->live_bytes, count = totals->live_count;
    ADD(totals->implicit_bytes, bytes);
    ADD(totals->implicit_frees, count);
    ADD(totals->live_bytes, -bytes);
    ADD(totals->live_count, -count);
  }
}

INLINE void destroy_context(__u64 id, __u64 handle, __u64 now) {
  struct context_key key = {};
  key.id = id;
  key.handle = handle;
  struct context *context = LOOKUP(contexts, &key);
  if (!context)
    return;
  __u64 number = context->number;
  __s32 device = context->device;
  REMOVE(contexts, &key);
  if (STORE(destroyed, &number, &now))
    count_loss_of(id, LOST_CONTEXT);
  free_with_context(id, number, device, DRIVER);
  if (device >= 0)
    free_with_context(id, number, -1, DRIVER);
  struct record *record = LOOKUP(records, &id);
  if (!record)
    return;
  ADD(record->contexts, -1);
  if (record->contexts <= 0) {
    free_with_context(id, 0, -1, DRIVER);
    record->driver_reset_ns = now;
  }
}

INLINE void primary_retained(__u64 id, __u64 handle, __s32 device) {
  struct context *context = context_of(id, handle, device);
  if (!context)
    return;
  context->retained += 1;
  struct context_key key = {};
  key.id = id;
  key.handle = OF_PRIMARY | (__u32)device;
  struct context primary = {};
  primary.number = handle;
  primary.device = device;
  STORE(contexts, &key, &primary);
}

INLINE void primary_released(__u64 id, __s32 device, __u64 now, int all) {
  struct context_key key = {};
  key.id = id;
  key.handle = OF_PRIMARY | (__u32)device;
  struct context *primary = LOOKUP(contexts, &key);
  if (!primary)
    return; /* retained before the probes were there: how often is not known */
  __u64 handle = primary->number;
  key.handle = handle;
  struct context *context = LOOKUP(contexts, &key);
  if (!context)
    return;
  if (!all) {
    if (context->retained > 1) {
      context->retained -= 1;
      return;
    }
    if (!context->retained)
      return;
  }
  destroy_context(id, handle, now);
}

/* Live allocations */

INLINE void put_back(__u64 id, __u64 address, __u8 layer, struct live *taken) {
  if (!taken->size)
    return;
  struct live_key key = {};
  key.id = id;
  key.address = address;
  if (layer == RUNTIME)
    key.address |= OF_RUNTIME;
  STORE_NEW(live, &key, taken);
}

/* Ends a call that will not return. */
INLINE void abandon(struct call *call, __u8 layer) {
  if (call->op == OP_FREE)
    put_back(call->id, call->address, layer, &call->taken);
}

INLINE void unmap_one(__u64 id, struct live *mapping, __u64 ns) {
  book_free(id, mapping, DRIVER, ns);
  struct live_key key = {};
  key.id = id;
  key.address = OF_OBJECT | mapping->context;
  struct live *object = LOOKUP(live, &key);
  if (!object || object->time_ns > mapping->time_ns || !object->mappings)
    return; /* unknown, or another object to which the same handle was given meanwhile */
  object->mappings -= 1;
  if (!object->mappings && !object->references) {
    struct live gone = *object;
    REMOVE(live, &key);
    gone.context = 0;
    book_free(id, &gone, DRIVER, 0);
  }
}

INLINE void allocated(struct thread *thread, struct call *call, __u8 layer, __u64 address, __u64 now) {
  __u32 zero = 0;
  struct settings *settings = LOOKUP(settings, &zero);
  if (!settings)
    return;
  struct live fresh = {};
  fresh.size = call->size;
  fresh.time_ns = now;
  fresh.kind = call->kind;
  fresh.device = call->device;
  struct live_key key = {};
  key.id = call->id;
  key.address = address;
  if (layer == RUNTIME)
    key.address |= OF_RUNTIME;
  if (call->op == OP_CREATE) {
    key.address |= OF_OBJECT;
    fresh.references = 1;
  } else if (call->op == OP_MAP) {
    key.address |= OF_MAPPING;
    fresh.context = call->out; /* the handle */
    struct live_key of_object = {};
    of_object.id = call->id;
    of_object.address = OF_OBJECT | call->out;
    struct live *object = LOOKUP(live, &of_object);
    if (object) {
      object->mappings += 1;
      fresh.device = object->device;
    }
  } else if (layer == DRIVER) {
    __u64 handle = current_handle(thread);
    if (handle) {
      struct context *context = context_of(call->id, handle, -1);
      if (context) {
        fresh.context = context->number;
        if (fresh.kind == DEVICE || fresh.kind == MANAGED)
          fresh.device = context->device;
      }
    }
  }
  fresh.stack = stack_of(thread, settings);

  long full = STORE_NEW(live, &key, &fresh);
  if (full) {
    struct live *old = LOOKUP(live, &key);
    if (old) { /* given anew, so it has been freed: by a call whose return comes later, or an unseen one */
      if (call->op == OP_MAP)
        unmap_one(call->id, old, 0);
      else if (!went_with_context(call->id, old, layer))
        book_free(call->id, old, layer, 0);
      full = STORE(live, &key, &fresh);
    }
  }
  __u64 ns = now - call->start_ns;
  struct totals *totals = book_allocation(call->id, &fresh, layer, full);
  if (!totals)
    return;
  ADD(totals->allocate_ns, ns);
  __u32 slot = log2_slot((fresh.size - 1) << 1 | 1, SIZE_SLOTS);
  if (slot < SIZE_SLOTS)
    ADD(totals->sizes[slot], 1);
  slot = log2_slot((ns - 1) << 1 | 1, LATENCY_SLOTS);
  if (slot < LATENCY_SLOTS)
    ADD(totals->latencies[slot], 1);

  if (call->op == OP_MAP)
    return;
  struct event *event = new_event(settings, fresh.size >= settings->large_bytes ? EVENT_LARGE : EVENT_SAMPLE, now,
                                  call->id, bpf_get_current_pid_tgid());
  if (!event)
    return;
  event->address = address;
  event->size = fresh.size;
  event->latency_ns = ns;
  event->stack = fresh.stack;
  event->op = call->op;
  event->kind = fresh.kind;
  event->layer = layer;
  event->device = fresh.device;
  bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}

INLINE void failed(struct thread *thread, struct call *call, __u64 who, __u8 layer, __u32 code, __u64 now) {
  struct failure_key key = {};
  key.id = call->id;
  key.code = code;
  key.layer = layer;
  key.kind = call->kind;
  key.op = call->op;
  __u64 *count = LOOKUP(failures, &key);
  if (!count) {
    __u64 none = 0;
    STORE_NEW(failures, &key, &none);
    count = LOOKUP(failures, &key);
  }
  if (count)
    ADD(*count, 1);
  else
    count_loss(LOST_FAILURE);
  __u32 zero = 0;
  struct settings *settings = LOOKUP(settings, &zero);
  struct event *event = settings ? new_event(settings, EVENT_FAILURE, now, call->id, who) : 0;
  if (!event)
    return;
  event->address = call->address;
  event->size = call->size;
  event->latency_ns = now - call->start_ns;
  event->code = code;
  event->op = call->op;
  event->kind = call->kind;
  event->layer = layer;
  event->device = call->device;
  event->stack = stack_of(thread, settings);
  bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}

/* Entry and return of any function */

INLINE void enter(void *ctx, __u64 sp, __u8 layer, struct call *call) {
  __u64 now = bpf_ktime_get_ns();
  struct thread *thread = this_thread(bpf_get_current_pid_tgid());
  if (!thread)
    return;
  struct call *old = &thread->under_way[layer];
  if (old->start_ns) {
    if (sp < old->sp)
      return; /* within a call that is counted */
    abandon(old, layer);
  }
  call->start_ns = now;
  call->sp = sp;
  call->id = thread->id;
  if (call->op == OP_FREE) {
    struct live_key live_key = {};
    live_key.id = call->id;
    live_key.address = call->address;
    if (layer == RUNTIME)
      live_key.address |= OF_RUNTIME;
    struct live *live = LOOKUP(live, &live_key);
    if (live) {
      call->taken = *live;
      REMOVE(live, &live_key);
    }
  }
  *old = *call;
  if (!(thread->calls & MEASURED)) /* which the return then makes 1 */
    thread->spent_ns += (bpf_ktime_get_ns() - now) * (MEASURED + 1);
}

INLINE void release_object(struct call *call, __u64 ns) {
  struct live_key key = {};
  key.id = call->id;
  key.address = OF_OBJECT | call->address;
  struct live *object = LOOKUP(live, &key);
  if (!object || !object->references) {
    book_unknown_free(call->id, DRIVER, ns);
    return;
  }
  if (object->time_ns > call->start_ns)
    return; /* made after this release began, of the same handle */
  object->references -= 1;
  if (!object->references && !object->mappings) {
    struct live gone = *object;
    REMOVE(live, &key);
    gone.context = 0;
    book_free(call->id, &gone, DRIVER, ns);
  }
}

INLINE void unmap(struct call *call, __u64 ns) {
  __u64 address = call->address, end = call->address + call->size;
  for (int i = 0; i < UNMAP_LIMIT; i++) {
    struct live_key key = {};
    key.id = call->id;
    key.address = OF_MAPPING | address;
    struct live *mapping = LOOKUP(live, &key);
    if (!mapping) {
      book_unknown_free(call->id, DRIVER, 0);
      return;
    }
    struct live gone = *mapping;
    address += gone.size;
    if (gone.time_ns <= call->start_ns) { /* else mapped anew meanwhile, and this one was booked then */
      REMOVE(live, &key);
      unmap_one(call->id, &gone, i ? 0 : ns);
    }
    if (address >= end || !gone.size)
      return;
  }
  count_loss_of(call->id, LOST_UNMAP);
}

/* Finds the call that returns and books its failure. Null if there is nothing left to do. */
INLINE struct thread *returning(__u64 sp, __u64 ip, __u64 frame, __u32 result, __u8 layer, struct call *call, __u64 *now) {
  __u64 who = bpf_get_current_pid_tgid();
  struct thread *thread = LOOKUP(threads, &who);
  if (!thread)
    return 0;
  struct call *found = &thread->under_way[layer];
  if (!found->start_ns || sp != found->sp + RETURN_POPS)
    return 0; /* of a call within another one, or of one that began before the probes were there */
  *call = *found;
  found->start_ns = 0;
  *now = bpf_ktime_get_ns();
  thread->ip = ip;
  thread->frame = frame;
  thread->calls += 1;
  if (!result)
    return thread;
  abandon(call, layer);
  failed(thread, call, who, layer, result, *now);
  return 0;
}

INLINE int booked(struct thread *thread, __u64 since) {
  if ((thread->calls & MEASURED) == 1)
    thread->spent_ns += (bpf_ktime_get_ns() - since) * (MEASURED + 1);
  return 0;
}

INLINE int leave_alloc(__u64 sp, __u64 ip, __u64 frame, __u32 result, __u8 layer) {
  struct call call;
  __u64 now, address = 0, pitch = 0;
  struct thread *thread = returning(sp, ip, frame, result, layer, &call, &now);
  if (!thread)
    return 0;
  int is_32 = call.op == OP_ALLOC_32 || call.op == OP_PITCH_32;
  int is_pitch = call.op == OP_PITCH || call.op == OP_PITCH_32;
  long missing = bpf_probe_read_user(&address, is_32 ? 4 : 8, (void *)call.out);
  if (is_pitch) {
    missing |= bpf_probe_read_user(&pitch, is_32 ? 4 : 8, (void *)call.address);
    call.size *= pitch;
  }
  if (missing)
    count_loss_of(call.id, LOST_RESULT);
  else if (address && call.size)
    allocated(thread, &call, layer, address, now);
  return booked(thread, now);
}

INLINE int leave_free(__u64 sp, __u64 ip, __u64 frame, __u32 result, __u8 layer) {
  struct call call;
  __u64 now;
  struct thread *thread = returning(sp, ip, frame, result, layer, &call, &now);
  if (!thread)
    return 0;
  if (!call.taken.size) {
    if (call.address)
      book_unknown_free(call.id, layer, now - call.start_ns);
  } else if (!went_with_context(call.id, &call.taken, layer)) {
    book_free(call.id, &call.taken, layer, now - call.start_ns);
  }
  return booked(thread, now);
}

PROBE(left_alloc) { return leave_alloc(STACK_POINTER(ctx), INSTRUCTION(ctx), FRAME(ctx), RESULT(ctx), DRIVER); }
PROBE(left_free) { return leave_free(STACK_POINTER(ctx), INSTRUCTION(ctx), FRAME(ctx), RESULT(ctx), DRIVER); }
PROBE(runtime_left_alloc) { return leave_alloc(STACK_POINTER(ctx), INSTRUCTION(ctx), FRAME(ctx), RESULT(ctx), RUNTIME); }
PROBE(runtime_left_free) { return leave_free(STACK_POINTER(ctx), INSTRUCTION(ctx), FRAME(ctx), RESULT(ctx), RUNTIME); }

PROBE(runtime_left_reset) {
  struct call call;
  __u64 now;
  struct thread *thread = returning(STACK_POINTER(ctx), INSTRUCTION(ctx), FRAME(ctx), RESULT(ctx), RUNTIME, &call, &now);
  if (!thread)
    return 0;
  free_with_context(call.id, 0, -1, RUNTIME);
  struct record *record = LOOKUP(records, &call.id);
  if (record)
    record->runtime_reset_ns = now;
  return booked(thread, now);
}

PROBE(left_map) {
  struct call call;
  __u64 now;
  struct thread *thread = returning(STACK_POINTER(ctx), INSTRUCTION(ctx), FRAME(ctx), RESULT(ctx), DRIVER, &call, &now);
  if (!thread)
    return 0;
  if (call.size)
    allocated(thread, &call, DRIVER, call.address, now);
  return booked(thread, now);
}

PROBE(left_unmap) {
  struct call call;
  __u64 now;
  struct thread *thread = returning(STACK_POINTER(ctx), INSTRUCTION(ctx), FRAME(ctx), RESULT(ctx), DRIVER, &call, &now);
  if (!thread)
    return 0;
  unmap(&call, now - call.start_ns);
  return booked(thread, now);
}

PROBE(left_handle) {
  struct call call;
  __u64 now, handle = 0;
  struct thread *thread = returning(STACK_POINTER(ctx), INSTRUCTION(ctx), FRAME(ctx), RESULT(ctx), DRIVER, &call, &now);
  if (!thread)
    return 0;
  if (call.op == OP_RELEASE) {
    release_object(&call, now - call.start_ns);
  } else if (!bpf_probe_read_user(&handle, 8, (void *)call.out)) {
    struct live_key key = {};
    key.id = call.id;
    key.address = OF_OBJECT | handle;
    struct live *object = LOOKUP(live, &key);
    if (object)
      object->references += 1;
  }
  return booked(thread, now);
}

PROBE(left_context) {
  struct call call;
  __u64 now, handle = 0;
  struct thread *thread = returning(STACK_POINTER(ctx), INSTRUCTION(ctx), FRAME(ctx), RESULT(ctx), DRIVER, &call, &now);
  if (!thread)
    return 0;
  if (call.out && bpf_probe_read_user(&handle, 8, (void *)call.out)) {
    count_loss_of(call.id, LOST_RESULT);
  } else if (call.op == OP_CONTEXT_CREATE) {
    context_of(call.id, handle, call.device);
    set_current(thread, handle, 1);
  } else if (call.op == OP_CONTEXT_DESTROY) {
    if (current_handle(thread) == call.address)
      pop_current(thread);
    destroy_context(call.id, call.address, now);
  } else if (call.op == OP_PRIMARY_RETAIN) {
    primary_retained(call.id, handle, call.device);
  } else {
    primary_released(call.id, call.device, now, call.op == OP_PRIMARY_RESET);
  }
  return booked(thread, now);
}

INLINE int enter_alloc(void *ctx, __u64 sp, __u8 layer, __u32 op, __u16 kind, __u64 out, __u64 size) {
  struct call call = {};
  call.op = op;
  call.kind = kind;
  call.out = out;
  call.size = size;
  call.device = -1;
  enter(ctx, sp, layer, &call);
  return 0;
}

INLINE int enter_pitch(void *ctx, __u64 sp, __u8 layer, __u32 op, __u64 out, __u64 pitch, __u64 height) {
  struct call call = {};
  call.op = op;
  call.kind = DEVICE;
  call.out = out;
  call.address = pitch;
  call.size = height;
  call.device = -1;
  enter(ctx, sp, layer, &call);
  return 0;
}

INLINE int enter_address(void *ctx, __u64 sp, __u8 layer, __u32 op, __u16 kind, __u64 address, __u64 size, __u64 out) {
  struct call call = {};
  call.op = op;
  call.kind = kind;
  call.address = address;
  call.size = size;
  call.out = out;
  call.device = -1;
  enter(ctx, sp, layer, &call);
  return 0;
}

INLINE int enter_device(void *ctx, __u64 sp, __u32 op, __u64 out, __s32 device) {
  struct call call = {};
  call.op = op;
  call.kind = UNKNOWN;
  call.out = out;
  call.device = device;
  enter(ctx, sp, DRIVER, &call);
  return 0;
}

/* One program for each way of passing arguments; `ebpf/symbols.py` says which functions use which. */

/* (address *out, size_t size, …) */
PROBE(alloc_device) { return enter_alloc(ctx, STACK_POINTER(ctx), DRIVER, OP_ALLOC, DEVICE, ARG1(ctx), ARG2(ctx)); }
PROBE(alloc_managed) { return enter_alloc(ctx, STACK_POINTER(ctx), DRIVER, OP_ALLOC, MANAGED, ARG1(ctx), ARG2(ctx)); }
PROBE(alloc_host) { return enter_alloc(ctx, STACK_POINTER(ctx), DRIVER, OP_ALLOC, HOST, ARG1(ctx), ARG2(ctx)); }
/* (uint32_t *out, unsigned size) */
PROBE(alloc_device_32) {
  return enter_alloc(ctx, STACK_POINTER(ctx), DRIVER, OP_ALLOC_32, DEVICE, ARG1(ctx), (__u32)ARG2(ctx));
}
/* (void **out, unsigned size) */
PROBE(alloc_host_32) {
  return enter_alloc(ctx, STACK_POINTER(ctx), DRIVER, OP_ALLOC, HOST, ARG1(ctx), (__u32)ARG2(ctx));
}
/* (address *out, size_t *pitch, size_t width, size_t height, …) */
PROBE(alloc_pitch) {
  return enter_pitch(ctx, STACK_POINTER(ctx), DRIVER, OP_PITCH, ARG1(ctx), ARG2(ctx), ARG4(ctx));
}
PROBE(alloc_pitch_32) {
  return enter_pitch(ctx, STACK_POINTER(ctx), DRIVER, OP_PITCH_32, ARG1(ctx), ARG2(ctx), (__u32)ARG4(ctx));
}
PROBE(free_address) { return enter_address(ctx, STACK_POINTER(ctx), DRIVER, OP_FREE, UNKNOWN, ARG1(ctx), 0, 0); }
PROBE(free_address_32) {
  return enter_address(ctx, STACK_POINTER(ctx), DRIVER, OP_FREE, UNKNOWN, (__u32)ARG1(ctx), 0, 0);
}

/* cuMemCreate(handle *, size_t, const CUmemAllocationProp *, flags): the location stands in the third and fourth word */
PROBE(create) {
  struct {
    __s32 type, id;
  } location = {};
  struct call call = {};
  call.op = OP_CREATE;
  call.out = ARG1(ctx);
  call.size = ARG2(ctx);
  bpf_probe_read_user(&location, sizeof(location), (void *)(ARG3(ctx) + 8));
  call.kind = location.type <= 1 ? VIRTUAL : HOST; /* CU_MEM_LOCATION_TYPE_DEVICE is 1, those of the host follow */
  call.device = location.type <= 1 ? location.id : -1;
  enter(ctx, STACK_POINTER(ctx), DRIVER, &call);
  return 0;
}
/* cuMemMap(address, size, offset, handle, flags) */
PROBE(map) {
  return enter_address(ctx, STACK_POINTER(ctx), DRIVER, OP_MAP, MAPPED, ARG1(ctx), ARG2(ctx), ARG4(ctx));
}
/* cuMemUnmap(address, size) */
PROBE(unmap_range) { return enter_address(ctx, STACK_POINTER(ctx), DRIVER, OP_UNMAP, MAPPED, ARG1(ctx), ARG2(ctx), 0); }
/* cuMemRelease(handle) */
PROBE(release) { return enter_address(ctx, STACK_POINTER(ctx), DRIVER, OP_RELEASE, VIRTUAL, ARG1(ctx), 0, 0); }
/* cuMemRetainAllocationHandle(handle *, void *address) */
PROBE(retain) { return enter_address(ctx, STACK_POINTER(ctx), DRIVER, OP_RETAIN, VIRTUAL, ARG2(ctx), 0, ARG1(ctx)); }

/* cuCtxCreate and _v2(ctx *, flags, device) · _v3(ctx *, params, count, flags, device) · _v4(ctx *, params, flags, device) */
PROBE(context_create) { return enter_device(ctx, STACK_POINTER(ctx), OP_CONTEXT_CREATE, ARG1(ctx), ARG3(ctx)); }
PROBE(context_create_v3) { return enter_device(ctx, STACK_POINTER(ctx), OP_CONTEXT_CREATE, ARG1(ctx), ARG5(ctx)); }
PROBE(context_create_v4) { return enter_device(ctx, STACK_POINTER(ctx), OP_CONTEXT_CREATE, ARG1(ctx), ARG4(ctx)); }
PROBE(context_destroy) {
  return enter_address(ctx, STACK_POINTER(ctx), DRIVER, OP_CONTEXT_DESTROY, UNKNOWN, ARG1(ctx), 0, 0);
}
/* cuDevicePrimaryCtxRetain(ctx *, device) · Release, Reset(device) */
PROBE(primary_retain) { return enter_device(ctx, STACK_POINTER(ctx), OP_PRIMARY_RETAIN, ARG1(ctx), ARG2(ctx)); }
PROBE(primary_release) { return enter_device(ctx, STACK_POINTER(ctx), OP_PRIMARY_RELEASE, 0, ARG1(ctx)); }
PROBE(primary_reset) { return enter_device(ctx, STACK_POINTER(ctx), OP_PRIMARY_RESET, 0, ARG1(ctx)); }

/* Calls that are frequent and hardly ever fail: no probe at their return. */
INLINE int switch_context(__u64 handle, int push) {
  __u64 now = bpf_ktime_get_ns();
  struct thread *thread = this_thread(bpf_get_current_pid_tgid());
  if (!thread)
    return 0;
  set_current(thread, handle, push);
  thread->calls += 1;
  return booked(thread, now);
}
PROBE(context_set) { return switch_context(ARG1(ctx), 0); }
PROBE(context_push) { return switch_context(ARG1(ctx), 1); }
PROBE(context_pop) {
  __u64 now = bpf_ktime_get_ns();
  struct thread *thread = this_thread(bpf_get_current_pid_tgid());
  if (!thread)
    return 0;
  pop_current(thread);
  thread->calls += 1;
  return booked(thread, now);
}

INLINE int count_launch(int graph) {
  __u64 now = bpf_ktime_get_ns();
  struct thread *thread = this_thread(bpf_get_current_pid_tgid());
  if (!thread)
    return 0;
  struct record *record = LOOKUP(records, &thread->id);
  if (record) {
    if (graph)
      ADD(record->graph_launches, 1);
    else
      ADD(record->launches, 1);
  }
  thread->calls += 1;
  return booked(thread, now);
}
PROBE(launch) { return count_launch(0); }
PROBE(launch_graph) { return count_launch(1); }

/* libcudart */

PROBE(runtime_alloc_device) {
  return enter_alloc(ctx, STACK_POINTER(ctx), RUNTIME, OP_ALLOC, DEVICE, ARG1(ctx), ARG2(ctx));
}
PROBE(runtime_alloc_managed) {
  return enter_alloc(ctx, STACK_POINTER(ctx), RUNTIME, OP_ALLOC, MANAGED, ARG1(ctx), ARG2(ctx));
}
PROBE(runtime_alloc_host) {
  return enter_alloc(ctx, STACK_POINTER(ctx), RUNTIME, OP_ALLOC, HOST, ARG1(ctx), ARG2(ctx));
}
PROBE(runtime_alloc_pitch) {
  return enter_pitch(ctx, STACK_POINTER(ctx), RUNTIME, OP_PITCH, ARG1(ctx), ARG2(ctx), ARG4(ctx));
}
PROBE(runtime_free) { return enter_address(ctx, STACK_POINTER(ctx), RUNTIME, OP_FREE, UNKNOWN, ARG1(ctx), 0, 0); }
PROBE(runtime_reset) {
  return enter_address(ctx, STACK_POINTER(ctx), RUNTIME, OP_RUNTIME_RESET, UNKNOWN, 0, 0, 0);
}

/* PyTorch's static probes: malloc(address, device, size, stream) once it has given memory out, free(address) before it
 * takes it back. */

INLINE __u64 argument_of(void *ctx, struct argument *from) {
  __u64 value = 0;
  if (from->place == IS_CONSTANT)
    return from->offset;
  if (bpf_probe_read_kernel(&value, sizeof(value), ctx + from->of_register))
    return 0;
  if (from->place == IN_MEMORY && bpf_probe_read_user(&value, sizeof(value), (void *)(value + from->offset)))
    return 0;
  return value << (from->unused_bits & 63) >> (from->unused_bits & 63);
}

INLINE int tensor(void *ctx, int is_freed) {
  __u64 now = bpf_ktime_get_ns();
  __u32 number = bpf_get_attach_cookie(ctx);
  struct site *site = LOOKUP(sites, &number);
  struct thread *thread = this_thread(bpf_get_current_pid_tgid());
  if (!site || !thread)
    return 0;
  thread->calls += 1;
  struct live_key key = {};
  key.id = thread->id;
  key.address = argument_of(ctx, &site->address);
  if (!key.address)
    return booked(thread, now);
  key.address |= OF_TENSOR;
  struct live *old = LOOKUP(live, &key);
  if (old) { /* freed now, or given anew, so that its end was not seen */
    struct live gone = *old;
    REMOVE(live, &key);
    book_free(key.id, &gone, TENSORS, 0);
  }
  struct live fresh = {};
  fresh.size = is_freed ? 0 : argument_of(ctx, &site->size);
  if (fresh.size) {
    fresh.time_ns = now;
    fresh.kind = DEVICE;
    fresh.device = -1;
    fresh.stack = -1;
    book_allocation(key.id, &fresh, TENSORS, STORE_NEW(live, &key, &fresh));
  }
  return booked(thread, now);
}
PROBE(tensor_allocated) { return tensor(ctx, 0); }
PROBE(tensor_freed) { return tensor(ctx, 1); }

/* What the cost of a pair of probes is measured with, and nothing else: see `ebpf/cost.py`. */
PROBE(empty) { return 0; }

/* Ends of threads and programs. They run for all of the machine, so they look at one table and are done with others. */

INLINE void forget_thread(__u64 who) {
  struct thread *thread = LOOKUP(threads, &who);
  if (!thread)
    return;
  if (thread->under_way[DRIVER].start_ns)
    abandon(&thread->under_way[DRIVER], DRIVER);
  if (thread->under_way[RUNTIME].start_ns)
    abandon(&thread->under_way[RUNTIME], RUNTIME);
  struct record *record = LOOKUP(records, &thread->id);
  if (record) {
    ADD(record->calls, thread->calls);
    ADD(record->spent_ns, thread->spent_ns);
  }
  REMOVE(threads, &who);
}

INLINE void note_end(__u64 id, __u64 now, __u32 reason) {
  struct record *record = LOOKUP(records, &id);
  if (!record)
    return;
  record->ended_ns = now;
  record->reason = reason;
}

RAW_TRACEPOINT(thread_exit) {
  __u64 who = bpf_get_current_pid_tgid();
  __u32 tgid = who >> 32;
  struct process *process = LOOKUP(processes, &tgid);
  if (!process)
    return 0;
  forget_thread(who);
  if (tgid == (__u32)who) /* others may go on: whoever reads this asks the kernel whether the process is gone */
    note_end(process->id, bpf_ktime_get_ns(), LEADER_EXITED);
  return 0;
}

RAW_TRACEPOINT(program_exec) {
  __u64 who = bpf_get_current_pid_tgid();
  __u64 now = bpf_ktime_get_ns();
  __u32 tgid = who >> 32;
  struct process *process = LOOKUP(processes, &tgid);
  if (process) {
    forget_thread(who);
    note_end(process->id, now, EXECED);
    REMOVE(processes, &tgid);
  }
  __u32 zero = 0;
  struct settings *settings = LOOKUP(settings, &zero);
  struct event *event = settings ? new_event(settings, EVENT_EXEC, now, 0, who) : 0;
  if (event)
    bpf_ringbuf_submit(event, BPF_RB_FORCE_WAKEUP);
  return 0;
}

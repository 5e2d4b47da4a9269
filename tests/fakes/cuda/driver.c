/* A libcuda.so.1 without a GPU: gives out addresses and handles, remembers what is allocated and fails where it is told to.
 *
 * FAKE_CUDA_FAIL=NAME=CODE[,NAME=CODE…] makes functions (or `*`) fail; fakeCudaFail(name, code) changes that at run time,
 * fakeCudaSleep(ms) makes every call take that long. Everything else is CUDA's own interface. fakeCudaLive() gives the
 * bytes of device and virtual memory that a driver would list.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef int CUresult;
typedef uint64_t CUdeviceptr;
#define API __attribute__((visibility("default"), noinline))
#define MAX 262144

struct slot { uint64_t address; uint64_t size; };
static struct slot *table;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t next = 0x7f0000000000ULL, next_small = 0x10000, live_bytes;
static char fail_name[16][64];
static int fail_code[16], fails, read_environment;
static unsigned sleep_ms;

API void fakeCudaSleep(unsigned ms) { sleep_ms = ms; }
API uint64_t fakeCudaLive(void) { return live_bytes; }
API void fakeCudaFail(const char *name, int code) {
  for (int i = 0; i < fails; i++)
    if (!strcmp(fail_name[i], name)) { fail_code[i] = code; return; }
  if (fails < 16) { strncpy(fail_name[fails], name, 63); fail_code[fails++] = code; }
}

static int enter(const char *name) {
  if (!read_environment) {
    read_environment = 1;
    char *text = getenv("FAKE_CUDA_FAIL");
    for (char *save, *part = text ? strtok_r(strdup(text), ",", &save) : 0; part; part = strtok_r(0, ",", &save)) {
      char *equals = strchr(part, '=');
      if (equals) { *equals = 0; fakeCudaFail(part, atoi(equals + 1)); }
    }
  }
  if (sleep_ms) usleep(1000 * sleep_ms);
  for (int i = 0; i < fails; i++)
    if (fail_code[i] && (!strcmp(fail_name[i], name) || !strcmp(fail_name[i], "*"))) return fail_code[i];
  return 0;
}
#define ENTER int failed = enter(__func__); if (failed) return failed

static uint64_t take(uint64_t size, int small) {
  pthread_mutex_lock(&lock);
  if (!table) table = calloc(MAX, sizeof *table);
  uint64_t *from = small ? &next_small : &next;
  uint64_t address = *from;
  /* The lowest free slot is given again, as drivers do. */
  static uint32_t hint;
  for (uint32_t n = 0; n < MAX; n++) {
    uint32_t i = (hint + n) % MAX;
    if (!table[i].size) {
      if (!table[i].address || (table[i].address < 1ULL << 32) != small) { *from += small ? 0x1000 : (size + 0x1fffff) & ~0x1fffffULL; table[i].address = address; }
      table[i].size = size;
      address = table[i].address;
      hint = i;
      break;
    }
  }
  live_bytes += size;
  pthread_mutex_unlock(&lock);
  return address;
}
static int give(uint64_t address) {
  if (!address) return 0;
  pthread_mutex_lock(&lock);
  int result = 1;
  for (uint32_t i = 0; table && i < MAX; i++) {
    if (!table[i].address) break;
    if (table[i].address == address && table[i].size) { live_bytes -= table[i].size; table[i].size = 0; result = 0; break; }
  }
  pthread_mutex_unlock(&lock);
  return result;
}

#define ALLOC(name, ...) API CUresult name(CUdeviceptr *out, size_t size __VA_ARGS__) { ENTER; *out = take(size, 0); return 0; }
ALLOC(cuMemAlloc_v2)
ALLOC(cuMemAllocManaged, , unsigned flags __attribute__((unused)))
ALLOC(cuMemAllocAsync, , void *stream __attribute__((unused)))
ALLOC(cuMemAllocAsync_ptsz, , void *stream __attribute__((unused)))
ALLOC(cuMemAllocFromPoolAsync, , void *pool __attribute__((unused)), void *stream __attribute__((unused)))
ALLOC(cuMemAllocFromPoolAsync_ptsz, , void *pool __attribute__((unused)), void *stream __attribute__((unused)))
ALLOC(cuMemAllocHost_v2)
ALLOC(cuMemHostAlloc, , unsigned flags __attribute__((unused)))
API CUresult cuMemAlloc(uint32_t *out, unsigned size) { ENTER; *out = take(size, 1); return 0; }
API CUresult cuMemAllocHost(void **out, unsigned size) { ENTER; *out = (void *)take(size, 0); return 0; }
API CUresult cuMemAllocPitch_v2(CUdeviceptr *out, size_t *pitch, size_t width, size_t height, unsigned element) {
  ENTER; (void)element; *pitch = (width + 511) & ~511ULL; 
  /* Through the exported function, as a driver might: the inner call must not be counted. */
  return cuMemAlloc_v2(out, *pitch * height);
}
API CUresult cuMemAllocPitch(uint32_t *out, unsigned *pitch, unsigned width, unsigned height, unsigned element) {
  ENTER; (void)element; *pitch = (width + 511) & ~511U; *out = take((uint64_t)*pitch * height, 1); return 0;
}

#define FREE(name, ...) API CUresult name(CUdeviceptr address __VA_ARGS__) { ENTER; return give(address); }
FREE(cuMemFree_v2)
FREE(cuMemFreeHost)
FREE(cuMemFreeAsync, , void *stream __attribute__((unused)))
FREE(cuMemFreeAsync_ptsz, , void *stream __attribute__((unused)))
API CUresult cuMemFree(uint32_t address) { ENTER; return give(address); }

struct prop { int type, handle_types, location, id; void *meta; uint64_t flags; };
static __thread int unused;
API CUresult cuMemCreate(uint64_t *handle, size_t size, const struct prop *prop, uint64_t flags) {
  ENTER; (void)prop; (void)flags; *handle = take(size, 0) >> 4; return 0;
}
API CUresult cuMemRelease(uint64_t handle) { ENTER; (void)handle; give(handle << 4); return 0; }
API CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, uint64_t handle, uint64_t flags) {
  ENTER; unused += ptr + size + offset + handle + flags; return 0;
}
API CUresult cuMemUnmap(CUdeviceptr ptr, size_t size) { ENTER; unused += ptr + size; return 0; }
static uint64_t retained;
API void fakeCudaRetains(uint64_t handle) { retained = handle; }
API CUresult cuMemRetainAllocationHandle(uint64_t *handle, void *address) { ENTER; (void)address; *handle = retained; return 0; }

static uint64_t next_context = 0x5500000000;
static __thread uint64_t stack[8];
static __thread int depth;
static uint64_t primary[16];
static int retains[16];
#define MAKE(name, ...) API CUresult name(uint64_t *ctx, __VA_ARGS__) { ENTER; unused += dev; *ctx = __sync_add_and_fetch(&next_context, 0x1000); stack[depth++ & 7] = *ctx; return 0; }
MAKE(cuCtxCreate, unsigned flags __attribute__((unused)), int dev)
MAKE(cuCtxCreate_v2, unsigned flags __attribute__((unused)), int dev)
MAKE(cuCtxCreate_v3, void *params __attribute__((unused)), int count __attribute__((unused)), unsigned flags __attribute__((unused)), int dev)
MAKE(cuCtxCreate_v4, void *params __attribute__((unused)), unsigned flags __attribute__((unused)), int dev)
API CUresult cuCtxDestroy(uint64_t ctx) { ENTER; if (depth && stack[(depth - 1) & 7] == ctx) depth--; return 0; }
API CUresult cuCtxDestroy_v2(uint64_t ctx) { ENTER; if (depth && stack[(depth - 1) & 7] == ctx) depth--; return 0; }
API CUresult cuCtxSetCurrent(uint64_t ctx) { ENTER; if (!depth) depth = 1; stack[(depth - 1) & 7] = ctx; return 0; }
API CUresult cuCtxPushCurrent(uint64_t ctx) { ENTER; stack[depth++ & 7] = ctx; return 0; }
API CUresult cuCtxPushCurrent_v2(uint64_t ctx) { ENTER; stack[depth++ & 7] = ctx; return 0; }
API CUresult cuCtxPopCurrent(uint64_t *ctx) { ENTER; if (depth) depth--; *ctx = stack[depth & 7]; return 0; }
API CUresult cuCtxPopCurrent_v2(uint64_t *ctx) { ENTER; if (depth) depth--; *ctx = stack[depth & 7]; return 0; }
API CUresult cuDevicePrimaryCtxRetain(uint64_t *ctx, int dev) {
  ENTER; if (!retains[dev & 15]++) primary[dev & 15] = __sync_add_and_fetch(&next_context, 0x1000);
  *ctx = primary[dev & 15]; return 0;
}
API CUresult cuDevicePrimaryCtxRelease(int dev) { ENTER; retains[dev & 15]--; return 0; }
API CUresult cuDevicePrimaryCtxRelease_v2(int dev) { ENTER; retains[dev & 15]--; return 0; }
API CUresult cuDevicePrimaryCtxReset(int dev) { ENTER; retains[dev & 15] = 0; return 0; }
API CUresult cuDevicePrimaryCtxReset_v2(int dev) { ENTER; retains[dev & 15] = 0; return 0; }
API CUresult cuLaunchKernel(void *f) { ENTER; unused += (long)f; return 0; }
API CUresult cuLaunchKernel_ptsz(void *f) { ENTER; unused += (long)f; return 0; }
API CUresult cuGraphLaunch(void *g, void *s) { ENTER; unused += (long)g + (long)s; return 0; }
/* A version that no tracer knows yet, and a second name of a known one. */
#ifdef FAKE_CUDA_FUTURE
API CUresult cuMemAlloc_v9(CUdeviceptr *out, void *what) { ENTER; (void)what; *out = 0; return 0; }
API CUresult cuMemAlloc_v2_ptds(CUdeviceptr *out, size_t size) __attribute__((alias("cuMemAlloc_v2")));
#endif

/* For measurements: pairs of calls in a loop that Python does not slow down. `rate` 0: as fast as it goes. */
API double fakeCudaLoop(unsigned pairs, double rate) {
  struct timespec begin, now;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (unsigned i = 0; i < pairs; i++) {
    CUdeviceptr at = 0;
    cuMemAlloc_v2(&at, 4096);
    cuMemFree_v2(at);
    if (rate > 0 && i % 16 == 15) {
      double due = i / rate;
      for (;;) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        double left = due - (now.tv_sec - begin.tv_sec + (now.tv_nsec - begin.tv_nsec) / 1e9);
        if (left <= 0) break;
        usleep(left > 0.001 ? left * 1e6 / 2 : 50);
      }
    }
  }
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec - begin.tv_sec + (now.tv_nsec - begin.tv_nsec) / 1e9;
}
/* A pair of functions that do nothing, to be probed with programs that do nothing. */
API int fakeCudaNothing(void) { return unused; }
API double fakeCudaNothingLoop(unsigned calls) {
  struct timespec begin, now;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (unsigned i = 0; i < calls; i++) fakeCudaNothing();
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec - begin.tv_sec + (now.tv_nsec - begin.tv_nsec) / 1e9;
}

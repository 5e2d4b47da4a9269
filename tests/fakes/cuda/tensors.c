/* The static probes of PyTorch's caching allocator, as its libc10_cuda has them, around an allocator that gives out
 * numbers. The arguments lie in registers, in memory or are constants, as a compiler may choose. */
#include <stdint.h>

#define API __attribute__((visibility("default"), noinline))
#define HIDDEN __attribute__((visibility("hidden"), used, section(".probes")))

HIDDEN volatile unsigned short pytorch_malloc_semaphore, pytorch_free_semaphore;

#define NOTE(name, arguments)                                             \
  "990: nop\n"                                                            \
  ".pushsection .note.stapsdt,\"\",\"note\"\n"                            \
  ".balign 4\n.4byte 992f-991f, 994f-993f, 3\n"                           \
  "991: .asciz \"stapsdt\"\n992: .balign 4\n"                             \
  "993: .8byte 990b\n.8byte 0\n.8byte pytorch_" name "_semaphore\n"       \
  ".asciz \"pytorch\"\n.asciz \"" name "\"\n.asciz \"" arguments "\"\n"   \
  "994: .balign 4\n.popsection\n"

#define MALLOC(where, address, bytes)                                                        \
  __asm__ volatile(NOTE("malloc", "-8@%[a] -1@%[d] -8@%[b] -8@%[s]")                         \
                   :                                                                         \
                   : [a] where(address), [d] "q"((int8_t)0), [b] where(bytes), [s] "nor"((int64_t)0))
#define FREE(where, address) __asm__ volatile(NOTE("free", "-8@%[a]") : : [a] where(address))

static uint64_t next = 0x7f0000000000;

static uint64_t take(uint64_t bytes) {
  return __sync_fetch_and_add(&next, (bytes + 511) & ~511ULL);
}

API int tensorAllocate(uint64_t *out, uint64_t bytes) {
  uint64_t address = *out ? *out : take(bytes); /* a given address: PyTorch uses memory again */
  if (bytes && pytorch_malloc_semaphore)
    MALLOC("r", address, bytes);
  *out = address;
  return 0;
}

API int tensorAllocateInMemory(uint64_t *out, uint64_t bytes) {
  volatile uint64_t address = take(bytes), size = bytes;
  if (pytorch_malloc_semaphore)
    MALLOC("m", address, size);
  *out = address;
  return 0;
}

API int tensorAllocateConstant(uint64_t *out) {
  uint64_t address = take(4096);
  if (pytorch_malloc_semaphore)
    __asm__ volatile(NOTE("malloc", "-8@%[a] -1@%[d] 4@$4096 -8@%[s]")
                     :
                     : [a] "r"(address), [d] "q"((int8_t)0), [s] "nor"((int64_t)0));
  *out = address;
  return 0;
}

API int tensorFree(uint64_t address) {
  if (pytorch_free_semaphore)
    FREE("r", address);
  return 0;
}

API int tensorFreeUncached(uint64_t address) {
  volatile uint64_t held = address;
  if (pytorch_free_semaphore)
    FREE("m", held);
  return 0;
}

API int tensorListeners(void) { return pytorch_malloc_semaphore + 100 * pytorch_free_semaphore; }

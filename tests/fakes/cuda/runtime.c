/* A libcudart that passes on to the fake libcuda, as the real one does: one allocation goes through both. */
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default"), noinline))
extern int cuMemAlloc_v2(uint64_t *, size_t), cuMemFree_v2(uint64_t), cuMemFreeHost(uint64_t), cuMemAllocHost_v2(uint64_t *, size_t);
extern int cuMemHostAlloc(uint64_t *, size_t, unsigned), cuMemAllocManaged(uint64_t *, size_t, unsigned), cuMemFreeAsync(uint64_t, void *);
extern int cuMemAllocPitch_v2(uint64_t *, size_t *, size_t, size_t, unsigned), cuMemAllocAsync(uint64_t *, size_t, void *);
extern int cuMemAllocFromPoolAsync(uint64_t *, size_t, void *, void *), cuDevicePrimaryCtxReset_v2(int);

API int cudaMalloc(uint64_t *p, size_t n) { int e = cuMemAlloc_v2(p, n); return e; }
API int cudaMallocHost(uint64_t *p, size_t n) { int e = cuMemAllocHost_v2(p, n); return e; }
API int cudaHostAlloc(uint64_t *p, size_t n, unsigned f) { int e = cuMemHostAlloc(p, n, f); return e; }
API int cudaMallocManaged(uint64_t *p, size_t n, unsigned f) { int e = cuMemAllocManaged(p, n, f); return e; }
API int cudaMallocPitch(uint64_t *p, size_t *pitch, size_t w, size_t h) { int e = cuMemAllocPitch_v2(p, pitch, w, h, 4); return e; }
API int cudaMallocAsync(uint64_t *p, size_t n, void *s) { int e = cuMemAllocAsync(p, n, s); return e; }
API int cudaMallocAsync_ptsz(uint64_t *p, size_t n, void *s) { int e = cuMemAllocAsync(p, n, s); return e; }
API int cudaMallocFromPoolAsync(uint64_t *p, size_t n, void *q, void *s) { int e = cuMemAllocFromPoolAsync(p, n, q, s); return e; }
API int cudaFree(uint64_t p) { int e = cuMemFree_v2(p); return e; }
API int cudaFreeHost(uint64_t p) { int e = cuMemFreeHost(p); return e; }
API int cudaFreeAsync(uint64_t p, void *s) { int e = cuMemFreeAsync(p, s); return e; }
API int cudaFreeAsync_ptsz(uint64_t p, void *s) { int e = cuMemFreeAsync(p, s); return e; }
API int cudaDeviceReset(void) { int e = cuDevicePrimaryCtxReset_v2(0); return e; }

"""Names of the results of CUDA's driver and runtime (cuda.h, driver_types.h), as they are known to users of
either."""

from __future__ import annotations

from ebpf.layout import Kind, Layer, Op

_COMMON = {
    1: "invalid_value",
    2: "out_of_memory",
    3: "not_initialized",
    4: "deinitialized",
    100: "no_device",
    101: "invalid_device",
    201: "invalid_context",
    400: "invalid_handle",
    600: "not_ready",
    700: "illegal_address",
    702: "launch_timeout",
    709: "context_is_destroyed",
    719: "launch_failed",
    800: "not_permitted",
    801: "not_supported",
    900: "capture_unsupported",
    901: "capture_invalidated",
    999: "unknown",
}


def result_name(layer: Layer, code: int) -> str:
    """A label for a result: CUresult and cudaError_t have one numbering since CUDA 10.1."""
    return _COMMON.get(code, f"code_{code}")


def function_name(op: int, kind: int) -> str:
    """The function that stands for all that do the same: asynchronous allocations are told as cuMemAlloc."""
    if op in (Op.PITCH, Op.PITCH_32):
        return "cuMemAllocPitch"
    if op in (Op.ALLOC, Op.ALLOC_32):
        return {Kind.HOST: "cuMemHostAlloc", Kind.MANAGED: "cuMemAllocManaged"}.get(Kind(kind), "cuMemAlloc")
    return {
        Op.FREE: "cuMemFree",
        Op.CREATE: "cuMemCreate",
        Op.MAP: "cuMemMap",
        Op.UNMAP: "cuMemUnmap",
        Op.RELEASE: "cuMemRelease",
        Op.RETAIN: "cuMemRetainAllocationHandle",
        Op.CONTEXT_CREATE: "cuCtxCreate",
        Op.CONTEXT_DESTROY: "cuCtxDestroy",
        Op.PRIMARY_RETAIN: "cuDevicePrimaryCtxRetain",
        Op.PRIMARY_RELEASE: "cuDevicePrimaryCtxRelease",
        Op.PRIMARY_RESET: "cuDevicePrimaryCtxReset",
    }.get(Op(op), "unknown")

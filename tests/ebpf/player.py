"""A process that makes CUDA calls as it is told, one JSON line each way: run by the tests, never imported.

Its arguments are the library to load at the start, or `-` for none. A line `[function, arguments…]` calls one
of the functions below; the answer is what it returns."""

import ctypes
import json
import os
import subprocess
import sys
import threading
import time

U64 = ctypes.c_uint64
state = {}


def load(path):
    """Load a library as cuda or, by its name, as cudart or PyTorch's allocator."""
    library = ctypes.CDLL(path)
    state["rt" if "cudart" in path else "c10" if "c10" in path else "cu"] = library
    return 0


def _library(name):
    return state["rt" if name.startswith("cuda") else "c10" if name.startswith("tensor") else "cu"]


def call(name, *arguments):
    """A function with 64-bit arguments."""
    return getattr(_library(name), name)(*(U64(a) for a in arguments))


def out(name, *arguments):
    """A function whose first argument takes a result: [code, result]."""
    result = U64(0)
    code = getattr(_library(name), name)(ctypes.byref(result), *(U64(a) for a in arguments))
    return [code, result.value]


def again(name, address, *arguments):
    """Like `out`, where the result's place holds something: [code, result]."""
    result = U64(address)
    code = getattr(_library(name), name)(ctypes.byref(result), *(U64(a) for a in arguments))
    return [code, result.value]


def pitch(name, width, height):
    """One of the pitched allocations: [code, address, pitch]."""
    result, of = U64(0), U64(0)
    code = getattr(_library(name), name)(
        ctypes.byref(result), ctypes.byref(of), U64(width), U64(height), U64(4)
    )
    return [code, result.value, of.value]


def create(size, location=1, ordinal=0):
    """cuMemCreate: [code, handle]."""
    prop = (ctypes.c_int * 8)(1, 0, location, ordinal)
    handle = U64(0)
    code = state["cu"].cuMemCreate(ctypes.byref(handle), U64(size), prop, U64(0))
    return [code, handle.value]


def threads(count, pairs, size):
    """Allocate and free in several threads; everything is freed at the end."""

    def work():
        for _ in range(pairs):
            code, address = out("cuMemAlloc_v2", size)
            assert code == 0
            assert call("cuMemFree_v2", address) == 0

    running = [threading.Thread(target=work) for _ in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return 0


def die_within_call():
    """A thread that ends in the middle of a free, while the process goes on."""
    libc = ctypes.CDLL(None)
    state["cu"].fakeCudaSleep(ctypes.c_uint(400))
    handler = ctypes.cast(libc.pthread_exit, ctypes.c_void_p).value
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(12, handler)
    ids = []

    def work():
        ids.append(threading.get_native_id())
        call("cuMemFree_v2", state["victim"])

    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.15)
    libc.tgkill(os.getpid(), ids[0], 12)
    time.sleep(0.2)
    state["cu"].fakeCudaSleep(ctypes.c_uint(0))
    return ids[0]


def keep(address):
    """Note an address for `die_within_call`."""
    state["victim"] = address
    return 0


def fork():
    """A child that allocates by itself and ends: its pid."""
    pid = os.fork()
    if pid == 0:
        out("cuMemAlloc_v2", 1 << 20)
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def replace(path):
    """exec: the same pid, another program, which says hello by an empty line."""
    os.execv(sys.executable, [sys.executable, "-I", __file__, path])


def spawn(path, size):
    """A short-lived process that allocates and ends: its pid."""
    code = (
        "import ctypes,sys;c=ctypes.CDLL(sys.argv[1]);a=ctypes.c_uint64();"
        "c.cuMemAlloc_v2(ctypes.byref(a),ctypes.c_uint64(int(sys.argv[2])))"
    )
    child = subprocess.Popen([sys.executable, "-I", "-c", code, path, str(size)])
    child.wait()
    return child.pid


def loop(pairs, rate):
    """Pairs of calls in C: seconds."""
    function = state["cu"].fakeCudaLoop
    function.argtypes, function.restype = [ctypes.c_uint, ctypes.c_double], ctypes.c_double
    return function(pairs, rate)


def nothing(calls):
    """Calls of a function that does nothing: seconds."""
    function = state["cu"].fakeCudaNothingLoop
    function.argtypes, function.restype = [ctypes.c_uint], ctypes.c_double
    return function(calls)


def fail(name, code):
    """Let a function fail from now on; 0: succeed."""
    state["cu"].fakeCudaFail(name.encode(), ctypes.c_int(code))
    return 0


def main():
    """Answer until the input ends."""
    if sys.argv[1] != "-":
        load(sys.argv[1])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(globals()[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()

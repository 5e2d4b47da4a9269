"""GPU exporter: NVML and GPM values of devices, MIG instances, processes and health.

One thread per GPU reads the driver (`worker`, `collectors`), one watches XID events (`xid`), one keeps the
driver loaded (`driver`), one publishes what they read (`part`). A call that hangs in the driver blocks its
own thread only.
"""

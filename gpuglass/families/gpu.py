"""Families of the GPU exporter (`exporters/gpu`): devices, MIG instances, processes, and what cannot be
observed.

All GPU families start with `device` (`nvidia<minor>`) and `gpu_uuid`; identity stands in `gpuglass_gpu_info`
and is joined by `gpu_uuid`. Values of MIG instances have families of their own, so that a sum never counts a
byte twice.
"""

from __future__ import annotations

from gpuglass.family import Family, Kind, Tier

GPU = ("device", "gpu_uuid")
MIG = (*GPU, "mig_uuid")
WORKLOAD = ("workload_namespace", "workload_pod", "workload_container")
PROCESS = (*WORKLOAD, "process", "pid")
_PROCESS_OPTIONAL = frozenset({*WORKLOAD, "pid"})

_UNKNOWN = "The card, driver or permission does not give it; gpuglass_gpu_capability says which."
_HOPPER = (
    "Needs GPM (Hopper or newer, driver 525 or newer); gpuglass_gpu_capability says why it is not there."
)
_DOWN = "The GPU is down (gpuglass_gpu_up is 0) or has gone."


def _gauge(
    name: str, unit: str, help: str, *labels: str, tier: Tier = Tier.SLOW, absent: str = _UNKNOWN
) -> Family:
    return Family(f"gpuglass_{name}", Kind.GAUGE, help, (*GPU, *labels), unit, tier, absent=absent)


def _counter(name: str, unit: str, help: str, *labels: str, absent: str = _UNKNOWN) -> Family:
    return Family(f"gpuglass_{name}", Kind.COUNTER, help, (*GPU, *labels), unit, absent=absent)


# Identity and health

INFO = Family(
    "gpuglass_gpu_info",
    Kind.INFO,
    "Identity of a GPU, to be joined by gpu_uuid.",
    (
        *GPU,
        "model",
        "pci_bus_id",
        "architecture",
        "compute_capability",
        "driver_version",
        "cuda_version",
        "mig_mode",
    ),
    absent="The GPU was never seen since the agent started.",
)
UP = Family(
    "gpuglass_gpu_up",
    Kind.GAUGE,
    "1 while the GPU answers; 0 with the reason (lost, reset_required, hung, driver, gone, error) when it "
    "does not.",
    (*GPU, "reason"),
    tier=Tier.FAST,
    absent="The GPU was never seen since the agent started.",
    optional=frozenset({"reason"}),
)
SNAPSHOT_AGE = _gauge(
    "gpu_snapshot_age_seconds",
    "seconds",
    "Time since the GPU's values were last read from the driver, at the moment of the scrape.",
    tier=Tier.FAST,
    absent="The GPU was not read yet.",
)
CAPABILITY = _gauge(
    "gpu_capability",
    "",
    "Always 1: what can be observed on this GPU by field, with state supported, unsupported, "
    "missing_function, "
    "no_permission or error.",
    "field",
    "state",
    absent="The field was not tried yet, or the GPU is down.",
)
COLLECTOR_DURATION = _gauge(
    "gpu_collector_duration_seconds",
    "seconds",
    "Time that the last run of a collector took on this GPU.",
    "collector",
    absent=_DOWN,
)
COLLECTOR_SUCCESS = _gauge(
    "gpu_collector_success",
    "",
    "1 when the last run of a collector on this GPU had no error. Fields that are not supported are no "
    "error.",
    "collector",
    absent=_DOWN,
)
DRIVER_UP = Family(
    "gpuglass_gpu_driver_up",
    Kind.GAUGE,
    "1 while NVML, the driver's management library, is loaded and answers; 0 with the reason when it is not.",
    ("reason",),
    absent="The agent runs without its GPU part.",
    optional=frozenset({"reason"}),
)
DRIVER_LOADS = Family(
    "gpuglass_gpu_driver_loads_total",
    Kind.COUNTER,
    "Times that NVML was initialised; more than once means that the driver or a GPU was lost, or that the "
    "configuration of process labels changed.",
    absent="The agent runs without its GPU part.",
)
GPUS = Family(
    "gpuglass_gpus",
    Kind.GAUGE,
    "Number of GPUs that NVML lists, answering or not.",
    absent="NVML is not loaded.",
)

# Activity

BUSY = _gauge(
    "gpu_busy_ratio",
    "ratio",
    "Share of time in which at least one kernel ran, mean since the last sample. Not SM use: one small "
    "kernel makes "
    "it 1. NVML calls it GPU utilisation.",
    "source",
    tier=Tier.FAST,
)
BUSY_PEAK = _gauge(
    "gpu_busy_peak_ratio",
    "ratio",
    "Highest of the driver's own samples of the busy ratio since the last sample.",
    tier=Tier.FAST,
)
GRAPHICS_ACTIVE = _gauge(
    "gpu_graphics_active_ratio",
    "ratio",
    "Share of time in which any compute or graphics work was active, mean since the last sample (GPM). "
    "Differs from "
    "gpuglass_gpu_busy_ratio only by how it is measured.",
    tier=Tier.FAST,
    absent=_HOPPER,
)
SM_ACTIVE = _gauge(
    "gpu_sm_active_ratio",
    "ratio",
    "Share of SMs that were busy, mean since the last sample (GPM).",
    tier=Tier.FAST,
    absent=_HOPPER,
)
SM_OCCUPANCY = _gauge(
    "gpu_sm_occupancy_ratio",
    "ratio",
    "Active warps as a share of the most that the SMs can hold, mean since the last sample (GPM).",
    tier=Tier.FAST,
    absent=_HOPPER,
)
PIPE_ACTIVE = _gauge(
    "gpu_pipe_active_ratio",
    "ratio",
    "Share of time in which the SMs used a pipe: tensor (any), tensor_dfma, tensor_hmma, tensor_dmma, "
    "tensor_imma, "
    "fp64, fp32, fp16 or integer (GPM). The tensor_* pipes are parts of tensor.",
    "pipe",
    tier=Tier.FAST,
    absent=_HOPPER,
)
DRAM_ACTIVE = _gauge(
    "gpu_dram_active_ratio",
    "ratio",
    "Memory bandwidth used as a share of the card's maximum, mean since the last sample (GPM).",
    tier=Tier.FAST,
    absent=_HOPPER,
)
MEMORY_CONTROLLER_BUSY = _gauge(
    "gpu_memory_controller_busy_ratio",
    "ratio",
    "Share of time in which memory was read or written. Not memory used. NVML calls it memory utilisation.",
)

# Memory

MEMORY_USED = _gauge(
    "gpu_memory_used_bytes",
    "bytes",
    "Device memory allocated to processes and to the driver for them; without the reserved part.",
    tier=Tier.FAST,
)
MEMORY_TOTAL = _gauge(
    "gpu_memory_total_bytes", "bytes", "Device memory of the card: used, free and reserved."
)
MEMORY_FREE = _gauge("gpu_memory_free_bytes", "bytes", "Device memory that nobody has allocated.")
MEMORY_RESERVED = _gauge(
    "gpu_memory_reserved_bytes",
    "bytes",
    "Device memory that driver and firmware keep for themselves; not part of used.",
)
MEMORY_UNATTRIBUTED = _gauge(
    "gpu_memory_unattributed_bytes",
    "bytes",
    "Used device memory that no listed process holds. Processes and this add up to the used memory.",
    absent="Not known: a process's memory is hidden, or the card is in MIG mode (see gpuglass_mig_*).",
)
BAR1_TOTAL = _gauge(
    "gpu_bar1_total_bytes", "bytes", "Size of the BAR1 window through which the host maps memory."
)
BAR1_USED = _gauge("gpu_bar1_used_bytes", "bytes", "BAR1 space in use.")

# Links

PCIE_TX = _counter(
    "gpu_pcie_transmit_bytes_total",
    "bytes",
    "Bytes that the GPU sent over PCIe. source tells how they were counted: counter (the card's own), gpm or "
    "throughput (rates, added up over time).",
    "source",
)
PCIE_RX = _counter(
    "gpu_pcie_receive_bytes_total",
    "bytes",
    "Bytes that the GPU received over PCIe; source as in gpuglass_gpu_pcie_transmit_bytes_total.",
    "source",
)
PCIE_REPLAYS = _counter("gpu_pcie_replays_total", "", "PCIe packets that were sent again.")
PCIE_LINK_GENERATION = _gauge(
    "gpu_pcie_link_generation",
    "",
    "PCIe generation of the link, as kind current or max. Idle cards step down.",
    "kind",
)
PCIE_LINK_WIDTH = _gauge("gpu_pcie_link_lanes", "", "PCIe lanes of the link, as kind current or max.", "kind")
NVLINK_UP = _gauge(
    "gpu_nvlink_up", "", "1 while this NVLink is active.", "link", absent="The card has no NVLink."
)
NVLINK_TX = _counter(
    "gpu_nvlink_transmit_bytes_total", "bytes", "Payload bytes that the GPU sent over this NVLink.", "link"
)
NVLINK_RX = _counter(
    "gpu_nvlink_receive_bytes_total", "bytes", "Payload bytes that the GPU received over this NVLink.", "link"
)
NVLINK_ERRORS = _counter(
    "gpu_nvlink_errors_total",
    "",
    "NVLink errors by link and type: replay, recovery, crc (NVLink 4 and older); receive, recovery, "
    "recovery_failed, "
    "symbol (NVLink 5).",
    "link",
    "type",
)

# Power, heat, clocks

POWER = _gauge(
    "gpu_power_watts",
    "watts",
    "Power drawn by the card; on Ampere and newer (but GA100) the driver's mean over one second.",
    tier=Tier.FAST,
)
POWER_LIMIT = _gauge("gpu_power_limit_watts", "watts", "Power limit in force.")
ENERGY = _counter("gpu_energy_joules_total", "joules", "Energy used since the driver was loaded.")
TEMPERATURE = _gauge("gpu_temperature_celsius", "celsius", "Temperature at a sensor (gpu, memory).", "sensor")
TEMPERATURE_LIMIT = _gauge(
    "gpu_temperature_limit_celsius",
    "celsius",
    "Temperature at which the card slows down (slowdown), shuts down (shutdown), or that memory may reach "
    "(memory_max).",
    "limit",
)
CLOCK = _gauge(
    "gpu_clock_hertz", "hertz", "Present clock of a domain (sm, memory, graphics, video).", "clock"
)
CLOCK_MAX = _gauge(
    "gpu_clock_max_hertz", "hertz", "Highest clock of a domain (sm, memory, graphics, video).", "clock"
)
THROTTLE = _counter(
    "gpu_throttle_seconds_total",
    "seconds",
    "Time in which clocks were held down, by reason (power_cap, thermal_software, thermal_hardware, "
    "power_brake, "
    "sync_boost, board_limit, reliability), since the driver was loaded. Reasons can hold at the same time.",
    "reason",
)
THROTTLE_ACTIVE = _gauge(
    "gpu_throttle_active",
    "",
    "1 if clocks were held down for this reason at the moment of the sample; short times are only seen in "
    "gpuglass_gpu_throttle_seconds_total.",
    "reason",
)
PERFORMANCE_STATE = _gauge("gpu_performance_state", "", "P-state: 0 is the fastest, 15 the slowest.")

# Errors

ECC_ERRORS = _counter(
    "gpu_ecc_errors_total",
    "",
    "Memory errors over the life of the card, by type (corrected, uncorrected).",
    "type",
    absent="ECC is off or the card has none.",
)
ECC_ENABLED = _gauge("gpu_ecc_enabled", "", "1 if ECC is on.")
REMAPPED_ROWS = _counter(
    "gpu_remapped_rows_total",
    "",
    "Memory rows replaced by spare ones over the life of the card, by cause (corrected, uncorrected errors).",
    "cause",
)
ROW_REMAP_PENDING = _gauge("gpu_row_remap_pending", "", "1 if a row waits to be remapped at the next reset.")
ROW_REMAP_FAILED = _gauge(
    "gpu_row_remap_failed", "", "1 if a row could not be remapped: the card needs replacement."
)
RETIRED_PAGES = _counter(
    "gpu_retired_pages_total",
    "",
    "Memory pages taken out of use over the life of the card, by cause (corrected, uncorrected); cards "
    "before Ampere.",
    "cause",
)
RECOVERY_ACTION = _gauge(
    "gpu_recovery_action",
    "",
    "Always 1: what the driver says the GPU needs, as action none, gpu_reset, node_reboot, drain_p2p, "
    "drain_and_reset, recover_imex_domain, bus_reset or system_reboot.",
    "action",
)
XID_ERRORS = _counter(
    "gpu_xid_errors_total",
    "",
    "XID errors that the driver reported since the agent started, by code and class (hardware, driver, "
    "application, "
    "unknown).",
    "xid",
    "class",
    absent="XID events cannot be watched; gpuglass_gpu_capability says why.",
)
XID_LAST = _gauge(
    "gpu_xid_last_timestamp_seconds",
    "seconds",
    "Unix time at which this XID was last reported.",
    "xid",
    absent="Not reported since the agent started.",
)

# Processes and workloads

PROCESS_MEMORY = Family(
    "gpuglass_process_memory_used_bytes",
    Kind.GAUGE,
    "Device memory held by processes, by workload and process name (by pid on request).",
    (*GPU, *PROCESS),
    "bytes",
    absent="No such process on the GPU, or the driver hides its memory.",
    optional=_PROCESS_OPTIONAL,
)
PROCESS_SM = Family(
    "gpuglass_process_sm_ratio",
    Kind.GAUGE,
    "Share of SM time that processes used, as the driver samples it (about each second); 0 is idle.",
    (*GPU, *PROCESS),
    "ratio",
    absent="No such process on the GPU, or the driver does not tell (MIG).",
    optional=_PROCESS_OPTIONAL,
)
PROCESSES = _gauge(
    "gpu_processes",
    "",
    "Processes that hold a context on the GPU, by type (compute, graphics, mps).",
    "type",
)
PROCESSES_CLAMPED = _counter(
    "gpu_process_clamped_total",
    "",
    "Times that the parts given by the driver exceeded the whole and were scaled down to it, by kind "
    "(memory, sm).",
    "kind",
    absent=_DOWN,
)
ALLOCATION_INFO = Family(
    "gpuglass_gpu_allocation_info",
    Kind.INFO,
    "A GPU or MIG instance that the kubelet gave to a container, by its pod-resources API.",
    (*GPU, *WORKLOAD, "resource", "mig_uuid"),
    absent="Not given to a container, or no pod-resources socket.",
    optional=frozenset({"mig_uuid"}),
)

# MIG instances

MIG_INFO = Family(
    "gpuglass_mig_info",
    Kind.INFO,
    "Identity of a MIG instance; device and gpu_uuid name its parent.",
    (*MIG, "profile", "gpu_instance", "compute_instance"),
    absent="No such instance.",
)


def _mig(name: str, unit: str, help: str, *labels: str, tier: Tier = Tier.SLOW) -> Family:
    return Family(
        f"gpuglass_mig_{name}",
        Kind.GAUGE,
        help,
        (*MIG, *labels),
        unit,
        tier,
        absent="No such instance, or unknown.",
    )


MIG_MEMORY_USED = _mig(
    "memory_used_bytes", "bytes", "Memory of the instance that is allocated.", tier=Tier.FAST
)
MIG_MEMORY_TOTAL = _mig("memory_total_bytes", "bytes", "Memory of the instance.")
MIG_MEMORY_FREE = _mig("memory_free_bytes", "bytes", "Memory of the instance that nobody has allocated.")
MIG_MEMORY_RESERVED = _mig(
    "memory_reserved_bytes", "bytes", "Memory of the instance kept by driver and firmware."
)
MIG_MEMORY_UNATTRIBUTED = _mig(
    "memory_unattributed_bytes", "bytes", "Used memory of the instance that no listed process holds."
)
MIG_BUSY = _mig(
    "busy_ratio",
    "ratio",
    "Share of time in which the instance ran at least one kernel (GPM).",
    tier=Tier.FAST,
)
MIG_SM_ACTIVE = _mig(
    "sm_active_ratio", "ratio", "Share of the instance's SMs that were busy (GPM).", tier=Tier.FAST
)
MIG_SM_OCCUPANCY = _mig(
    "sm_occupancy_ratio",
    "ratio",
    "Active warps as a share of the most that its SMs can hold (GPM).",
    tier=Tier.FAST,
)
MIG_PIPE_ACTIVE = _mig(
    "pipe_active_ratio", "ratio", "Share of time in which its SMs used a pipe (GPM).", "pipe", tier=Tier.FAST
)
MIG_DRAM_ACTIVE = _mig(
    "dram_active_ratio",
    "ratio",
    "Memory bandwidth used as a share of the instance's maximum (GPM).",
    tier=Tier.FAST,
)
MIG_PROCESS_MEMORY = Family(
    "gpuglass_mig_process_memory_used_bytes",
    Kind.GAUGE,
    "Memory of a MIG instance held by processes, by workload and process name (by pid on request).",
    (*MIG, *PROCESS),
    "bytes",
    absent="No such process on the instance, or the driver hides its memory.",
    optional=_PROCESS_OPTIONAL,
)

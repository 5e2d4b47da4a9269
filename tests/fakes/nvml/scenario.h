/* The scenario: a text file of steps over time, parsed once into one sorted array and asked by key and time.
 * In flows the file's text, out flow values, means and lists at a time. Knows nothing of the driver's API. */
#ifndef FAKE_NVML_SCENARIO_H
#define FAKE_NVML_SCENARIO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(hidden)

enum {
    MAX_GPUS = 64,
    OWNER_ANY_GPU = MAX_GPUS, /* the gpu.*. defaults */
    OWNER_GLOBAL = MAX_GPUS + 1,
    MAX_PROCESSES = 2048,     /* per GPU */
    MAX_MIG = 8,              /* per GPU */
    MAX_LINKS = 36,
    MAX_FIELD = 65535,
    MAX_GPM_METRIC = 1023,
    SCOPE_ALL = 0xFFFFFFFEu,  /* "all": the driver's scopeId UINT_MAX, stored as scope + 1 */
};

/* Plain keys of a GPU: gpu.N.<name>, with their names in the file, value form and scale. */
#define GPU_KEYS(X) \
    X(UUID, "uuid", TEXT, 1) \
    X(NAME, "name", TEXT, 1) \
    X(SERIAL, "serial", TEXT, 1) \
    X(VBIOS, "vbios", TEXT, 1) \
    X(PCI_BUS_ID, "pci_bus_id", TEXT, 1) \
    X(PCI_DEVICE_ID, "pci_device_id", NUMBER, 1) \
    X(MINOR, "minor", NUMBER, 1) \
    X(ARCH, "arch", ARCH, 1) \
    X(BRAND, "brand", NUMBER, 1) \
    X(COMPUTE_CAPABILITY, "compute_capability", TEXT, 1) \
    X(MIG_MODE, "mig_mode", NUMBER, 1) \
    X(MIG_MODE_PENDING, "mig_mode_pending", NUMBER, 1) \
    X(PERSISTENCE_MODE, "persistence_mode", NUMBER, 1) \
    X(COMPUTE_MODE, "compute_mode", NUMBER, 1) \
    X(LOST, "lost", NUMBER, 1) \
    X(TOTAL_BYTES, "total_bytes", NUMBER, 1) \
    X(USED_BYTES, "used_bytes", NUMBER, 1) \
    X(RESERVED_BYTES, "reserved_bytes", NUMBER, 1) \
    X(BAR1_TOTAL_BYTES, "bar1_total_bytes", NUMBER, 1) \
    X(BAR1_USED_BYTES, "bar1_used_bytes", NUMBER, 1) \
    X(UTIL_GPU, "util_gpu", NUMBER, 1) \
    X(UTIL_MEM, "util_mem", NUMBER, 1) \
    X(UTIL_ENC, "util_enc", NUMBER, 1) \
    X(UTIL_DEC, "util_dec", NUMBER, 1) \
    X(UTIL_JPG, "util_jpg", NUMBER, 1) \
    X(UTIL_OFA, "util_ofa", NUMBER, 1) \
    X(SAMPLE_PERIOD_MS, "sample_period_ms", NUMBER, 1) \
    X(SAMPLE_COUNT, "sample_count", NUMBER, 1) \
    X(POWER_MW, "power_mw", NUMBER, 1) \
    X(POWER_INSTANT_MW, "power_instant_mw", NUMBER, 1) \
    X(POWER_AVG_MW, "power_avg_mw", NUMBER, 1) \
    X(POWER_LIMIT_MW, "power_limit_mw", NUMBER, 1) \
    X(POWER_DEFAULT_LIMIT_MW, "power_default_limit_mw", NUMBER, 1) \
    X(POWER_MIN_LIMIT_MW, "power_min_limit_mw", NUMBER, 1) \
    X(POWER_MAX_LIMIT_MW, "power_max_limit_mw", NUMBER, 1) \
    X(ENERGY_MJ, "energy_mj", NUMBER, 1) \
    X(TEMP_GPU, "temp_gpu", NUMBER, 1) \
    X(TEMP_MEM, "temp_mem", NUMBER, 1) \
    X(TEMP_SHUTDOWN, "temp_shutdown", NUMBER, 1) \
    X(TEMP_SLOWDOWN, "temp_slowdown", NUMBER, 1) \
    X(TEMP_MEM_MAX, "temp_mem_max", NUMBER, 1) \
    X(TEMP_GPU_MAX, "temp_gpu_max", NUMBER, 1) \
    X(CLOCK_GRAPHICS, "clock_graphics", NUMBER, 1) \
    X(CLOCK_SM, "clock_sm", NUMBER, 1) \
    X(CLOCK_MEM, "clock_mem", NUMBER, 1) \
    X(CLOCK_VIDEO, "clock_video", NUMBER, 1) \
    X(CLOCK_MAX_GRAPHICS, "clock_max_graphics", NUMBER, 1) \
    X(CLOCK_MAX_SM, "clock_max_sm", NUMBER, 1) \
    X(CLOCK_MAX_MEM, "clock_max_mem", NUMBER, 1) \
    X(CLOCK_MAX_VIDEO, "clock_max_video", NUMBER, 1) \
    X(PSTATE, "pstate", NUMBER, 1) \
    X(CLOCKS_EVENT_REASONS, "clocks_event_reasons", NUMBER, 1) \
    X(ECC_MODE, "ecc_mode", NUMBER, 1) \
    X(ECC_MODE_PENDING, "ecc_mode_pending", NUMBER, 1) \
    X(REMAPPED_CORRECTABLE, "remapped_correctable", NUMBER, 1) \
    X(REMAPPED_UNCORRECTABLE, "remapped_uncorrectable", NUMBER, 1) \
    X(REMAPPED_PENDING, "remapped_pending", NUMBER, 1) \
    X(REMAPPED_FAILURE, "remapped_failure", NUMBER, 1) \
    X(RETIRED_SBE, "retired_sbe", NUMBER, 1) \
    X(RETIRED_DBE, "retired_dbe", NUMBER, 1) \
    X(RETIRED_PENDING, "retired_pending", NUMBER, 1) \
    X(PCIE_REPLAY, "pcie_replay", NUMBER, 1) \
    X(PCIE_GEN, "pcie_gen", NUMBER, 1) \
    X(PCIE_GEN_MAX, "pcie_gen_max", NUMBER, 1) \
    X(PCIE_WIDTH, "pcie_width", NUMBER, 1) \
    X(PCIE_WIDTH_MAX, "pcie_width_max", NUMBER, 1) \
    X(PCIE_TX_BYTES, "pcie_tx_bytes", NUMBER, 1) \
    X(PCIE_RX_BYTES, "pcie_rx_bytes", NUMBER, 1) \
    X(PCIE_TX_RATE, "pcie_tx_rate", NUMBER, 1) \
    X(PCIE_RX_RATE, "pcie_rx_rate", NUMBER, 1) \
    X(GPM_SUPPORT, "gpm_support", NUMBER, 1) \
    X(RECOVERY_ACTION, "recovery_action", NUMBER, 1) \
    X(EVENT_TYPES, "event_types", NUMBER, 1) \
    X(PROC_SAMPLE_MS, "proc_sample_ms", NUMBER, 1) \
    X(PROC_GROW, "proc_grow", NUMBER, 1) \
    X(PROC_UTIL_GARBAGE, "proc_util_garbage", NUMBER, 1) \
    X(PROC_UTIL_ZERO, "proc_util_zero", NUMBER, 1)

enum Kind {
#define X(id, name, form, scale) K_##id,
    GPU_KEYS(X)
#undef X
    /* Keys with an index. */
    K_FAIL,           /* a: function + 1, 0: every function */
    K_HANG,           /* likewise */
    K_FIELD,          /* a: field id; b: 0 without a scope, else scope + 1 */
    K_FIELD_ERROR,
    K_FIELD_TYPE,
    K_GPM,            /* a: metric id */
    K_MIG_GPM,        /* a: metric id; b: MIG index */
    K_MIG,            /* a: MIG index */
    K_PROC,           /* a: process id */
    K_EVENT,
    K_ECC,            /* a: type * 2 + counter; b: 0 total, else location + 1 */
    K_NVLINK_COUNT,
    K_NVLINK,         /* a: enum LinkValue; b: link + 1, 0: every link */
    /* Keys without a GPU. */
    K_GPU_COUNT,
    K_DRIVER_VERSION,
    K_DRIVER_CUDA,
    K_DRIVER_NVML,
    K_DRIVER_STATE,
    K_DRIVER_GENERATION,
};

/* The order of the first five is that of the driver's enumeration of link error counters. */
#define LINK_VALUES(X) \
    X(REPLAY, "replay") X(RECOVERY, "recovery") X(CRC_FLIT, "crc_flit") X(CRC_DATA, "crc_data") \
    X(ECC_DATA, "ecc_data") X(STATE, "state") X(SPEED_MBPS, "speed_mbps") X(TX_BYTES, "tx_bytes") \
    X(RX_BYTES, "rx_bytes") X(TX_RATE, "tx_rate") X(RX_RATE, "rx_rate")

enum LinkValue {
#define X(id, name) LINK_##id,
    LINK_VALUES(X)
#undef X
    LINK_VALUE_COUNT,
};

enum DriverState { DRIVER_OK, DRIVER_NOT_LOADED, DRIVER_VERSION_MISMATCH, DRIVER_RELOADING };

enum ProcessType { PROC_GONE, PROC_COMPUTE, PROC_GRAPHICS, PROC_MPS };

typedef struct {
    enum ProcessType type;
    uint64_t memory; /* bytes, UINT64_MAX: not available */
    uint32_t sm, mem, enc, dec;
    uint32_t gi, ci; /* UINT32_MAX: none */
} Process;

typedef struct {
    bool gone;
    const char *uuid, *profile;
    uint32_t gi, ci, slices, ci_slices, sm, copy_engines, decoders, encoders, jpegs, ofas;
    uint64_t total, used, reserved;
} Mig;

typedef struct {
    uint64_t type, data;
    uint32_t gi, ci;
    bool seen; /* was offered to the event sets already */
} Event;

/* One line of the file: from `at` on, the key has this value. */
typedef struct {
    uint64_t key;
    double at;
    double number;   /* NaN: unset */
    double integral; /* of the number from 0 to `at`, unset parts counting nothing */
    const char *text;
    uint32_t record; /* index into processes, migs or events, by kind */
    uint32_t line;
} Step;

typedef struct {
    uint64_t key;
    uint32_t first, count;
} Series;

typedef struct {
    char *text; /* the file, cut into strings that the steps point into */
    Step *steps;
    uint32_t step_count, step_room;
    Series *series;
    uint32_t series_count;
    Process *processes;
    uint32_t process_count, process_room;
    Mig *migs;
    uint32_t mig_count, mig_room;
    Event *events;
    uint32_t event_count, event_room;
    double clock_start; /* NaN: not given */
    bool trouble[MAX_GPUS + 2]; /* by owner: it has fail or hang lines, so calls must look for them */
} Scenario;

/* Takes over `text` (size bytes and room for one more). NULL after a line on stderr that
 * names path:line. */
Scenario *scenario_parse(const char *path, char *text, size_t size);
void scenario_free(Scenario *scenario);

uint64_t scenario_key(unsigned owner, enum Kind kind, uint32_t a, uint32_t b);
const Series *scenario_series(const Scenario *scenario, uint64_t key);
/* The step in force at time t, NULL before the first. */
const Step *scenario_step(const Scenario *scenario, const Series *series, double t);
/* gpu.N's step at t, else gpu.*'s. */
const Step *scenario_find(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t a, uint32_t b,
                          double t);
double scenario_number(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t a, uint32_t b,
                       double t);
bool scenario_has(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t a, uint32_t b);
/* Integral of the number from time 0 to t. */
double scenario_integral(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t a, uint32_t b,
                         double t);
/* The half-open range of series of one kind of one owner. */
void scenario_range(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t *first,
                    uint32_t *last);

/* The driver's functions by number; the driver side lists them. -1: no such function. */
int function_number(const char *name);

#pragma GCC visibility pop
#endif

/* Values that come as lists: samples, field values, processes and their utilization. In flow handles and the
 * last timestamp that the caller saw, out flow the scenario's steps as the driver would have sampled them. */
#include "driver.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double RING_SAMPLES = 120;

/* ---- samples ---- */

static const enum Kind SAMPLE_KINDS[] = {
    K_POWER_MW, K_UTIL_GPU,  K_UTIL_MEM, K_UTIL_ENC, K_UTIL_DEC,
    K_CLOCK_SM, K_CLOCK_MEM, K_POWER_MW, K_UTIL_JPG, K_UTIL_OFA,
};

static double or_default(double value, double fallback)
{
    return value > 0 ? value : fallback;
}

/* Tick numbers of the ring at this time: one sample each period, the oldest overwritten. */
static void ring(const Call *call, double period, int64_t *first, int64_t *last)
{
    double count = fmin(or_default(number(call, K_SAMPLE_COUNT), RING_SAMPLES), RING_SAMPLES);
    *last = (int64_t)floor(fmax(call->t, 0) / period);
    *first = *last - (int64_t)count + 1;
    if (*first < 0)
        *first = 0;
}

/* What fits of the samples after last_seen, oldest first so that none is skipped. */
static unsigned fill_samples(Call *call, enum Kind kind, uint64_t last_seen, nvmlSample_t *samples,
                             unsigned room)
{
    double period = or_default(number(call, K_SAMPLE_PERIOD_MS), 20) / 1000;
    double now = call->t;
    int64_t first, last;
    unsigned count = 0;
    ring(call, period, &first, &last);
    for (int64_t tick = first; tick <= last && count < room; tick++) {
        call->t = (double)tick * period;
        uint64_t stamp = wall_us(call->t);
        double value = number(call, kind);
        if (stamp <= last_seen || isnan(value))
            continue;
        samples[count++] = (nvmlSample_t){stamp, {.ullVal = to_u32(value)}};
    }
    call->t = now;
    return count;
}

/* Without samples, tells the ring's size, however many samples it holds. */
EXPORT nvmlReturn_t nvmlDeviceGetSamples(nvmlDevice_t handle, unsigned type, unsigned long long last_seen,
                                         unsigned *value_type, unsigned *count, nvmlSample_t *samples)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetSamples, handle, &call);
    if (result)
        return result;
    if (!value_type || !count || type > SAMPLES_OFA)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    enum Kind kind = SAMPLE_KINDS[type];
    bool utilization = type != SAMPLES_POWER && type != SAMPLES_MODULE_POWER;
    if (call.mig || (utilization && mig_enabled(&call)) || isnan(number(&call, kind)))
        return leave(NVML_ERROR_NOT_SUPPORTED);
    *value_type = VALUE_UINT;
    if (!samples) {
        *count = (unsigned)RING_SAMPLES;
        return leave(NVML_SUCCESS);
    }
    *count = fill_samples(&call, kind, last_seen, samples, *count);
    return leave(*count ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND);
}

/* ---- field values ---- */

typedef struct {
    uint32_t id;
    unsigned type;
    int kind; /* -1: worked out in derived_field */
} Field;

static const Field FIELDS[] = {
    {1, VALUE_UINT, K_ECC_MODE},
    {2, VALUE_UINT, K_ECC_MODE_PENDING},
    {29, VALUE_UINT, K_RETIRED_SBE},
    {30, VALUE_UINT, K_RETIRED_DBE},
    {31, VALUE_UINT, K_RETIRED_PENDING},
    {82, VALUE_UINT, K_TEMP_MEM},
    {83, VALUE_ULONGLONG, -1},
    {90, VALUE_UINT, -1},
    {91, VALUE_UINT, K_NVLINK_COUNT},
    {94, VALUE_UINT, K_PCIE_REPLAY},
    {138, VALUE_ULONGLONG, -1},
    {139, VALUE_ULONGLONG, -1},
    {140, VALUE_ULONGLONG, -1},
    {141, VALUE_ULONGLONG, -1},
    {142, VALUE_UINT, K_REMAPPED_CORRECTABLE},
    {143, VALUE_UINT, K_REMAPPED_UNCORRECTABLE},
    {144, VALUE_UINT, K_REMAPPED_PENDING},
    {145, VALUE_UINT, K_REMAPPED_FAILURE},
    {164, VALUE_UINT, -1},
    {165, VALUE_UINT, -1},
    {185, VALUE_UINT, -1},
    {186, VALUE_UINT, -1},
    {187, VALUE_UINT, K_POWER_MIN_LIMIT_MW},
    {188, VALUE_UINT, K_POWER_MAX_LIMIT_MW},
    {189, VALUE_UINT, K_POWER_DEFAULT_LIMIT_MW},
    {190, VALUE_UINT, K_POWER_LIMIT_MW},
    {191, VALUE_ULONGLONG, -1},
    {192, VALUE_UINT, K_POWER_LIMIT_MW},
    {193, VALUE_INT, -1},
    {194, VALUE_INT, -1},
    {195, VALUE_INT, -1},
    {196, VALUE_INT, -1},
    {197, VALUE_ULONGLONG, -1},
    {198, VALUE_ULONGLONG, -1},
    {202, VALUE_ULONGLONG, -1},
    {204, VALUE_ULONGLONG, -1},
    {230, VALUE_UINT, K_RECOVERY_ACTION},
};

static const Field *known_field(uint32_t id)
{
    for (size_t i = 0; i < sizeof FIELDS / sizeof *FIELDS; i++)
        if (FIELDS[i].id == id)
            return &FIELDS[i];
    return NULL;
}

static double sum_links(const Call *call, enum LinkValue counter, enum LinkValue rate)
{
    double sum = NAN;
    unsigned links = to_u32(number(call, K_NVLINK_COUNT));
    for (unsigned link = 0; link < links && link < MAX_LINKS; link++) {
        double part = link_total(call, counter, rate, link);
        if (!isnan(part))
            sum = isnan(sum) ? part : sum + part;
    }
    return sum;
}

/* A link's bytes, or with the scope UINT_MAX those of all links. */
static double link_bytes(const Call *call, uint32_t scope, bool sent)
{
    enum LinkValue counter = sent ? LINK_TX_BYTES : LINK_RX_BYTES, rate = sent ? LINK_TX_RATE : LINK_RX_RATE;
    if (scope == UINT32_MAX)
        return sum_links(call, counter, rate);
    return scope < to_u32(number(call, K_NVLINK_COUNT)) ? link_total(call, counter, rate, scope) : NAN;
}

/* Fields 3 to 28: totals, then single/double bit pairs by location, of which CBU has only the double bit one.
 */
static double ecc_field(const Call *call, uint32_t id)
{
    static const unsigned LOCATIONS[] = {0, 1, 2, 3, 4};
    if (id <= 6)
        return ecc_total(call, (id - 3) % 2, (id - 3) / 2);
    unsigned counter = id >= 18, place = id - (counter ? 18 : 7);
    unsigned type = place == 10 ? 1 : place % 2, location = place == 10 ? 6 : LOCATIONS[place / 2];
    return number(call, K_ECC_MODE) == 0 ? NAN : indexed(call, K_ECC, type * 2 + counter, location + 1);
}

static double first_given(double wanted, double fallback)
{
    return isnan(wanted) ? fallback : wanted;
}

static double derived_field(const Call *call, uint32_t id, uint32_t scope)
{
    if (id >= 3 && id <= 28)
        return ecc_field(call, id);
    switch (id) {
    case 83:
    case 191:
        return energy(call);
    case 90:
        return link_number(call, LINK_SPEED_MBPS, 0);
    case 138:
    case 140:
        return link_bytes(call, scope, true) / 1024;
    case 139:
    case 141:
        return link_bytes(call, scope, false) / 1024;
    case 164:
        return scope < MAX_LINKS ? link_number(call, LINK_SPEED_MBPS, scope) : NAN;
    case 165:
        return scope < to_u32(number(call, K_NVLINK_COUNT))
                   ? first_given(link_number(call, LINK_STATE, scope), 1)
                   : NAN;
    case 185:
        return first_given(number(call, K_POWER_AVG_MW), number(call, K_POWER_MW));
    case 186:
        return first_given(number(call, K_POWER_INSTANT_MW), number(call, K_POWER_MW));
    case 197:
        return pcie_total(call, K_PCIE_TX_BYTES, K_PCIE_TX_RATE);
    case 198:
        return pcie_total(call, K_PCIE_RX_BYTES, K_PCIE_RX_RATE);
    case 202:
        return link_bytes(call, scope, true);
    case 204:
        return link_bytes(call, scope, false);
    default:
        return NAN;
    }
}

static const Step *field_step(const Call *call, enum Kind kind, uint32_t id, uint32_t scope)
{
    const Step *step =
        scenario_find(call->scenario, call->gpu, kind, id, scope == UINT32_MAX ? 0xFFFF : scope + 1, call->t);
    return step ? step : scenario_find(call->scenario, call->gpu, kind, id, 0, call->t);
}

/* An integer too large for a double keeps its digits. */
static void put_number(nvmlFieldValue_t *field, double value, const char *digits)
{
    memset(&field->value, 0, sizeof field->value);
    switch (field->valueType) {
    case VALUE_DOUBLE:
        field->value.dVal = value;
        break;
    case VALUE_INT:
        field->value.siVal = (int)fmax(-2147483648.0, fmin(2147483647.0, value));
        break;
    case VALUE_SLONGLONG:
        field->value.sllVal =
            value < 0 ? -(long long)(to_u64(-value) & INT64_MAX) : (long long)(to_u64(value) & INT64_MAX);
        break;
    case VALUE_UINT:
        field->value.uiVal = to_u32(value);
        break;
    case VALUE_USHORT:
        field->value.usVal = (unsigned short)fmax(0, fmin(65535, value));
        break;
    default:
        field->value.ullVal = digits && strspn(digits, "0123456789") == strlen(digits)
                                  ? strtoull(digits, NULL, 10)
                                  : to_u64(value);
    }
}

static unsigned plain_type(const char *digits, double value)
{
    return digits && strpbrk(digits, ".eE") && !strpbrk(digits, "xX") ? VALUE_DOUBLE
           : value < 0                                                ? VALUE_SLONGLONG
                                                                      : VALUE_ULONGLONG;
}

static nvmlReturn_t read_field(const Call *call, nvmlFieldValue_t *field)
{
    uint32_t id = field->fieldId, scope = field->scopeId;
    const Step *error = field_step(call, K_FIELD_ERROR, id, scope);
    if (error && error->number > 0)
        return (nvmlReturn_t)to_u32(error->number);
    const Field *known = known_field(id);
    const Step *given = field_step(call, K_FIELD, id, scope),
               *type = field_step(call, K_FIELD_TYPE, id, scope);
    double value = given                       ? given->number
                   : known && known->kind >= 0 ? number(call, (enum Kind)known->kind)
                                               : derived_field(call, id, scope);
    if (isnan(value) || call->mig)
        return NVML_ERROR_NOT_SUPPORTED;
    field->valueType = type && !isnan(type->number) ? to_u32(type->number)
                       : known                      ? known->type
                                                    : plain_type(given ? given->text : NULL, value);
    put_number(field, value, given ? given->text : NULL);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t handle, int count, nvmlFieldValue_t *fields)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetFieldValues, handle, &call);
    if (result)
        return result;
    if (!fields || count <= 0)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    for (int i = 0; i < count; i++) {
        fields[i].timestamp = (int64_t)wall_us(call.t);
        fields[i].latencyUsec = 1;
        fields[i].nvmlReturn = read_field(&call, &fields[i]);
    }
    return leave(NVML_SUCCESS);
}

/* ---- processes ---- */

static bool belongs(const Call *call, const Process *process)
{
    return !call->mig
           || (process->gi == call->mig->gi && (process->ci == call->mig->ci || process->ci == UINT32_MAX));
}

static const Process *process_at(const Call *call, const Series *series, double t)
{
    const Step *step = scenario_step(call->scenario, series, t);
    return step ? &call->scenario->processes[step->record] : NULL;
}

static uint32_t process_id(const Series *series)
{
    return (uint32_t)(series->key >> 16);
}

/* Counts all, fills what fits. */
static unsigned fill_processes(const Call *call, enum ProcessType type, nvmlProcessInfo_t *infos,
                               unsigned room)
{
    uint32_t first, last;
    unsigned count = 0;
    scenario_range(call->scenario, call->gpu, K_PROC, &first, &last);
    for (uint32_t i = first; i < last; i++) {
        const Series *series = &call->scenario->series[i];
        const Process *process = process_at(call, series, call->t);
        if (!process || process->type != type || !belongs(call, process))
            continue;
        if (infos && count < room)
            infos[count] = (nvmlProcessInfo_t){process_id(series), process->memory, process->gi, process->ci};
        count++;
    }
    return count;
}

/* proc_grow = N: between the call that asks for the size and the one that reads, N more processes start. */
static unsigned grow(const Call *call, nvmlProcessInfo_t *infos, unsigned room, unsigned count)
{
    unsigned more = to_u32(fmin(fmax(0, number(call, K_PROC_GROW)), MAX_PROCESSES));
    for (unsigned i = 0; i < more; i++, count++)
        if (count < room)
            infos[count] = (nvmlProcessInfo_t){4000000 + i, 1048576, UINT32_MAX, UINT32_MAX};
    return count;
}

static nvmlReturn_t list_processes(Function function, nvmlDevice_t handle, enum ProcessType type,
                                   unsigned *count, nvmlProcessInfo_t *infos)
{
    Call call;
    nvmlReturn_t result = enter_device(function, handle, &call);
    if (result)
        return result;
    if (!count)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    unsigned room = infos ? *count : 0;
    unsigned found = fill_processes(&call, type, infos, room);
    if (infos && type == PROC_COMPUTE)
        found = grow(&call, infos, room, found);
    *count = found;
    return leave(found > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS);
}

#define PROCESS_LIST(function, type)                                                                         \
    EXPORT nvmlReturn_t function(nvmlDevice_t handle, unsigned *count, nvmlProcessInfo_t *infos)             \
    {                                                                                                        \
        return list_processes(FN_##function, handle, type, count, infos);                                    \
    }

PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v2, PROC_COMPUTE)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, PROC_GRAPHICS)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, PROC_MPS)
#ifndef FAKE_NVML_OLD
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v3, PROC_COMPUTE)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, PROC_GRAPHICS)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, PROC_MPS)
#endif

/* ---- process utilization ---- */

static bool is_busy(const Process *process)
{
    return process->type != PROC_GONE && (process->sm || process->mem || process->enc || process->dec);
}

typedef struct {
    const Process *process;
    uint64_t stamp;
} Busy;

/* The newest sample tick after last_seen at which the process did something, from the newest step back. */
static bool last_busy(const Call *call, const Series *series, double period, uint64_t last_seen, Busy *busy)
{
    const Step *steps = call->scenario->steps + series->first;
    const Step *newest = scenario_step(call->scenario, series, call->t);
    double tick = floor(fmax(call->t, 0) / period), oldest = tick - RING_SAMPLES;
    for (ptrdiff_t i = newest ? newest - steps : -1; i >= 0; i--) {
        const Step *step = &steps[i];
        if (step->at > tick * period)
            continue; /* no tick fell into this step */
        if (tick < 0 || tick <= oldest || wall_us(tick * period) <= last_seen)
            return false;
        const Process *process = &call->scenario->processes[step->record];
        if (is_busy(process)) {
            *busy = (Busy){process, wall_us(tick * period)};
            return true;
        }
        tick = ceil(step->at / period) - 1; /* the last tick before this step began */
    }
    return false;
}

typedef void (*PutUtilization)(void *entries, unsigned index, unsigned pid, const Busy *busy);

static void put_sample(void *entries, unsigned index, unsigned pid, const Busy *busy)
{
    const Process *p = busy->process;
    ((nvmlProcessUtilizationSample_t *)entries)[index] =
        (nvmlProcessUtilizationSample_t){pid, busy->stamp, p->sm, p->mem, p->enc, p->dec};
}

static unsigned fill_utilization(const Call *call, uint64_t last_seen, void *entries, unsigned room,
                                 PutUtilization put)
{
    static const Process WILD = {
        .type = PROC_COMPUTE, .sm = 4294967295u, .mem = 3000000000u, .enc = 257, .dec = 999};
    double period = or_default(number(call, K_PROC_SAMPLE_MS), 100) / 1000;
    uint32_t first, last;
    unsigned count = 0;
    Busy busy;
    scenario_range(call->scenario, call->gpu, K_PROC, &first, &last);
    for (uint32_t i = first; i < last; i++) {
        const Series *series = &call->scenario->series[i];
        if (!last_busy(call, series, period, last_seen, &busy))
            continue;
        if (count < room)
            put(entries, count, process_id(series), &busy);
        count++;
    }
    if (number(call, K_PROC_UTIL_GARBAGE) > 0)
        for (unsigned i = 0; i < 2; i++, count++)
            if (count < room) {
                busy = (Busy){&WILD, i ? UINT64_MAX - 7 : 0};
                put(entries, count, i ? 3735928559u : 0, &busy);
            }
    return count;
}

static nvmlReturn_t utilization(Call *call, uint64_t last_seen, void *entries, unsigned *count,
                                PutUtilization put)
{
    if (call->mig || mig_enabled(call))
        return NVML_ERROR_NOT_SUPPORTED;
    if (!entries && number(call, K_PROC_UTIL_ZERO) > 0) {
        *count = 0;
        return NVML_SUCCESS;
    }
    unsigned room = entries ? *count : 0;
    *count = fill_utilization(call, last_seen, entries, room, put);
    return !*count ? NVML_ERROR_NOT_FOUND : *count > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t handle,
                                                    nvmlProcessUtilizationSample_t *samples, unsigned *count,
                                                    unsigned long long last_seen)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetProcessUtilization, handle, &call);
    if (result)
        return result;
    return leave(count ? utilization(&call, last_seen, samples, count, put_sample)
                       : NVML_ERROR_INVALID_ARGUMENT);
}

#ifndef FAKE_NVML_OLD
static void put_info(void *entries, unsigned index, unsigned pid, const Busy *busy)
{
    const Process *p = busy->process;
    ((nvmlProcessUtilizationInfo_v1_t *)entries)[index] =
        (nvmlProcessUtilizationInfo_v1_t){.timeStamp = busy->stamp,
                                          .pid = pid,
                                          .smUtil = p->sm,
                                          .memUtil = p->mem,
                                          .encUtil = p->enc,
                                          .decUtil = p->dec};
}

EXPORT nvmlReturn_t nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t handle,
                                                          nvmlProcessesUtilizationInfo_v1_t *info)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetProcessesUtilizationInfo, handle, &call);
    if (result)
        return result;
    if (!info)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    if (info->version != VERSION_WORD(nvmlProcessesUtilizationInfo_v1_t, 1))
        return leave(NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    return leave(utilization(&call, info->lastSeenTimeStamp, info->procUtilArray, &info->processSamplesCount,
                             put_info));
}
#endif

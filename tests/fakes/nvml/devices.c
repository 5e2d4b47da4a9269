/* Handles, identity and single values of a GPU or MIG instance. In flow handles, out flow the scenario's
 * values at the time of the call. A value that the scenario does not give is NOT_SUPPORTED, as on a GPU that
 * lacks it. */
#include "driver.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static nvmlReturn_t put_text(char *out, unsigned size, const char *found)
{
    if (!out)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (!found)
        return NVML_ERROR_NOT_SUPPORTED;
    if (strlen(found) >= size)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, found);
    return NVML_SUCCESS;
}

static nvmlReturn_t put_u32(unsigned *out, double value)
{
    if (!out)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (isnan(value))
        return NVML_ERROR_NOT_SUPPORTED;
    *out = to_u32(value);
    return NVML_SUCCESS;
}

static nvmlReturn_t put_u64(unsigned long long *out, double value)
{
    if (!out)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (isnan(value))
        return NVML_ERROR_NOT_SUPPORTED;
    *out = to_u64(value);
    return NVML_SUCCESS;
}

/* Most values exist for whole GPUs only. */
static nvmlReturn_t enter_whole(Function function, nvmlDevice_t handle, Call *call)
{
    nvmlReturn_t result = enter_device(function, handle, call);
    if (!result && call->mig)
        return leave(NVML_ERROR_NOT_SUPPORTED);
    return result;
}

static nvmlReturn_t get_u32(Function function, nvmlDevice_t handle, enum Kind kind, unsigned *out)
{
    Call call;
    nvmlReturn_t result = enter_whole(function, handle, &call);
    return result ? result : leave(put_u32(out, number(&call, kind)));
}

/* ---- handles ---- */

static void default_uuid(unsigned gpu, char *out, size_t size)
{
    snprintf(out, size, "GPU-00000000-0000-0000-0000-%012x", gpu);
}

typedef struct {
    unsigned domain, bus, device;
} BusId;

static bool parse_bus_id(const char *words, BusId *id)
{
    return sscanf(words, "%8x:%8x:%8x", &id->domain, &id->bus, &id->device) == 3;
}

static BusId bus_id_of(const Call *call)
{
    BusId id = {0, call->gpu + 1, 0};
    const char *given = text(call, K_PCI_BUS_ID);
    if (given)
        parse_bus_id(given, &id);
    return id;
}

EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count)
{
    Call call;
    nvmlReturn_t result = enter(FN_nvmlDeviceGetCount_v2, &call);
    return result ? result : leave(put_u32(count, gpu_count(&call)));
}

static nvmlReturn_t put_handle(nvmlDevice_t *out, unsigned gpu, int mig_index)
{
    if (!out)
        return NVML_ERROR_INVALID_ARGUMENT;
    *out = make_handle(gpu, mig_index);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *handle)
{
    Call call;
    nvmlReturn_t result = enter_gpu(FN_nvmlDeviceGetHandleByIndex_v2, index, &call);
    return result ? result : leave(put_handle(handle, index, -1));
}

/* Finds the GPU, and in mig_index the instance or -1. */
static bool find_uuid(Call *call, const char *uuid, int *mig_index)
{
    char fallback[64];
    unsigned count = gpu_count(call);
    for (call->gpu = 0; call->gpu < count; call->gpu++) {
        const char *given = text(call, K_UUID);
        default_uuid(call->gpu, fallback, sizeof fallback);
        *mig_index = -1;
        if (!strcmp(given ? given : fallback, uuid))
            return true;
        for (int i = 0; mig_enabled(call) && i < MAX_MIG; i++) {
            const Mig *mig = mig_at(call, call->gpu, (unsigned)i);
            *mig_index = i;
            if (mig && !strcmp(mig->uuid, uuid))
                return true;
        }
    }
    return false;
}

static bool find_bus_id(Call *call, const char *words)
{
    BusId wanted;
    unsigned count = gpu_count(call);
    if (!parse_bus_id(words, &wanted))
        return false;
    for (call->gpu = 0; call->gpu < count; call->gpu++) {
        BusId id = bus_id_of(call);
        if (id.domain == wanted.domain && id.bus == wanted.bus && id.device == wanted.device)
            return true;
    }
    return false;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *handle)
{
    Call call;
    nvmlReturn_t result = enter(FN_nvmlDeviceGetHandleByUUID, &call);
    if (result)
        return result;
    if (!uuid || !find_uuid(&call, uuid, &call.mig_index))
        return leave(uuid ? NVML_ERROR_NOT_FOUND : NVML_ERROR_INVALID_ARGUMENT);
    result = admit_gpu(FN_nvmlDeviceGetHandleByUUID, &call);
    return result ? result : leave(put_handle(handle, call.gpu, call.mig_index));
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *handle)
{
    Call call;
    nvmlReturn_t result = enter(FN_nvmlDeviceGetHandleByPciBusId_v2, &call);
    if (result)
        return result;
    if (!bus_id || !find_bus_id(&call, bus_id))
        return leave(bus_id ? NVML_ERROR_NOT_FOUND : NVML_ERROR_INVALID_ARGUMENT);
    result = admit_gpu(FN_nvmlDeviceGetHandleByPciBusId_v2, &call);
    return result ? result : leave(put_handle(handle, call.gpu, -1));
}

/* ---- identity ---- */

EXPORT nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t handle, char *uuid, unsigned size)
{
    Call call;
    char fallback[64];
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetUUID, handle, &call);
    if (result)
        return result;
    const char *given = call.mig ? call.mig->uuid : text(&call, K_UUID);
    default_uuid(call.gpu, fallback, sizeof fallback);
    return leave(put_text(uuid, size, given ? given : fallback));
}

EXPORT nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t handle, char *name, unsigned size)
{
    Call call;
    char whole[512];
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetName, handle, &call);
    if (result)
        return result;
    const char *given = text(&call, K_NAME);
    snprintf(whole, sizeof whole, "%s%s%s", given ? given : "NVIDIA Fake GPU", call.mig ? " MIG " : "",
             call.mig ? call.mig->profile : "");
    return leave(put_text(name, size, whole));
}

static nvmlReturn_t get_text(Function function, nvmlDevice_t handle, enum Kind kind, char *out, unsigned size)
{
    Call call;
    nvmlReturn_t result = enter_whole(function, handle, &call);
    return result ? result : leave(put_text(out, size, text(&call, kind)));
}

EXPORT nvmlReturn_t nvmlDeviceGetSerial(nvmlDevice_t handle, char *serial, unsigned size)
{
    return get_text(FN_nvmlDeviceGetSerial, handle, K_SERIAL, serial, size);
}

EXPORT nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t handle, char *version, unsigned size)
{
    return get_text(FN_nvmlDeviceGetVbiosVersion, handle, K_VBIOS, version, size);
}

EXPORT nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t handle, unsigned *index)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetIndex, handle, &call);
    return result ? result : leave(put_u32(index, call.mig ? call.mig_index : (double)call.gpu));
}

EXPORT nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t handle, unsigned *minor)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetMinorNumber, handle, &call);
    if (result)
        return result;
    double given = number(&call, K_MINOR);
    return leave(put_u32(minor, isnan(given) ? call.gpu : given));
}

EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t handle, nvmlPciInfo_t *info)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetPciInfo_v3, handle, &call);
    if (result)
        return result;
    if (!info)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    BusId id = bus_id_of(&call);
    *info = (nvmlPciInfo_t){.domain = id.domain, .bus = id.bus, .device = id.device};
    snprintf(info->busId, sizeof info->busId, "%08X:%02X:%02X.0", id.domain, id.bus, id.device);
    snprintf(info->busIdLegacy, sizeof info->busIdLegacy, "%04X:%02X:%02X.0", id.domain & 0xFFFF,
             id.bus & 0xFF, id.device & 0xFF);
    info->pciDeviceId = to_u32(number(&call, K_PCI_DEVICE_ID));
    return leave(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t handle, int *major, int *minor)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetCudaComputeCapability, handle, &call);
    if (result)
        return result;
    const char *words = text(&call, K_COMPUTE_CAPABILITY);
    if (!major || !minor)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    *major = *minor = 0;
    return leave(words && sscanf(words, "%4d.%4d", major, minor) ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED);
}

EXPORT nvmlReturn_t nvmlDeviceGetBrand(nvmlDevice_t handle, unsigned *brand)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetBrand, handle, &call);
    if (result)
        return result;
    double given = number(&call, K_BRAND);
    return leave(put_u32(brand, isnan(given) ? 14 : given)); /* 14: NVIDIA */
}

/* ---- memory ---- */

typedef struct {
    double total, used, reserved;
} Memory;

static nvmlReturn_t memory_of(const Call *call, Memory *memory)
{
    *memory = call->mig
                  ? (Memory){(double)call->mig->total, (double)call->mig->used, (double)call->mig->reserved}
                  : (Memory){number(call, K_TOTAL_BYTES), number(call, K_USED_BYTES),
                             number(call, K_RESERVED_BYTES)};
    if (isnan(memory->total) || isnan(memory->used))
        return NVML_ERROR_NOT_SUPPORTED;
    if (isnan(memory->reserved))
        memory->reserved = 0;
    return NVML_SUCCESS;
}

/* The first version knows no reserved part: it lies inside used. */
EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t handle, nvmlMemory_t *info)
{
    Call call;
    Memory memory;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetMemoryInfo, handle, &call);
    if (result)
        return result;
    result = info ? memory_of(&call, &memory) : NVML_ERROR_INVALID_ARGUMENT;
    if (result)
        return leave(result);
    info->total = to_u64(memory.total);
    info->used = to_u64(memory.used + memory.reserved);
    info->free = to_u64(memory.total - memory.used - memory.reserved);
    return leave(NVML_SUCCESS);
}

#ifndef FAKE_NVML_OLD
EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t handle, nvmlMemory_v2_t *info)
{
    Call call;
    Memory memory;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetMemoryInfo_v2, handle, &call);
    if (result)
        return result;
    result = info ? memory_of(&call, &memory) : NVML_ERROR_INVALID_ARGUMENT;
    if (!result && info->version != VERSION_WORD(nvmlMemory_v2_t, 2))
        result = NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (result)
        return leave(result);
    info->total = to_u64(memory.total);
    info->used = to_u64(memory.used);
    info->reserved = to_u64(memory.reserved);
    info->free = to_u64(memory.total - memory.used - memory.reserved);
    return leave(NVML_SUCCESS);
}
#endif

EXPORT nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t handle, nvmlBAR1Memory_t *info)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetBAR1MemoryInfo, handle, &call);
    if (result)
        return result;
    double total = number(&call, K_BAR1_TOTAL_BYTES), used = number(&call, K_BAR1_USED_BYTES);
    if (!info || isnan(total) || isnan(used))
        return leave(info ? NVML_ERROR_NOT_SUPPORTED : NVML_ERROR_INVALID_ARGUMENT);
    *info = (nvmlBAR1Memory_t){to_u64(total), to_u64(total - used), to_u64(used)};
    return leave(NVML_SUCCESS);
}

/* ---- utilization ---- */

EXPORT nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t handle, nvmlUtilization_t *rates)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetUtilizationRates, handle, &call);
    if (result)
        return result;
    if (!rates)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    double gpu = number(&call, K_UTIL_GPU), memory = number(&call, K_UTIL_MEM);
    if (mig_enabled(&call) || isnan(gpu))
        return leave(NVML_ERROR_NOT_SUPPORTED);
    *rates = (nvmlUtilization_t){to_u32(gpu), isnan(memory) ? 0 : to_u32(memory)};
    return leave(NVML_SUCCESS);
}

static nvmlReturn_t engine(Function function, nvmlDevice_t handle, enum Kind kind, unsigned *rate,
                           unsigned *period)
{
    Call call;
    nvmlReturn_t result = enter_whole(function, handle, &call);
    if (result)
        return result;
    if (mig_enabled(&call))
        return leave(NVML_ERROR_NOT_SUPPORTED);
    result = put_u32(period, 167000);
    return leave(result ? result : put_u32(rate, number(&call, kind)));
}

EXPORT nvmlReturn_t nvmlDeviceGetEncoderUtilization(nvmlDevice_t handle, unsigned *rate, unsigned *period)
{
    return engine(FN_nvmlDeviceGetEncoderUtilization, handle, K_UTIL_ENC, rate, period);
}

EXPORT nvmlReturn_t nvmlDeviceGetDecoderUtilization(nvmlDevice_t handle, unsigned *rate, unsigned *period)
{
    return engine(FN_nvmlDeviceGetDecoderUtilization, handle, K_UTIL_DEC, rate, period);
}

/* ---- single numbers ---- */

#define U32_VALUE(function, kind)                                                                            \
    EXPORT nvmlReturn_t function(nvmlDevice_t handle, unsigned *value)                                       \
    {                                                                                                        \
        return get_u32(FN_##function, handle, kind, value);                                                  \
    }

U32_VALUE(nvmlDeviceGetArchitecture, K_ARCH)
U32_VALUE(nvmlDeviceGetPowerUsage, K_POWER_MW)
U32_VALUE(nvmlDeviceGetEnforcedPowerLimit, K_POWER_LIMIT_MW)
U32_VALUE(nvmlDeviceGetPowerManagementLimit, K_POWER_LIMIT_MW)
U32_VALUE(nvmlDeviceGetPowerManagementDefaultLimit, K_POWER_DEFAULT_LIMIT_MW)
U32_VALUE(nvmlDeviceGetPerformanceState, K_PSTATE)
U32_VALUE(nvmlDeviceGetRetiredPagesPendingStatus, K_RETIRED_PENDING)
U32_VALUE(nvmlDeviceGetPcieReplayCounter, K_PCIE_REPLAY)
U32_VALUE(nvmlDeviceGetCurrPcieLinkGeneration, K_PCIE_GEN)
U32_VALUE(nvmlDeviceGetCurrPcieLinkWidth, K_PCIE_WIDTH)
U32_VALUE(nvmlDeviceGetMaxPcieLinkGeneration, K_PCIE_GEN_MAX)
U32_VALUE(nvmlDeviceGetMaxPcieLinkWidth, K_PCIE_WIDTH_MAX)
U32_VALUE(nvmlDeviceGetPersistenceMode, K_PERSISTENCE_MODE)
U32_VALUE(nvmlDeviceGetComputeMode, K_COMPUTE_MODE)

static nvmlReturn_t get_pair(Function function, nvmlDevice_t handle, enum Kind first, enum Kind second,
                             unsigned *a, unsigned *b)
{
    Call call;
    nvmlReturn_t result = enter_whole(function, handle, &call);
    if (result)
        return result;
    double value = number(&call, first), other = number(&call, second);
    result = put_u32(a, value);
    return leave(result ? result : put_u32(b, isnan(other) ? value : other));
}

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t handle, unsigned *least,
                                                                 unsigned *most)
{
    return get_pair(FN_nvmlDeviceGetPowerManagementLimitConstraints, handle, K_POWER_MIN_LIMIT_MW,
                    K_POWER_MAX_LIMIT_MW, least, most);
}

EXPORT nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t handle, unsigned *current, unsigned *pending)
{
    return get_pair(FN_nvmlDeviceGetEccMode, handle, K_ECC_MODE, K_ECC_MODE_PENDING, current, pending);
}

EXPORT nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t handle, unsigned *current, unsigned *pending)
{
    return get_pair(FN_nvmlDeviceGetMigMode, handle, K_MIG_MODE, K_MIG_MODE_PENDING, current, pending);
}

EXPORT nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t handle, unsigned long long *millijoules)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetTotalEnergyConsumption, handle, &call);
    return result ? result : leave(put_u64(millijoules, energy(&call)));
}

EXPORT nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t handle, unsigned sensor, unsigned *degrees)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetTemperature, handle, &call);
    if (result)
        return result;
    return leave(sensor ? NVML_ERROR_INVALID_ARGUMENT : put_u32(degrees, number(&call, K_TEMP_GPU)));
}

#ifndef FAKE_NVML_OLD
EXPORT nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t handle, nvmlTemperature_v1_t *temperature)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetTemperatureV, handle, &call);
    if (result)
        return result;
    if (!temperature || temperature->sensorType)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    if (temperature->version != VERSION_WORD(nvmlTemperature_v1_t, 1))
        return leave(NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    double value = number(&call, K_TEMP_GPU);
    if (isnan(value))
        return leave(NVML_ERROR_NOT_SUPPORTED);
    temperature->temperature = (int)fmax(-1e6, fmin(1e6, value));
    return leave(NVML_SUCCESS);
}
#endif

static nvmlReturn_t get_listed(Function function, nvmlDevice_t handle, const enum Kind *kinds, unsigned count,
                               unsigned which, unsigned *out)
{
    Call call;
    nvmlReturn_t result = enter_whole(function, handle, &call);
    if (result)
        return result;
    return leave(which < count ? put_u32(out, number(&call, kinds[which])) : NVML_ERROR_NOT_SUPPORTED);
}

EXPORT nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t handle, unsigned which, unsigned *degrees)
{
    static const enum Kind KINDS[] = {K_TEMP_SHUTDOWN, K_TEMP_SLOWDOWN, K_TEMP_MEM_MAX, K_TEMP_GPU_MAX};
    return get_listed(FN_nvmlDeviceGetTemperatureThreshold, handle, KINDS, 4, which, degrees);
}

EXPORT nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t handle, unsigned which, unsigned *mhz)
{
    static const enum Kind KINDS[] = {K_CLOCK_GRAPHICS, K_CLOCK_SM, K_CLOCK_MEM, K_CLOCK_VIDEO};
    return get_listed(FN_nvmlDeviceGetClockInfo, handle, KINDS, 4, which, mhz);
}

EXPORT nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t handle, unsigned which, unsigned *mhz)
{
    static const enum Kind KINDS[] = {K_CLOCK_MAX_GRAPHICS, K_CLOCK_MAX_SM, K_CLOCK_MAX_MEM,
                                      K_CLOCK_MAX_VIDEO};
    return get_listed(FN_nvmlDeviceGetMaxClockInfo, handle, KINDS, 4, which, mhz);
}

static nvmlReturn_t clock_reasons(Function function, nvmlDevice_t handle, unsigned long long *reasons)
{
    Call call;
    nvmlReturn_t result = enter_whole(function, handle, &call);
    return result ? result : leave(put_u64(reasons, number(&call, K_CLOCKS_EVENT_REASONS)));
}

#ifndef FAKE_NVML_OLD
EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t handle, unsigned long long *reasons)
{
    return clock_reasons(FN_nvmlDeviceGetCurrentClocksEventReasons, handle, reasons);
}
#endif

EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t handle,
                                                              unsigned long long *reasons)
{
    return clock_reasons(FN_nvmlDeviceGetCurrentClocksThrottleReasons, handle, reasons);
}

/* ---- errors and links ---- */

EXPORT nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t handle, unsigned type, unsigned counter,
                                                unsigned long long *count)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetTotalEccErrors, handle, &call);
    if (result)
        return result;
    bool known = type < 2 && counter < 2;
    return leave(known ? put_u64(count, ecc_total(&call, type, counter)) : NVML_ERROR_INVALID_ARGUMENT);
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t handle, unsigned type, unsigned counter,
                                                    unsigned location, unsigned long long *count)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetMemoryErrorCounter, handle, &call);
    if (result)
        return result;
    if (type > 1 || counter > 1 || location > 7)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    bool off = number(&call, K_ECC_MODE) == 0;
    return leave(put_u64(count, off ? NAN : indexed(&call, K_ECC, type * 2 + counter, location + 1)));
}

EXPORT nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t handle, unsigned *corrected, unsigned *uncorrected,
                                              unsigned *pending, unsigned *failure)
{
    static const enum Kind KINDS[] = {K_REMAPPED_CORRECTABLE, K_REMAPPED_UNCORRECTABLE, K_REMAPPED_PENDING,
                                      K_REMAPPED_FAILURE};
    unsigned *outs[] = {corrected, uncorrected, pending, failure};
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetRemappedRows, handle, &call);
    if (result)
        return result;
    bool any = false;
    for (int i = 0; i < 4; i++)
        any |= !isnan(number(&call, KINDS[i]));
    for (int i = 0; any && !result && i < 4; i++)
        result = put_u32(outs[i], fmax(0, number(&call, KINDS[i])));
    return leave(any ? result : NVML_ERROR_NOT_SUPPORTED);
}

/* The scenario gives a number of pages; their addresses are made up. */
EXPORT nvmlReturn_t nvmlDeviceGetRetiredPages(nvmlDevice_t handle, unsigned cause, unsigned *count,
                                              unsigned long long *addresses)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetRetiredPages, handle, &call);
    if (result)
        return result;
    if (!count || cause > 1)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    double pages = number(&call, cause ? K_RETIRED_DBE : K_RETIRED_SBE);
    if (isnan(pages))
        return leave(NVML_ERROR_NOT_SUPPORTED);
    unsigned found = to_u32(fmin(pages, 4096)), room = addresses ? *count : 0;
    *count = found;
    if (room < found)
        return leave(NVML_ERROR_INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < found; i++)
        addresses[i] = 0x10000ull * (i + 1) + cause;
    return leave(NVML_SUCCESS);
}

/* Like the driver's, measures for 20 ms. Kilobytes of 1000 bytes a second. */
EXPORT nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t handle, unsigned counter, unsigned *value)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetPcieThroughput, handle, &call);
    if (result)
        return result;
    result = pause_call(&call, 0.020);
    if (result)
        return result;
    if (counter > 1)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    return leave(put_u32(value, number(&call, counter ? K_PCIE_RX_RATE : K_PCIE_TX_RATE) / 1000));
}

static bool link_exists(const Call *call, unsigned link)
{
    return link < to_u32(number(call, K_NVLINK_COUNT));
}

EXPORT nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t handle, unsigned link, unsigned *active)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetNvLinkState, handle, &call);
    if (result)
        return result;
    if (link >= MAX_LINKS)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    double state = link_number(&call, LINK_STATE, link);
    if (isnan(state) && link_exists(&call, link))
        state = 1;
    return leave(put_u32(active, link_exists(&call, link) ? state : NAN));
}

EXPORT nvmlReturn_t nvmlDeviceGetNvLinkErrorCounter(nvmlDevice_t handle, unsigned link, unsigned counter,
                                                    unsigned long long *count)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetNvLinkErrorCounter, handle, &call);
    if (result)
        return result;
    if (link >= MAX_LINKS || counter > LINK_ECC_DATA)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    double value = link_exists(&call, link) ? link_number(&call, (enum LinkValue)counter, link) : NAN;
    return leave(put_u64(count, value));
}

/* ---- MIG ---- */

EXPORT nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t handle, unsigned *count)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetMaxMigDeviceCount, handle, &call);
    return result ? result : leave(put_u32(count, isnan(number(&call, K_MIG_MODE)) ? 0 : 7));
}

EXPORT nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t handle, unsigned index,
                                                        nvmlDevice_t *mig)
{
    Call call;
    nvmlReturn_t result = enter_whole(FN_nvmlDeviceGetMigDeviceHandleByIndex, handle, &call);
    if (result)
        return result;
    if (!mig_enabled(&call))
        return leave(NVML_ERROR_NOT_SUPPORTED);
    return leave(mig_at(&call, call.gpu, index) ? put_handle(mig, call.gpu, (int)index)
                                                : NVML_ERROR_NOT_FOUND);
}

EXPORT nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t mig, nvmlDevice_t *handle)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetDeviceHandleFromMigDeviceHandle, mig, &call);
    if (result)
        return result;
    return leave(call.mig ? put_handle(handle, call.gpu, -1) : NVML_ERROR_INVALID_ARGUMENT);
}

EXPORT nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t handle, unsigned *is_mig)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceIsMigDeviceHandle, handle, &call);
    return result ? result : leave(put_u32(is_mig, call.mig != NULL));
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuInstanceId(nvmlDevice_t handle, unsigned *id)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetGpuInstanceId, handle, &call);
    return result ? result : leave(call.mig ? put_u32(id, call.mig->gi) : NVML_ERROR_NOT_SUPPORTED);
}

EXPORT nvmlReturn_t nvmlDeviceGetComputeInstanceId(nvmlDevice_t handle, unsigned *id)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetComputeInstanceId, handle, &call);
    return result ? result : leave(call.mig ? put_u32(id, call.mig->ci) : NVML_ERROR_NOT_SUPPORTED);
}

EXPORT nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t handle, nvmlDeviceAttributes_t *attributes)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetAttributes_v2, handle, &call);
    if (result)
        return result;
    if (!attributes || !call.mig)
        return leave(attributes ? NVML_ERROR_NOT_SUPPORTED : NVML_ERROR_INVALID_ARGUMENT);
    const Mig *mig = call.mig;
    *attributes = (nvmlDeviceAttributes_t){
        .multiprocessorCount = mig->sm,
        .sharedCopyEngineCount = mig->copy_engines,
        .sharedDecoderCount = mig->decoders,
        .sharedEncoderCount = mig->encoders,
        .sharedJpegCount = mig->jpegs,
        .sharedOfaCount = mig->ofas,
        .gpuInstanceSliceCount = mig->slices,
        .computeInstanceSliceCount = mig->ci_slices,
        .memorySizeMB = mig->total >> 20,
    };
    return leave(NVML_SUCCESS);
}

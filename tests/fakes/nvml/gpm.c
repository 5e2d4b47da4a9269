/* GPU performance metrics: a sample keeps where and when it was taken, and two samples give each metric's
 * mean between them. In flow samples, out flow the means of the scenario's steps (percent, or MiB/s). */
#include "driver.h"

#include <math.h>

enum { MAX_SAMPLES = 8192, METRICS_VERSION = 1, SUPPORT_VERSION = 1 };

typedef struct {
    uint32_t serial; /* 0: free */
    bool taken;
    unsigned gpu;
    uint32_t gi; /* UINT32_MAX: the whole GPU */
    double t;
} Sample;

/* Under the driver's lock. */
static Sample samples[MAX_SAMPLES];
static uint32_t serials;
static unsigned live, next_free;

static Sample *find_sample(nvmlGpmSample_t handle)
{
    uint64_t bits = (uint64_t)(uintptr_t)handle;
    unsigned slot = (unsigned)(bits & 0xFFFF) - 1;
    return slot < MAX_SAMPLES && samples[slot].serial && samples[slot].serial == bits >> 16 ? &samples[slot]
                                                                                            : NULL;
}

/* Exported either way, so that tests count on every variant. */
EXPORT unsigned fakeNvmlLiveGpmSamples(void)
{
    lock_driver();
    unsigned count = live;
    leave(NVML_SUCCESS);
    return count;
}

static nvmlReturn_t alloc_sample(nvmlGpmSample_t *out)
{
    for (unsigned i = 0; out && i < MAX_SAMPLES; i++) {
        unsigned slot = (next_free + i) % MAX_SAMPLES;
        if (samples[slot].serial)
            continue;
        samples[slot] = (Sample){.serial = ++serials};
        next_free = slot + 1;
        live++;
        *out = (nvmlGpmSample_t)(uintptr_t)((uint64_t)samples[slot].serial << 16 | (slot + 1));
        return NVML_SUCCESS;
    }
    return out ? NVML_ERROR_INSUFFICIENT_RESOURCES : NVML_ERROR_INVALID_ARGUMENT;
}

static nvmlReturn_t free_sample(nvmlGpmSample_t handle)
{
    Sample *sample = find_sample(handle);
    if (!sample)
        return NVML_ERROR_INVALID_ARGUMENT;
    sample->serial = 0;
    live--;
    return NVML_SUCCESS;
}

static bool supported(const Call *call)
{
    return number(call, K_GPM_SUPPORT) > 0;
}

/* The first instance with this GPU instance id; -1: none. */
static int mig_of(const Call *call, uint32_t gi)
{
    for (unsigned i = 0; i < MAX_MIG; i++) {
        const Mig *mig = mig_at(call, call->gpu, i);
        if (mig && mig->gi == gi)
            return (int)i;
    }
    return -1;
}

static nvmlReturn_t take_sample(const Call *call, uint32_t gi, nvmlGpmSample_t handle)
{
    Sample *sample = find_sample(handle);
    if (!sample)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (call->mig || !supported(call))
        return NVML_ERROR_NOT_SUPPORTED;
    if (gi != UINT32_MAX && !mig_enabled(call))
        return NVML_ERROR_NOT_SUPPORTED;
    if (gi != UINT32_MAX && mig_of(call, gi) < 0)
        return NVML_ERROR_NOT_FOUND;
    sample->taken = true;
    sample->gpu = call->gpu;
    sample->gi = gi;
    sample->t = call->t;
    return NVML_SUCCESS;
}

static void measure(const Call *call, int mig, const Sample *from, const Sample *to, nvmlGpmMetric_t *metric)
{
    enum Kind kind = mig < 0 ? K_GPM : K_MIG_GPM;
    uint32_t id = metric->metricId, b = mig < 0 ? 0 : (uint32_t)mig;
    metric->value = NAN;
    metric->nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
    metric->metricInfo = (nvmlGpmMetricInfo_t){"fake", "Fake metric", id >= 20 && id < 30 ? "MiB/s" : "%"};
    if (isnan(scenario_number(call->scenario, call->gpu, kind, id, b, to->t)))
        return;
    double sum = scenario_integral(call->scenario, call->gpu, kind, id, b, to->t)
                 - scenario_integral(call->scenario, call->gpu, kind, id, b, from->t);
    metric->value = sum / (to->t - from->t);
    metric->nvmlReturn = NVML_SUCCESS;
}

/* The driver's counters need about 100 ms between two samples; here a closer pair, a pair in the wrong order
 * and a pair of different GPUs or instances are an invalid argument for the whole call. */
static bool is_pair(const Sample *from, const Sample *to)
{
    return from && to && from->taken && to->taken && from->gpu == to->gpu && from->gi == to->gi
           && to->t - from->t >= 0.1;
}

static nvmlReturn_t measure_all(Call *call, nvmlGpmMetricsGet_t *get)
{
    const Sample *from = find_sample(get->sample1), *to = find_sample(get->sample2);
    if (get->version != METRICS_VERSION)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (!is_pair(from, to) || get->numMetrics > MAX_GPM_METRIC)
        return NVML_ERROR_INVALID_ARGUMENT;
    call->gpu = from->gpu;
    int mig = from->gi == UINT32_MAX ? -1 : mig_of(call, from->gi);
    if (from->gi != UINT32_MAX && mig < 0)
        return NVML_ERROR_NOT_FOUND;
    for (unsigned i = 0; i < get->numMetrics; i++)
        measure(call, mig, from, to, &get->metrics[i]);
    return NVML_SUCCESS;
}

/* The call names no GPU but its samples do, so that GPU's fail and hang lines count. */
static nvmlReturn_t enter_metrics(nvmlGpmMetricsGet_t *get, Call *call)
{
    nvmlReturn_t result = enter(FN_nvmlGpmMetricsGet, call);
    if (result)
        return result;
    const Sample *sample = get ? find_sample(get->sample1) : NULL;
    if (!sample)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    call->gpu = sample->gpu;
    return admit_gpu(FN_nvmlGpmMetricsGet, call);
}

#ifdef FAKE_NVML_OLD
#define GPM_EXPORT __attribute__((visibility("hidden"), used))
#else
#define GPM_EXPORT EXPORT
#endif

GPM_EXPORT nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t handle, nvmlGpmSupport_t *support)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlGpmQueryDeviceSupport, handle, &call);
    if (result)
        return result;
    if (!support)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    if (support->version != SUPPORT_VERSION)
        return leave(NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    support->isSupportedDevice = supported(&call);
    return leave(NVML_SUCCESS);
}

GPM_EXPORT nvmlReturn_t nvmlGpmSampleAlloc(nvmlGpmSample_t *sample)
{
    Call call;
    nvmlReturn_t result = enter(FN_nvmlGpmSampleAlloc, &call);
    return result ? result : leave(alloc_sample(sample));
}

GPM_EXPORT nvmlReturn_t nvmlGpmSampleFree(nvmlGpmSample_t sample)
{
    Call call;
    nvmlReturn_t result = enter_to_free(FN_nvmlGpmSampleFree, &call);
    return result ? result : leave(free_sample(sample));
}

GPM_EXPORT nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t handle, nvmlGpmSample_t sample)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlGpmSampleGet, handle, &call);
    return result ? result : leave(take_sample(&call, UINT32_MAX, sample));
}

GPM_EXPORT nvmlReturn_t nvmlGpmMigSampleGet(nvmlDevice_t handle, unsigned gi, nvmlGpmSample_t sample)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlGpmMigSampleGet, handle, &call);
    return result ? result : leave(take_sample(&call, gi, sample));
}

GPM_EXPORT nvmlReturn_t nvmlGpmMetricsGet(nvmlGpmMetricsGet_t *get)
{
    Call call;
    nvmlReturn_t result = enter_metrics(get, &call);
    return result ? result : leave(measure_all(&call, get));
}

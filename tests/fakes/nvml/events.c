/* Event sets: a GPU's events are queued for the sets that had asked for them when they happened. In flow the
 * scenario's event lines, out flow nvmlEventSetWait_v2's answers; a rewritten file never repeats one. */
#include "driver.h"

#include <math.h>
#include <string.h>

enum { MAX_SETS = 64, QUEUE = 256, REMEMBERED = 4096 };
static const double POLL = 0.25; /* a real driver waits without polling: keep the cost of waiting small */

typedef struct {
    unsigned gpu, gi, ci;
    uint64_t type, data;
} Queued;

typedef struct {
    uint32_t serial; /* 0: free. A handle of a freed set no longer matches. */
    uint64_t mask[MAX_GPUS];
    uint64_t since[MAX_GPUS]; /* event_clock() of the registration */
    Queued queue[QUEUE];
    unsigned first, count;
} EventSet;

typedef struct {
    unsigned gpu;
    uint64_t type, data, clock;
} Remembered;

/* Under the driver's lock. */
static EventSet sets[MAX_SETS];
static uint32_t serials;
static Remembered remembered[REMEMBERED];
static unsigned remembered_count;

static bool is_remembered(unsigned gpu, const Event *event, uint64_t clock)
{
    unsigned count = remembered_count < REMEMBERED ? remembered_count : REMEMBERED;
    for (unsigned i = 0; i < count; i++) {
        const Remembered *r = &remembered[i];
        uint64_t apart =
            r->clock > clock ? r->clock - clock : clock - r->clock; /* a rewrite rounds times anew */
        if (r->gpu == gpu && r->type == event->type && r->data == event->data && apart <= 1)
            return true;
    }
    return false;
}

static void push(EventSet *set, unsigned gpu, const Event *event)
{
    if (set->count == QUEUE)
        return; /* like a driver's, a full queue drops what is new */
    set->queue[(set->first + set->count++) % QUEUE] =
        (Queued){gpu, event->gi, event->ci, event->type, event->data};
}

static void deliver(unsigned gpu, const Event *event, uint64_t clock)
{
    remembered[remembered_count++ % REMEMBERED] = (Remembered){gpu, event->type, event->data, clock};
    for (int i = 0; i < MAX_SETS; i++)
        if (sets[i].serial && (sets[i].mask[gpu] & event->type) && sets[i].since[gpu] <= clock)
            push(&sets[i], gpu, event);
}

typedef void (*EventVisitor)(unsigned gpu, Event *event, double at, double now);

static void visit_events(Scenario *scenario, double now, EventVisitor visit)
{
    uint32_t series, end;
    for (unsigned gpu = 0; scenario->event_count && gpu < MAX_GPUS; gpu++)
        for (scenario_range(scenario, gpu, K_EVENT, &series, &end); series < end; series++) {
            const Series *events = &scenario->series[series];
            for (uint32_t i = 0; i < events->count; i++) {
                const Step *step = &scenario->steps[events->first + i];
                visit(gpu, &scenario->events[step->record], step->at, now);
            }
        }
}

static void deliver_if_due(unsigned gpu, Event *event, double at, double now)
{
    if (event->seen || at > now)
        return;
    event->seen = true;
    deliver(gpu, event, event_clock(at));
}

static void mark_if_remembered(unsigned gpu, Event *event, double at, double now)
{
    (void)now;
    event->seen = is_remembered(gpu, event, event_clock(at));
}

void events_pump(Scenario *scenario, double t)
{
    visit_events(scenario, t, deliver_if_due);
}

void events_reloaded(Scenario *scenario)
{
    visit_events(scenario, 0, mark_if_remembered);
}

void events_forget(void)
{
    remembered_count = 0;
}

/* ---- sets: the handle is slot and serial, so a stale one is noticed ---- */

static nvmlEventSet_t set_handle(unsigned slot)
{
    return (nvmlEventSet_t)(uintptr_t)((uint64_t)sets[slot].serial << 8 | (slot + 1));
}

static EventSet *find_set(nvmlEventSet_t handle)
{
    uint64_t bits = (uint64_t)(uintptr_t)handle;
    unsigned slot = (unsigned)(bits & 0xFF) - 1;
    return slot < MAX_SETS && sets[slot].serial && sets[slot].serial == bits >> 8 ? &sets[slot] : NULL;
}

EXPORT nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set)
{
    Call call;
    nvmlReturn_t result = enter(FN_nvmlEventSetCreate, &call);
    if (result)
        return result;
    if (!set)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    for (unsigned slot = 0; slot < MAX_SETS; slot++)
        if (!sets[slot].serial) {
            sets[slot] = (EventSet){.serial = ++serials};
            *set = set_handle(slot);
            return leave(NVML_SUCCESS);
        }
    return leave(NVML_ERROR_INSUFFICIENT_RESOURCES);
}

EXPORT nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set)
{
    Call call;
    nvmlReturn_t result = enter_to_free(FN_nvmlEventSetFree, &call);
    if (result)
        return result;
    EventSet *found = find_set(set);
    if (!found)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    found->serial = 0;
    return leave(NVML_SUCCESS);
}

/* Everything that the binding knows, unless the scenario says less. */
static uint64_t event_types(const Call *call)
{
    double given = number(call, K_EVENT_TYPES);
    return isnan(given) ? 0xFF9F : to_u64(given);
}

EXPORT nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t handle, unsigned long long *types)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceGetSupportedEventTypes, handle, &call);
    if (result)
        return result;
    if (!types)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    *types = event_types(&call);
    return leave(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t handle, unsigned long long types,
                                             nvmlEventSet_t set)
{
    Call call;
    nvmlReturn_t result = enter_device(FN_nvmlDeviceRegisterEvents, handle, &call);
    if (result)
        return result;
    EventSet *found = find_set(set);
    if (!found)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    if (call.mig || (types & ~event_types(&call)))
        return leave(NVML_ERROR_NOT_SUPPORTED);
    events_pump(call.scenario, call.t); /* what happened before goes to those who had registered */
    if (!found->mask[call.gpu])
        found->since[call.gpu] = event_clock(call.t);
    found->mask[call.gpu] |= types;
    return leave(NVML_SUCCESS);
}

static void take(EventSet *set, nvmlEventData_t *data)
{
    const Queued *event = &set->queue[set->first];
    *data = (nvmlEventData_t){make_handle(event->gpu, -1), event->type, event->data, event->gi, event->ci};
    set->first = (set->first + 1) % QUEUE;
    set->count--;
}

/* One look at the queue; TIMEOUT when it is empty. Enters anew each time, so failures, hangs, a reload of the
 * driver and a set freed meanwhile end the wait. */
static nvmlReturn_t look(nvmlEventSet_t handle, nvmlEventData_t *data, bool again)
{
    Call call;
    nvmlReturn_t result =
        again ? reenter(FN_nvmlEventSetWait_v2, &call) : enter(FN_nvmlEventSetWait_v2, &call);
    if (result)
        return result;
    EventSet *set = find_set(handle);
    if (!set || !data)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    events_pump(call.scenario, call.t);
    if (!set->count)
        return leave(NVML_ERROR_TIMEOUT);
    take(set, data);
    return leave(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t handle, nvmlEventData_t *data, unsigned timeout_ms)
{
    double until = monotonic_now() + timeout_ms * 1e-3;
    for (bool again = false;; again = true) {
        nvmlReturn_t result = look(handle, data, again);
        double left = until - monotonic_now();
        if (result != NVML_ERROR_TIMEOUT || left <= 0)
            return result;
        sleep_seconds(fmin(left, POLL));
    }
}

EXPORT unsigned fakeNvmlLiveEventSets(void)
{
    unsigned live = 0;
    lock_driver();
    for (int i = 0; i < MAX_SETS; i++)
        live += sets[i].serial != 0;
    leave(NVML_SUCCESS);
    return live;
}

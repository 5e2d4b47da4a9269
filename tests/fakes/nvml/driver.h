/* What the parts of the fake driver share: the door that every call enters and leaves by, and the clock.
 * Between enter() and leave() the caller holds the lock and may use the scenario. */
#ifndef FAKE_NVML_DRIVER_H
#define FAKE_NVML_DRIVER_H

#include "nvml_types.h"
#include "scenario.h"

#define EXPORT __attribute__((visibility("default")))

#pragma GCC visibility push(hidden)

/* One call under way: which GPU or MIG instance it asks, and when. */
typedef struct {
    Scenario *scenario;
    unsigned gpu;
    int mig_index;  /* -1: the whole GPU */
    const Mig *mig; /* NULL: the whole GPU */
    double t;       /* scenario time */
} Call;

/* Each returns with the lock held on success, and without it on failure (the code is the call's answer). */
nvmlReturn_t enter(Function function, Call *call);
nvmlReturn_t enter_gpu(Function function, unsigned gpu, Call *call);
nvmlReturn_t enter_device(Function function, nvmlDevice_t handle, Call *call);
/* For giving back what a caller holds: works after shutdown and across a reload of the driver, too. */
nvmlReturn_t enter_to_free(Function function, Call *call);
/* enter() again for the same call: it is not counted twice. */
nvmlReturn_t reenter(Function function, Call *call);
void lock_driver(void);
/* After enter(): the call turns out to be one to call->gpu. */
nvmlReturn_t admit_gpu(Function function, Call *call);
nvmlReturn_t leave(nvmlReturn_t result);

/* Inside enter_gpu's or enter_device's lock: give it up for so long, then take it again. The scenario may
 * have been replaced meanwhile: call->scenario, call->mig and call->t are brought up to date. */
nvmlReturn_t pause_call(Call *call, double seconds);

nvmlDevice_t make_handle(unsigned gpu, int mig_index);
bool mig_enabled(const Call *call);
const Mig *mig_at(const Call *call, unsigned gpu, unsigned index);
unsigned gpu_count(const Call *call);
double number(const Call *call, enum Kind kind); /* NaN: the scenario does not say */
double indexed(const Call *call, enum Kind kind, uint32_t a, uint32_t b);
const char *text(const Call *call, enum Kind kind);
double link_number(const Call *call, enum LinkValue value, unsigned link);
double link_total(const Call *call, enum LinkValue counter, enum LinkValue rate, unsigned link);
double ecc_total(const Call *call, unsigned type, unsigned counter);
double energy(const Call *call);
double pcie_total(const Call *call, enum Kind counter, enum Kind rate);

double monotonic_now(void);
uint64_t wall_us(double t); /* microseconds of the epoch at scenario time t */
uint64_t
event_clock(double t); /* the same moment whatever the scenario's start: 0.1 ms of the steady clock */
void sleep_seconds(double seconds);
uint32_t to_u32(double value);
uint64_t to_u64(double value);

/* events.c, called with the lock held */
void events_pump(Scenario *scenario, double t);
void events_reloaded(Scenario *scenario);
void events_forget(void);

#pragma GCC visibility pop
#endif

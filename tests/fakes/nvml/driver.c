/* The fake driver's core: loading and watching the scenario file, the clock, init and shutdown, and the door
 * that injects failures and hangs. In flows the file named by FAKE_NVML_SCENARIO, out flow answers at the
 * current time. */
#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const double CHECK_SECONDS = 0.010; /* how often the file is looked at */
static const double POLL_SECONDS = 0.005;  /* how soon a hung call sees that its hang was cleared */
static const off_t MAX_FILE = 64 << 20;

typedef struct {
    int64_t mtime_ns;
    uint64_t inode, device;
    int64_t size;
} FileStamp;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* All under the lock. */
static struct {
    char path[4096];
    Scenario *scenario;
    FileStamp stamp;     /* of the file last read, good or bad */
    double checked;      /* steady time of the last look at the file */
    double start;        /* steady time of scenario time 0 */
    int64_t wall_offset; /* wall minus steady clock in us; fixed, so a sample's timestamp never changes */
    unsigned inits;
    uint64_t generation; /* the driver's at the first init */
    unsigned long calls[FUNCTION_COUNT];
} driver;

static const char *const FUNCTION_NAMES[] = {
#define X(name) #name,
    FUNCTIONS(X)
#undef X
};

int function_number(const char *name)
{
    for (int i = 0; i < FUNCTION_COUNT; i++)
        if (!strcmp(FUNCTION_NAMES[i], name))
            return i;
    return -1;
}

/* ---- clock and numbers ---- */

static int64_t clock_us(clockid_t id)
{
    struct timespec now;
    clock_gettime(id, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

double monotonic_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void sleep_seconds(double seconds)
{
    struct timespec left = {(time_t)seconds, (long)((seconds - floor(seconds)) * 1e9)};
    while (seconds > 0 && nanosleep(&left, &left) && errno == EINTR)
        ;
}

uint64_t wall_us(double t)
{
    return (uint64_t)((int64_t)llround((driver.start + t) * 1e6) + driver.wall_offset);
}

uint64_t event_clock(double t)
{
    return to_u64(round((driver.start + t) * 1e4));
}

uint32_t to_u32(double value)
{
    return !(value > 0) ? 0 : value >= 4294967295.0 ? UINT32_MAX : (uint32_t)value;
}

uint64_t to_u64(double value)
{
    return !(value > 0) ? 0 : value >= 18446744073709551615.0 ? UINT64_MAX : (uint64_t)value;
}

/* ---- the file ---- */

static FileStamp stamp_of(const struct stat *status)
{
    return (FileStamp){
        .mtime_ns = (int64_t)status->st_mtim.tv_sec * 1000000000 + status->st_mtim.tv_nsec,
        .inode = status->st_ino,
        .device = status->st_dev,
        .size = status->st_size,
    };
}

static bool same_stamp(const FileStamp *a, const FileStamp *b)
{
    return a->mtime_ns == b->mtime_ns && a->inode == b->inode && a->device == b->device && a->size == b->size;
}

static char *read_all(int file, size_t size)
{
    char *text = malloc(size + 1);
    size_t done = 0;
    while (text && done < size) {
        ssize_t got = read(file, text + done, size - done);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            free(text);
            return NULL;
        }
        done += (size_t)got;
    }
    return text;
}

static Scenario *read_scenario(FileStamp *stamp)
{
    struct stat status;
    char *text = NULL;
    Scenario *scenario = NULL;
    int file = open(driver.path, O_RDONLY | O_CLOEXEC);
    if (file >= 0 && !fstat(file, &status)) {
        *stamp = stamp_of(&status);
        if (S_ISREG(status.st_mode) && status.st_size <= MAX_FILE)
            text = read_all(file, (size_t)status.st_size);
    }
    if (text)
        scenario = scenario_parse(driver.path, text, (size_t)status.st_size);
    else
        fprintf(stderr, "%s:0: cannot read the scenario\n", driver.path);
    if (file >= 0)
        close(file);
    return scenario;
}

/* Reads the file and puts it in place of the scenario in force, which stays if the file is bad. */
static bool load_scenario(void)
{
    double now = monotonic_now();
    Scenario *fresh = read_scenario(&driver.stamp);
    if (!fresh)
        return false;
    if (driver.scenario) {
        events_pump(driver.scenario, now - driver.start); /* else those that just became due would be lost */
    } else {
        driver.start = now;
        driver.wall_offset = clock_us(CLOCK_REALTIME) - (int64_t)llround(now * 1e6);
    }
    if (!isnan(fresh->clock_start))
        driver.start = fresh->clock_start;
    scenario_free(driver.scenario);
    driver.scenario = fresh;
    events_reloaded(fresh);
    return true;
}

static void check_file(bool at_once)
{
    double now = monotonic_now();
    if (!at_once && now - driver.checked < CHECK_SECONDS)
        return;
    driver.checked = now;
    struct stat status;
    if (stat(driver.path, &status))
        return; /* between two versions, or taken away: what was read stays in force */
    FileStamp stamp = stamp_of(&status);
    if (!same_stamp(&stamp, &driver.stamp))
        load_scenario();
}

/* The first init, and one after the variable changed, starts from nothing; others keep clock and scenario. */
static bool open_scenario(void)
{
    const char *path = getenv("FAKE_NVML_SCENARIO");
    if (driver.inits && driver.scenario) {
        check_file(true);
        return true;
    }
    if (!path || strlen(path) >= sizeof driver.path) {
        fprintf(stderr, "libnvidia-ml.so.1 (fake): FAKE_NVML_SCENARIO names no file\n");
        return false;
    }
    if (strcmp(path, driver.path) != 0) {
        scenario_free(driver.scenario);
        driver.scenario = NULL;
        events_forget();
        strcpy(driver.path, path);
    }
    if (driver.scenario) {
        check_file(true);
        return true;
    }
    driver.checked = monotonic_now();
    return load_scenario();
}

/* ---- questions to the scenario ---- */

double indexed(const Call *call, enum Kind kind, uint32_t a, uint32_t b)
{
    return scenario_number(call->scenario, call->gpu, kind, a, b, call->t);
}

double number(const Call *call, enum Kind kind)
{
    return indexed(call, kind, 0, 0);
}

const char *text(const Call *call, enum Kind kind)
{
    const Step *step = scenario_find(call->scenario, call->gpu, kind, 0, 0, call->t);
    return step ? step->text : NULL;
}

unsigned gpu_count(const Call *call)
{
    return to_u32(scenario_number(call->scenario, OWNER_GLOBAL, K_GPU_COUNT, 0, 0, call->t));
}

bool mig_enabled(const Call *call)
{
    return number(call, K_MIG_MODE) == 1;
}

const Mig *mig_at(const Call *call, unsigned gpu, unsigned index)
{
    if (index >= MAX_MIG)
        return NULL;
    const Step *step = scenario_find(call->scenario, gpu, K_MIG, index, 0, call->t);
    const Mig *mig = step ? &call->scenario->migs[step->record] : NULL;
    return mig && !mig->gone ? mig : NULL;
}

/* nvlink.L.x of the GPU, nvlink.*.x of the GPU, then the same of gpu.*. */
double link_number(const Call *call, enum LinkValue value, unsigned link)
{
    double found = indexed(call, K_NVLINK, value, link + 1);
    return isnan(found) ? indexed(call, K_NVLINK, value, 0) : found;
}

double link_total(const Call *call, enum LinkValue counter, enum LinkValue rate, unsigned link)
{
    double given = link_number(call, counter, link);
    if (!isnan(given))
        return given;
    for (uint32_t which = link + 1;; which = 0) {
        if (scenario_has(call->scenario, call->gpu, K_NVLINK, rate, which))
            return scenario_integral(call->scenario, call->gpu, K_NVLINK, rate, which, call->t);
        if (!which)
            return NAN;
    }
}

double ecc_total(const Call *call, unsigned type, unsigned counter)
{
    if (number(call, K_ECC_MODE) == 0)
        return NAN;
    double total = indexed(call, K_ECC, type * 2 + counter, 0);
    if (!isnan(total))
        return total;
    for (unsigned location = 0; location < 8; location++) {
        double part = indexed(call, K_ECC, type * 2 + counter, location + 1);
        if (!isnan(part))
            total = isnan(total) ? part : total + part;
    }
    return total;
}

double energy(const Call *call)
{
    double given = number(call, K_ENERGY_MJ);
    if (!isnan(given) || isnan(number(call, K_POWER_MW)))
        return given;
    return scenario_integral(call->scenario, call->gpu, K_POWER_MW, 0, 0, call->t); /* mW * s = mJ */
}

double pcie_total(const Call *call, enum Kind counter, enum Kind rate)
{
    double given = number(call, counter);
    if (!isnan(given) || !scenario_has(call->scenario, call->gpu, rate, 0, 0))
        return given;
    return scenario_integral(call->scenario, call->gpu, rate, 0, 0, call->t);
}

/* ---- handles: never followed as pointers, so they carry what they name ---- */

enum { HANDLE_MAGIC = 0x5A47 };

nvmlDevice_t make_handle(unsigned gpu, int mig_index)
{
    uint64_t bits = (uint64_t)HANDLE_MAGIC << 48 | (driver.generation & 0xFFFFFFFF) << 16 | (uint64_t)gpu << 8
                    | (uint64_t)(mig_index + 1);
    return (nvmlDevice_t)(uintptr_t)bits;
}

static nvmlReturn_t read_handle(nvmlDevice_t handle, Call *call)
{
    uint64_t bits = (uint64_t)(uintptr_t)handle;
    call->gpu = bits >> 8 & 0xFF;
    call->mig_index = (int)(bits & 0xFF) - 1;
    if (bits >> 48 != HANDLE_MAGIC || call->gpu >= MAX_GPUS || call->mig_index >= MAX_MIG)
        return NVML_ERROR_INVALID_ARGUMENT;
    if ((bits >> 16 & 0xFFFFFFFF) != (driver.generation & 0xFFFFFFFF))
        return NVML_ERROR_UNINITIALIZED; /* from before the driver was reloaded */
    return NVML_SUCCESS;
}

/* ---- the door ---- */

static uint64_t scenario_generation(double t)
{
    return to_u64(scenario_number(driver.scenario, OWNER_GLOBAL, K_DRIVER_GENERATION, 0, 0, t));
}

static enum DriverState scenario_state(double t)
{
    double state = scenario_number(driver.scenario, OWNER_GLOBAL, K_DRIVER_STATE, 0, 0, t);
    return isnan(state) ? DRIVER_OK : (enum DriverState)state;
}

static nvmlReturn_t refresh(Call *call)
{
    if (!driver.inits)
        return NVML_ERROR_UNINITIALIZED;
    check_file(false);
    call->scenario = driver.scenario;
    call->t = monotonic_now() - driver.start;
    enum DriverState state = scenario_state(call->t);
    if (state == DRIVER_NOT_LOADED || state == DRIVER_RELOADING
        || scenario_generation(call->t) != driver.generation)
        return NVML_ERROR_UNINITIALIZED;
    return NVML_SUCCESS;
}

/* The most specific fail or hang line: this function here, every function here, then the same of gpu.*, and
 * last a line without a GPU that names the function. NaN: none. */
static double trouble(const Call *call, enum Kind kind, Function function, unsigned owner)
{
    const Scenario *s = call->scenario;
    const unsigned owners[] = {owner, OWNER_ANY_GPU, OWNER_GLOBAL};
    for (int i = owner == OWNER_GLOBAL ? 2 : 0; i < 3; i++) {
        if (!s->trouble[owners[i]])
            continue;
        double value = scenario_number(s, owners[i], kind, function + 1u, 0, call->t);
        if (isnan(value) && (owners[i] != OWNER_GLOBAL || owner == OWNER_GLOBAL))
            value = scenario_number(s, owners[i], kind, 0, 0, call->t);
        if (!isnan(value))
            return value;
    }
    return NAN;
}

static bool has_trouble(const Scenario *s, unsigned owner)
{
    return s->trouble[owner] || s->trouble[OWNER_GLOBAL] || (owner < MAX_GPUS && s->trouble[OWNER_ANY_GPU]);
}

static nvmlReturn_t wait_out_hang(Function function, unsigned owner, Call *call)
{
    double began = monotonic_now();
    for (;;) {
        double left = trouble(call, K_HANG, function, owner) - (monotonic_now() - began);
        if (!(left > 0))
            return NVML_SUCCESS;
        pthread_mutex_unlock(&lock);
        sleep_seconds(fmin(left, POLL_SECONDS));
        pthread_mutex_lock(&lock);
        nvmlReturn_t result = refresh(call);
        if (result)
            return result;
    }
}

static nvmlReturn_t inject_trouble(Function function, unsigned owner, Call *call)
{
    if (!has_trouble(call->scenario, owner))
        return NVML_SUCCESS;
    nvmlReturn_t result = wait_out_hang(function, owner, call);
    if (result)
        return result;
    double code = trouble(call, K_FAIL, function, owner);
    return isnan(code) ? NVML_SUCCESS : (nvmlReturn_t)to_u32(code);
}

static nvmlReturn_t reach_gpu(Function function, Call *call)
{
    if (call->gpu >= gpu_count(call))
        return NVML_ERROR_GPU_IS_LOST;
    nvmlReturn_t result = inject_trouble(function, call->gpu, call);
    if (result)
        return result;
    if (number(call, K_LOST) > 0)
        return NVML_ERROR_GPU_IS_LOST;
    call->mig = call->mig_index < 0 ? NULL : mig_at(call, call->gpu, (unsigned)call->mig_index);
    return call->mig_index >= 0 && !call->mig ? NVML_ERROR_NOT_FOUND : NVML_SUCCESS;
}

static nvmlReturn_t begin(Function function, Call *call)
{
    pthread_mutex_lock(&lock);
    driver.calls[function]++;
    *call = (Call){.gpu = OWNER_GLOBAL, .mig_index = -1};
    return refresh(call);
}

static nvmlReturn_t admit(nvmlReturn_t result)
{
    return result ? leave(result) : NVML_SUCCESS;
}

nvmlReturn_t leave(nvmlReturn_t result)
{
    pthread_mutex_unlock(&lock);
    return result;
}

nvmlReturn_t enter(Function function, Call *call)
{
    nvmlReturn_t result = begin(function, call);
    return admit(result ? result : inject_trouble(function, OWNER_GLOBAL, call));
}

nvmlReturn_t enter_to_free(Function function, Call *call)
{
    nvmlReturn_t result = begin(function, call);
    return admit(result ? NVML_SUCCESS : inject_trouble(function, OWNER_GLOBAL, call));
}

nvmlReturn_t reenter(Function function, Call *call)
{
    nvmlReturn_t result = begin(function, call);
    driver.calls[function]--;
    return admit(result ? result : inject_trouble(function, OWNER_GLOBAL, call));
}

void lock_driver(void)
{
    pthread_mutex_lock(&lock);
}

nvmlReturn_t enter_gpu(Function function, unsigned gpu, Call *call)
{
    nvmlReturn_t result = begin(function, call);
    call->gpu = gpu;
    if (!result && gpu >= gpu_count(call))
        result = NVML_ERROR_INVALID_ARGUMENT;
    return admit(result ? result : reach_gpu(function, call));
}

nvmlReturn_t enter_device(Function function, nvmlDevice_t handle, Call *call)
{
    nvmlReturn_t result = begin(function, call);
    if (!result)
        result = read_handle(handle, call);
    return admit(result ? result : reach_gpu(function, call));
}

nvmlReturn_t admit_gpu(Function function, Call *call)
{
    return admit(reach_gpu(function, call));
}

nvmlReturn_t pause_call(Call *call, double seconds)
{
    pthread_mutex_unlock(&lock);
    sleep_seconds(seconds);
    pthread_mutex_lock(&lock);
    nvmlReturn_t result = refresh(call);
    if (!result && call->mig_index >= 0 && !(call->mig = mig_at(call, call->gpu, (unsigned)call->mig_index)))
        result = NVML_ERROR_NOT_FOUND;
    return admit(result);
}

/* ---- init, shutdown, system ---- */

static nvmlReturn_t init_refusal(double t)
{
    switch (scenario_state(t)) {
    case DRIVER_NOT_LOADED:
    case DRIVER_RELOADING:
        return NVML_ERROR_DRIVER_NOT_LOADED;
    case DRIVER_VERSION_MISMATCH:
        return NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    default:
        return NVML_SUCCESS;
    }
}

/* Init has no earlier init to lean on, so it hangs by itself. */
static void hang_init(Function function, Call *call)
{
    double began = monotonic_now();
    for (;;) {
        call->scenario = driver.scenario;
        call->t = monotonic_now() - driver.start;
        double left = trouble(call, K_HANG, function, OWNER_GLOBAL) - (monotonic_now() - began);
        if (!(left > 0))
            return;
        pthread_mutex_unlock(&lock);
        sleep_seconds(fmin(left, POLL_SECONDS));
        pthread_mutex_lock(&lock);
        check_file(false);
    }
}

static nvmlReturn_t init(Function function)
{
    pthread_mutex_lock(&lock);
    driver.calls[function]++;
    if (!open_scenario())
        return leave(NVML_ERROR_UNKNOWN);
    Call call = {.gpu = OWNER_GLOBAL, .mig_index = -1};
    hang_init(function, &call);
    double code = trouble(&call, K_FAIL, function, OWNER_GLOBAL);
    nvmlReturn_t result = code > 0 ? (nvmlReturn_t)to_u32(code) : init_refusal(call.t);
    if (result)
        return leave(result);
    if (!driver.inits++)
        driver.generation = scenario_generation(call.t);
    return leave(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlInit_v2(void)
{
    return init(FN_nvmlInit_v2);
}

EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    return init(FN_nvmlInitWithFlags);
}

EXPORT nvmlReturn_t nvmlShutdown(void)
{
    pthread_mutex_lock(&lock);
    driver.calls[FN_nvmlShutdown]++;
    if (!driver.inits)
        return leave(NVML_ERROR_UNINITIALIZED);
    driver.inits--;
    return leave(NVML_SUCCESS);
}

EXPORT const char *nvmlErrorString(nvmlReturn_t code)
{
    static const struct {
        unsigned code;
        const char *text;
    } TEXTS[] = {
        {0, "Success"},
        {1, "Uninitialized"},
        {2, "Invalid Argument"},
        {3, "Not Supported"},
        {4, "Insufficient Permissions"},
        {6, "Not Found"},
        {7, "Insufficient Size"},
        {9, "Driver Not Loaded"},
        {10, "Timeout"},
        {15, "GPU is lost"},
        {16, "GPU requires reset"},
        {18, "Driver/library version mismatch"},
        {23, "Insufficient resources"},
        {25, "Argument version mismatch"},
    };
    pthread_mutex_lock(&lock);
    driver.calls[FN_nvmlErrorString]++;
    pthread_mutex_unlock(&lock);
    for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++)
        if (TEXTS[i].code == code)
            return TEXTS[i].text;
    return "Unknown Error";
}

static nvmlReturn_t system_text(Function function, enum Kind kind, const char *fallback, char *out,
                                unsigned size)
{
    Call call;
    nvmlReturn_t result = enter(function, &call);
    if (result)
        return result;
    const Step *step = scenario_find(call.scenario, OWNER_GLOBAL, kind, 0, 0, call.t);
    const char *found = step && step->text ? step->text : fallback;
    if (!out)
        return leave(NVML_ERROR_INVALID_ARGUMENT);
    if (strlen(found) >= size)
        return leave(NVML_ERROR_INSUFFICIENT_SIZE);
    strcpy(out, found);
    return leave(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    return system_text(FN_nvmlSystemGetDriverVersion, K_DRIVER_VERSION, "580.95.05", version, size);
}

EXPORT nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned size)
{
    return system_text(FN_nvmlSystemGetNVMLVersion, K_DRIVER_NVML, "13.580.95.05", version, size);
}

/* "12.4" is 12040 */
static nvmlReturn_t cuda_version(Function function, int *version)
{
    char words[32];
    int major = 0, minor = 0;
    nvmlReturn_t result = system_text(function, K_DRIVER_CUDA, "13.0", words, sizeof words);
    if (result)
        return result;
    if (!version || sscanf(words, "%4d.%4d", &major, &minor) < 1)
        return NVML_ERROR_INVALID_ARGUMENT;
    *version = major * 1000 + minor * 10;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version)
{
    return cuda_version(FN_nvmlSystemGetCudaDriverVersion, version);
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    return cuda_version(FN_nvmlSystemGetCudaDriverVersion_v2, version);
}

/* ---- for tests in the same process ---- */

/* Calls since the library was loaded; NULL or "*": of every function. */
EXPORT unsigned long fakeNvmlCalls(const char *function)
{
    bool every = !function || !strcmp(function, "*");
    int wanted = every ? -1 : function_number(function);
    unsigned long sum = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < FUNCTION_COUNT; i++)
        sum += every || i == wanted ? driver.calls[i] : 0;
    pthread_mutex_unlock(&lock);
    return sum;
}

/* Inits minus shutdowns. */
EXPORT unsigned fakeNvmlInits(void)
{
    pthread_mutex_lock(&lock);
    unsigned inits = driver.inits;
    pthread_mutex_unlock(&lock);
    return inits;
}

/* Looks at the file now, not at the next 10 ms. */
EXPORT void fakeNvmlReload(void)
{
    pthread_mutex_lock(&lock);
    if (driver.scenario)
        check_file(true);
    pthread_mutex_unlock(&lock);
}

/* Scenario time now; negative without a scenario. */
EXPORT double fakeNvmlTime(void)
{
    pthread_mutex_lock(&lock);
    double t = driver.scenario ? monotonic_now() - driver.start : -1;
    pthread_mutex_unlock(&lock);
    return t;
}

typedef struct {
    const char *structure, *field; /* field "": the whole structure */
    size_t offset, size;
} Layout;

#define WHOLE(structure)                                                                                     \
    {                                                                                                        \
#structure, "", 0, sizeof(structure)                                                                 \
    }
#define PART(structure, field)                                                                               \
    {                                                                                                        \
#structure, #field, offsetof(structure, field), sizeof(((structure *)0)->field)                      \
    }

/* Ends with an all-NULL row. */
EXPORT const Layout fakeNvmlLayout[] = {
    WHOLE(nvmlMemory_t),
    PART(nvmlMemory_t, total),
    PART(nvmlMemory_t, free),
    PART(nvmlMemory_t, used),
    WHOLE(nvmlMemory_v2_t),
    PART(nvmlMemory_v2_t, version),
    PART(nvmlMemory_v2_t, total),
    PART(nvmlMemory_v2_t, reserved),
    PART(nvmlMemory_v2_t, free),
    PART(nvmlMemory_v2_t, used),
    WHOLE(nvmlBAR1Memory_t),
    PART(nvmlBAR1Memory_t, bar1Total),
    PART(nvmlBAR1Memory_t, bar1Free),
    PART(nvmlBAR1Memory_t, bar1Used),
    WHOLE(nvmlUtilization_t),
    PART(nvmlUtilization_t, gpu),
    PART(nvmlUtilization_t, memory),
    WHOLE(nvmlPciInfo_t),
    PART(nvmlPciInfo_t, busIdLegacy),
    PART(nvmlPciInfo_t, domain),
    PART(nvmlPciInfo_t, bus),
    PART(nvmlPciInfo_t, device),
    PART(nvmlPciInfo_t, pciDeviceId),
    PART(nvmlPciInfo_t, pciSubSystemId),
    PART(nvmlPciInfo_t, busId),
    WHOLE(nvmlValue_t),
    PART(nvmlValue_t, dVal),
    PART(nvmlValue_t, uiVal),
    PART(nvmlValue_t, ulVal),
    PART(nvmlValue_t, ullVal),
    PART(nvmlValue_t, sllVal),
    PART(nvmlValue_t, siVal),
    PART(nvmlValue_t, usVal),
    WHOLE(nvmlSample_t),
    PART(nvmlSample_t, timeStamp),
    PART(nvmlSample_t, sampleValue),
    WHOLE(nvmlFieldValue_t),
    PART(nvmlFieldValue_t, fieldId),
    PART(nvmlFieldValue_t, scopeId),
    PART(nvmlFieldValue_t, timestamp),
    PART(nvmlFieldValue_t, latencyUsec),
    PART(nvmlFieldValue_t, valueType),
    PART(nvmlFieldValue_t, nvmlReturn),
    PART(nvmlFieldValue_t, value),
    WHOLE(nvmlProcessInfo_t),
    PART(nvmlProcessInfo_t, pid),
    PART(nvmlProcessInfo_t, usedGpuMemory),
    PART(nvmlProcessInfo_t, gpuInstanceId),
    PART(nvmlProcessInfo_t, computeInstanceId),
    WHOLE(nvmlProcessUtilizationSample_t),
    PART(nvmlProcessUtilizationSample_t, pid),
    PART(nvmlProcessUtilizationSample_t, timeStamp),
    PART(nvmlProcessUtilizationSample_t, smUtil),
    PART(nvmlProcessUtilizationSample_t, memUtil),
    PART(nvmlProcessUtilizationSample_t, encUtil),
    PART(nvmlProcessUtilizationSample_t, decUtil),
    WHOLE(nvmlProcessUtilizationInfo_v1_t),
    PART(nvmlProcessUtilizationInfo_v1_t, timeStamp),
    PART(nvmlProcessUtilizationInfo_v1_t, pid),
    PART(nvmlProcessUtilizationInfo_v1_t, smUtil),
    PART(nvmlProcessUtilizationInfo_v1_t, memUtil),
    PART(nvmlProcessUtilizationInfo_v1_t, encUtil),
    PART(nvmlProcessUtilizationInfo_v1_t, decUtil),
    PART(nvmlProcessUtilizationInfo_v1_t, jpgUtil),
    PART(nvmlProcessUtilizationInfo_v1_t, ofaUtil),
    WHOLE(nvmlProcessesUtilizationInfo_v1_t),
    PART(nvmlProcessesUtilizationInfo_v1_t, version),
    PART(nvmlProcessesUtilizationInfo_v1_t, processSamplesCount),
    PART(nvmlProcessesUtilizationInfo_v1_t, lastSeenTimeStamp),
    PART(nvmlProcessesUtilizationInfo_v1_t, procUtilArray),
    WHOLE(nvmlDeviceAttributes_t),
    PART(nvmlDeviceAttributes_t, multiprocessorCount),
    PART(nvmlDeviceAttributes_t, sharedCopyEngineCount),
    PART(nvmlDeviceAttributes_t, sharedDecoderCount),
    PART(nvmlDeviceAttributes_t, sharedEncoderCount),
    PART(nvmlDeviceAttributes_t, sharedJpegCount),
    PART(nvmlDeviceAttributes_t, sharedOfaCount),
    PART(nvmlDeviceAttributes_t, gpuInstanceSliceCount),
    PART(nvmlDeviceAttributes_t, computeInstanceSliceCount),
    PART(nvmlDeviceAttributes_t, memorySizeMB),
    WHOLE(nvmlEventData_t),
    PART(nvmlEventData_t, device),
    PART(nvmlEventData_t, eventType),
    PART(nvmlEventData_t, eventData),
    PART(nvmlEventData_t, gpuInstanceId),
    PART(nvmlEventData_t, computeInstanceId),
    WHOLE(nvmlTemperature_v1_t),
    PART(nvmlTemperature_v1_t, version),
    PART(nvmlTemperature_v1_t, sensorType),
    PART(nvmlTemperature_v1_t, temperature),
    WHOLE(nvmlGpmMetric_t),
    PART(nvmlGpmMetric_t, metricId),
    PART(nvmlGpmMetric_t, nvmlReturn),
    PART(nvmlGpmMetric_t, value),
    PART(nvmlGpmMetric_t, metricInfo),
    PART(nvmlGpmMetricsGet_t, version),
    PART(nvmlGpmMetricsGet_t, numMetrics),
    PART(nvmlGpmMetricsGet_t, sample1),
    PART(nvmlGpmMetricsGet_t, sample2),
    {"nvmlGpmMetricsGet_t", "metrics", offsetof(nvmlGpmMetricsGet_t, metrics), 0},
    WHOLE(nvmlGpmSupport_t),
    PART(nvmlGpmSupport_t, version),
    PART(nvmlGpmSupport_t, isSupportedDevice),
    {NULL, NULL, 0, 0},
};

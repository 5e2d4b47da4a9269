/* Parser and store of the scenario. In flows the text of the file, out flow the sorted steps and the answers
 * to "what is this key at time t". A line that is not understood fails the whole file, named on stderr. */
#include "scenario.h"

#include <ctype.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LINE = 1023, MAX_STEPS = 2000000, MAX_PARTS = 8, MAX_OPTIONS = 24 };
static const double MAX_TIME = 1e9;

enum Form { NUMBER, TEXT, ARCH, STATE, CODE, FIELD_TYPE, PROCESS, MIG, EVENT, CLOCK_START };

typedef struct {
    unsigned owner;
    enum Kind kind;
    uint32_t a, b;
    enum Form form;
    double scale;
} Target;

typedef struct {
    Scenario *scenario;
    const char *path;
    unsigned line;
} Parser;

static bool bad(const Parser *parser, const char *format, ...)
{
    char message[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    fprintf(stderr, "%s:%u: %s\n", parser->path, parser->line, message);
    return false;
}

/* ---- words and numbers ---- */

typedef struct {
    const char *name;
    double value;
} Word;

static const Word RETURN_CODES[] = {
    {"ok", 0},
    {"success", 0},
    {"uninitialized", 1},
    {"invalid_argument", 2},
    {"not_supported", 3},
    {"no_permission", 4},
    {"not_found", 6},
    {"insufficient_size", 7},
    {"driver_not_loaded", 9},
    {"timeout", 10},
    {"function_not_found", 13},
    {"lost", 15},
    {"gpu_is_lost", 15},
    {"reset_required", 16},
    {"version_mismatch", 18},
    {"insufficient_resources", 23},
    {"not_ready", 27},
    {"unknown", 999},
    {NULL, 0},
};
static const Word ARCHITECTURES[] = {
    {"kepler", 2},
    {"maxwell", 3},
    {"pascal", 4},
    {"volta", 5},
    {"turing", 6},
    {"ampere", 7},
    {"ada", 8},
    {"hopper", 9},
    {"blackwell", 10},
    {"rubin", 13},
    {"unknown", 4294967295.0},
    {NULL, 0},
};
static const Word DRIVER_STATES[] = {
    {"ok", DRIVER_OK},
    {"not_loaded", DRIVER_NOT_LOADED},
    {"version_mismatch", DRIVER_VERSION_MISMATCH},
    {"reloading", DRIVER_RELOADING},
    {NULL, 0},
};
static const Word VALUE_TYPES[] = {
    {"double", 0}, {"uint", 1}, {"ulong", 2}, {"ull", 3}, {"sll", 4}, {"int", 5}, {"ushort", 6}, {NULL, 0},
};
static const Word EVENT_TYPES[] = {
    {"ecc_sbe", 0x1},
    {"ecc_dbe", 0x2},
    {"pstate", 0x4},
    {"xid", 0x8},
    {"clock", 0x10},
    {"power_source", 0x80},
    {"mig_config", 0x100},
    {"ecc_sbe_storm", 0x200},
    {"dram_retirement", 0x400},
    {"dram_retirement_failure", 0x800},
    {"poison", 0x1000},
    {"poison_fatal", 0x2000},
    {"gpu_unavailable", 0x4000},
    {"recovery_action", 0x8000},
    {NULL, 0},
};
static const Word PROCESS_TYPES[] = {
    {"compute", PROC_COMPUTE},
    {"graphics", PROC_GRAPHICS},
    {"mps", PROC_MPS},
    {NULL, 0},
};
static const Word ECC_TYPES[] = {{"corrected", 0}, {"uncorrected", 1}, {NULL, 0}};
static const Word ECC_COUNTERS[] = {{"volatile", 0}, {"aggregate", 1}, {NULL, 0}};
static const Word ECC_LOCATIONS[] = {
    {"l1", 0}, {"l2", 1}, {"dram", 2}, {"register", 3}, {"texture", 4}, {"cbu", 6}, {"sram", 7}, {NULL, 0},
};
static const Word LINK_WORDS[] = {
#define X(id, name) {name, LINK_##id},
    LINK_VALUES(X)
#undef X
        {NULL, 0},
};

typedef struct {
    const char *name;
    enum Kind kind;
    enum Form form;
    double scale;
} PlainKey;

static const double MIB = 1048576;
static const PlainKey PLAIN_KEYS[] = {
#define X(id, name, form, scale) {name, K_##id, form, scale},
    GPU_KEYS(X)
#undef X
        {"total_mib", K_TOTAL_BYTES, NUMBER, 1048576},
    {"used_mib", K_USED_BYTES, NUMBER, 1048576},
    {"reserved_mib", K_RESERVED_BYTES, NUMBER, 1048576},
    {"bar1_total_mib", K_BAR1_TOTAL_BYTES, NUMBER, 1048576},
    {"bar1_used_mib", K_BAR1_USED_BYTES, NUMBER, 1048576},
};

static bool find_word(const Word *words, const char *name, double *value)
{
    for (; words->name; words++)
        if (!strcmp(words->name, name)) {
            *value = words->value;
            return true;
        }
    return false;
}

static bool parse_number(const char *text, double *value)
{
    char *end;
    if (!*text || isspace((unsigned char)*text))
        return false;
    *value = strtod(text, &end);
    return !*end && isfinite(*value);
}

static bool parse_index(const char *text, uint32_t most, uint32_t *value)
{
    size_t length = strlen(text);
    if (!length || length > 10 || strspn(text, "0123456789") != length)
        return false;
    unsigned long long number = strtoull(text, NULL, 10);
    *value = (uint32_t)number;
    return number <= most;
}

static bool word_or_number(const Word *words, const char *text, double *value)
{
    return find_word(words, text, value) || parse_number(text, value);
}

static char *trim(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    size_t length = strlen(text);
    while (length && isspace((unsigned char)text[length - 1]))
        text[--length] = 0;
    return text;
}

/* Grows *items so that one more fits; false without memory. */
static bool make_room(void **items, uint32_t count, uint32_t *room, size_t size)
{
    if (count < *room)
        return true;
    uint32_t wanted = *room ? *room * 2 : 64;
    void *moved = realloc(*items, (size_t)wanted * size);
    if (!moved)
        return false;
    *items = moved;
    *room = wanted;
    return true;
}

/* ---- keys ---- */

static int split_key(char *key, char **parts)
{
    int count = 0;
    for (char *rest = key; count < MAX_PARTS;) {
        parts[count++] = rest;
        rest = strchr(rest, '.');
        if (!rest)
            return count;
        *rest++ = 0;
    }
    return 0;
}

static bool plain_key(const char *name, Target *target)
{
    for (size_t i = 0; i < sizeof PLAIN_KEYS / sizeof *PLAIN_KEYS; i++)
        if (!strcmp(PLAIN_KEYS[i].name, name)) {
            target->kind = PLAIN_KEYS[i].kind;
            target->form = PLAIN_KEYS[i].form;
            target->scale = PLAIN_KEYS[i].scale;
            return true;
        }
    return false;
}

/* fail.FUNCTION and hang.FUNCTION, FUNCTION being a name or "*". */
static bool trouble_key(char **parts, int count, Target *target)
{
    if (count != 2)
        return false;
    bool fail = !strcmp(parts[0], "fail");
    if (!fail && strcmp(parts[0], "hang") != 0)
        return false;
    int function = strcmp(parts[1], "*") ? function_number(parts[1]) : -1;
    if (function < 0 && strcmp(parts[1], "*") != 0)
        return false;
    target->kind = fail ? K_FAIL : K_HANG;
    target->form = fail ? CODE : NUMBER;
    target->a = (uint32_t)(function + 1);
    return true;
}

/* field.ID, field.ID.error, field.ID.type, each also with .scope.S after the id. */
static bool field_key(char **parts, int count, Target *target)
{
    target->kind = K_FIELD;
    if (count < 2 || !parse_index(parts[1], MAX_FIELD, &target->a))
        return false;
    int next = 2;
    if (count > 3 && !strcmp(parts[2], "scope")) {
        uint32_t scope;
        if (!strcmp(parts[3], "all"))
            scope = SCOPE_ALL;
        else if (!parse_index(parts[3], 0xFFF0, &scope))
            return false;
        target->b = scope + 1;
        next = 4;
    }
    if (next == count)
        return true;
    target->kind = !strcmp(parts[next], "error") ? K_FIELD_ERROR : K_FIELD_TYPE;
    target->form = target->kind == K_FIELD_ERROR ? CODE : FIELD_TYPE;
    return next + 1 == count && (target->kind == K_FIELD_ERROR || !strcmp(parts[next], "type"));
}

/* ecc.TYPE.COUNTER and ecc.TYPE.COUNTER.LOCATION */
static bool ecc_key(char **parts, int count, Target *target)
{
    double type, counter, location = -1;
    if (count < 3 || count > 4 || !find_word(ECC_TYPES, parts[1], &type)
        || !find_word(ECC_COUNTERS, parts[2], &counter)
        || (count == 4 && !find_word(ECC_LOCATIONS, parts[3], &location)))
        return false;
    target->kind = K_ECC;
    target->a = (uint32_t)(type * 2 + counter);
    target->b = (uint32_t)(location + 1);
    return true;
}

static bool nvlink_key(char **parts, int count, Target *target)
{
    if (count == 2 && !strcmp(parts[1], "count")) {
        target->kind = K_NVLINK_COUNT;
        return true;
    }
    double value;
    uint32_t link = 0;
    if (count != 3 || !find_word(LINK_WORDS, parts[2], &value))
        return false;
    if (strcmp(parts[1], "*") != 0) {
        if (!parse_index(parts[1], MAX_LINKS - 1, &link))
            return false;
        link++;
    }
    target->kind = K_NVLINK;
    target->a = (uint32_t)value;
    target->b = link;
    return true;
}

static bool mig_key(char **parts, int count, Target *target)
{
    uint32_t index;
    if (count < 2 || !parse_index(parts[1], MAX_MIG - 1, &index))
        return false;
    if (count == 2) {
        target->kind = K_MIG;
        target->a = index;
        target->form = MIG;
        return true;
    }
    target->kind = K_MIG_GPM;
    target->b = index;
    return count == 4 && !strcmp(parts[2], "gpm") && parse_index(parts[3], MAX_GPM_METRIC, &target->a);
}

/* The key after "gpu.N." */
static bool gpu_key(char **parts, int count, Target *target)
{
    const char *head = parts[0];
    bool one_gpu = target->owner < MAX_GPUS;
    if (count == 1 && plain_key(head, target))
        return one_gpu || (target->kind != K_UUID && target->kind != K_PCI_BUS_ID && target->kind != K_MINOR);
    if (!strcmp(head, "field"))
        return field_key(parts, count, target);
    if (!strcmp(head, "gpm")) {
        target->kind = K_GPM;
        return count == 2 && parse_index(parts[1], MAX_GPM_METRIC, &target->a);
    }
    if (!strcmp(head, "ecc"))
        return ecc_key(parts, count, target);
    if (!strcmp(head, "nvlink"))
        return nvlink_key(parts, count, target);
    if (trouble_key(parts, count, target))
        return true;
    if (!one_gpu) /* instances, processes and events belong to one GPU */
        return false;
    if (!strcmp(head, "mig"))
        return mig_key(parts, count, target);
    if (!strcmp(head, "proc")) {
        target->kind = K_PROC;
        target->form = PROCESS;
        return count == 2 && parse_index(parts[1], UINT32_MAX - 1, &target->a);
    }
    target->kind = K_EVENT;
    target->form = EVENT;
    return count == 1 && !strcmp(head, "event");
}

static bool parse_key(char *key, Target *target)
{
    char *parts[MAX_PARTS];
    static const PlainKey GLOBAL_KEYS[] = {
        {"driver.version", K_DRIVER_VERSION, TEXT, 1},
        {"driver.cuda", K_DRIVER_CUDA, TEXT, 1},
        {"driver.nvml", K_DRIVER_NVML, TEXT, 1},
        {"driver.state", K_DRIVER_STATE, STATE, 1},
        {"driver.generation", K_DRIVER_GENERATION, NUMBER, 1},
        {"gpu.count", K_GPU_COUNT, NUMBER, 1},
        {"clock.start", K_GPU_COUNT, CLOCK_START, 1},
    };
    *target = (Target){.owner = OWNER_GLOBAL, .form = NUMBER, .scale = 1};
    for (size_t i = 0; i < sizeof GLOBAL_KEYS / sizeof *GLOBAL_KEYS; i++)
        if (!strcmp(GLOBAL_KEYS[i].name, key)) {
            target->kind = GLOBAL_KEYS[i].kind;
            target->form = GLOBAL_KEYS[i].form;
            return true;
        }
    int count = split_key(key, parts);
    if (trouble_key(parts, count, target))
        return true;
    if (count < 3 || strcmp(parts[0], "gpu") != 0)
        return false;
    uint32_t gpu = OWNER_ANY_GPU;
    if (strcmp(parts[1], "*") != 0 && !parse_index(parts[1], MAX_GPUS - 1, &gpu))
        return false;
    target->owner = gpu;
    return gpu_key(parts + 2, count - 2, target);
}

/* ---- values ---- */

typedef struct {
    const char *name, *value;
} Option;

/* Cuts "a=1 b=2" in place; -1 if malformed. */
static int parse_options(char *text, Option *options)
{
    int count = 0;
    char *rest = NULL;
    for (char *word = strtok_r(text, " \t", &rest); word; word = strtok_r(NULL, " \t", &rest)) {
        char *equals = strchr(word, '=');
        if (!equals || equals == word || !equals[1] || count == MAX_OPTIONS)
            return -1;
        *equals = 0;
        options[count++] = (Option){word, equals + 1};
    }
    return count;
}

static bool option_u32(const Option *option, const char *name, uint32_t *value)
{
    return !strcmp(option->name, name) && parse_index(option->value, UINT32_MAX, value);
}

/* name_mib or name_bytes */
static bool option_bytes(const Option *option, const char *name, uint64_t *value)
{
    size_t length = strlen(name);
    double number;
    if (strncmp(option->name, name, length) != 0 || !parse_number(option->value, &number) || number < 0
        || number > 1e15)
        return false;
    bool mib = !strcmp(option->name + length, "_mib");
    if (!mib && strcmp(option->name + length, "_bytes") != 0)
        return false; /* another name that begins alike */
    *value = (uint64_t)(number * (mib ? MIB : 1));
    return true;
}

static bool process_option(const Option *option, Process *process)
{
    double type;
    if (!strcmp(option->name, "type") && find_word(PROCESS_TYPES, option->value, &type)) {
        process->type = (enum ProcessType)type;
        return true;
    }
    if (!strcmp(option->name, "mem") && !strcmp(option->value, "none")) {
        process->memory = UINT64_MAX;
        return true;
    }
    return option_bytes(option, "mem", &process->memory) || option_u32(option, "sm", &process->sm)
           || option_u32(option, "memutil", &process->mem) || option_u32(option, "enc", &process->enc)
           || option_u32(option, "dec", &process->dec) || option_u32(option, "gi", &process->gi)
           || option_u32(option, "ci", &process->ci);
}

static bool mig_option(const Option *option, Mig *mig)
{
    const char **text = !strcmp(option->name, "uuid")      ? &mig->uuid
                        : !strcmp(option->name, "profile") ? &mig->profile
                                                           : NULL;
    if (text) {
        *text = option->value;
        return true;
    }
    return option_u32(option, "gi", &mig->gi) || option_u32(option, "ci", &mig->ci)
           || option_u32(option, "slices", &mig->slices) || option_u32(option, "ci_slices", &mig->ci_slices)
           || option_u32(option, "sm", &mig->sm) || option_u32(option, "ce", &mig->copy_engines)
           || option_u32(option, "dec", &mig->decoders) || option_u32(option, "enc", &mig->encoders)
           || option_u32(option, "jpg", &mig->jpegs) || option_u32(option, "ofa", &mig->ofas)
           || option_bytes(option, "total", &mig->total) || option_bytes(option, "used", &mig->used)
           || option_bytes(option, "reserved", &mig->reserved);
}

static bool parse_process(Parser *parser, char *value, Step *step)
{
    Scenario *s = parser->scenario;
    Option options[MAX_OPTIONS];
    Process process = {.type = PROC_COMPUTE, .gi = UINT32_MAX, .ci = UINT32_MAX};
    if (!strcmp(value, "gone")) {
        process.type = PROC_GONE;
    } else {
        int count = parse_options(value, options);
        if (count < 0)
            return bad(parser, "a process is 'gone' or name=value words");
        for (int i = 0; i < count; i++)
            if (!process_option(&options[i], &process))
                return bad(parser, "bad process option %s=%s", options[i].name, options[i].value);
    }
    if (!make_room((void **)&s->processes, s->process_count, &s->process_room, sizeof process))
        return bad(parser, "out of memory");
    step->record = s->process_count;
    s->processes[s->process_count++] = process;
    return true;
}

static bool parse_mig(Parser *parser, char *value, Step *step)
{
    Scenario *s = parser->scenario;
    Option options[MAX_OPTIONS];
    Mig mig = {.uuid = "", .profile = "1g.10gb", .slices = 1, .ci_slices = 1, .gone = !strcmp(value, "gone")};
    if (!mig.gone) {
        int count = parse_options(value, options);
        if (count < 0)
            return bad(parser, "a MIG instance is 'gone' or name=value words");
        for (int i = 0; i < count; i++)
            if (!mig_option(&options[i], &mig))
                return bad(parser, "bad MIG option %s=%s", options[i].name, options[i].value);
        if (!*mig.uuid)
            return bad(parser, "a MIG instance needs uuid=");
    }
    if (!make_room((void **)&s->migs, s->mig_count, &s->mig_room, sizeof mig))
        return bad(parser, "out of memory");
    step->record = s->mig_count;
    s->migs[s->mig_count++] = mig;
    return true;
}

/* NAME [DATA] [gi=N] [ci=N] */
static bool parse_event(Parser *parser, char *value, Step *step)
{
    Scenario *s = parser->scenario;
    Event event = {.gi = UINT32_MAX, .ci = UINT32_MAX};
    char *rest = NULL;
    double type, data = 0;
    char *word = strtok_r(value, " \t", &rest);
    if (!word || !find_word(EVENT_TYPES, word, &type))
        return bad(parser, "unknown event %s", word ? word : "");
    while ((word = strtok_r(NULL, " \t", &rest))) {
        if (!strncmp(word, "gi=", 3) && parse_index(word + 3, UINT32_MAX, &event.gi))
            continue;
        if (!strncmp(word, "ci=", 3) && parse_index(word + 3, UINT32_MAX, &event.ci))
            continue;
        if (!parse_number(word, &data) || data < 0 || data > 1e15)
            return bad(parser, "bad event data %s", word);
    }
    event.type = (uint64_t)type;
    event.data = (uint64_t)data;
    if (!make_room((void **)&s->events, s->event_count, &s->event_room, sizeof event))
        return bad(parser, "out of memory");
    step->record = s->event_count;
    s->events[s->event_count++] = event;
    return true;
}

static bool parse_numeric(Parser *parser, const Target *target, const char *value, Step *step)
{
    const Word *words = target->form == CODE         ? RETURN_CODES
                        : target->form == ARCH       ? ARCHITECTURES
                        : target->form == STATE      ? DRIVER_STATES
                        : target->form == FIELD_TYPE ? VALUE_TYPES
                                                     : NULL;
    bool words_only = target->form == STATE || target->form == FIELD_TYPE;
    bool found = !words       ? parse_number(value, &step->number)
                 : words_only ? find_word(words, value, &step->number)
                              : word_or_number(words, value, &step->number);
    if (!found)
        return bad(parser, "bad value %s", value);
    if (target->form == NUMBER && target->kind == K_GPU_COUNT
        && !(step->number >= 0 && step->number <= MAX_GPUS))
        return bad(parser, "gpu.count must be 0 to %d", MAX_GPUS);
    step->number *= target->scale;
    return true;
}

static bool parse_value(Parser *parser, const Target *target, char *value, Step *step)
{
    bool unset = !strcmp(value, "none");
    step->text = value; /* exact digits of large numbers, too */
    step->number = NAN;
    switch (target->form) {
    case PROCESS:
        return parse_process(parser, value, step);
    case MIG:
        return parse_mig(parser, value, step);
    case EVENT:
        return parse_event(parser, value, step);
    case TEXT:
        step->text = unset ? NULL : value;
        return true;
    case NUMBER:
        if (unset) {
            step->text = NULL;
            return true;
        }
        return parse_numeric(parser, target, value, step);
    default:
        return parse_numeric(parser, target, value, step);
    }
}

/* ---- lines ---- */

/* Takes "@12.5 " off the line's front. */
static bool parse_time(char **line, double *at)
{
    *at = 0;
    if (**line != '@')
        return true;
    char *end = *line + strcspn(*line, " \t");
    if (!*end)
        return false;
    *end = 0;
    bool found = parse_number(*line + 1, at) && *at >= 0 && *at <= MAX_TIME;
    *line = trim(end + 1);
    return found;
}

static bool add_step(Parser *parser, const Target *target, const Step *step)
{
    Scenario *s = parser->scenario;
    if (s->step_count == MAX_STEPS)
        return bad(parser, "more than %d lines", MAX_STEPS);
    if (!make_room((void **)&s->steps, s->step_count, &s->step_room, sizeof *step))
        return bad(parser, "out of memory");
    s->steps[s->step_count++] = *step;
    if (target->kind == K_FAIL || target->kind == K_HANG)
        s->trouble[target->owner] = true;
    return true;
}

static bool parse_line(Parser *parser, char *line)
{
    if (strlen(line) > MAX_LINE)
        return bad(parser, "line longer than %d bytes", MAX_LINE);
    line = trim(line);
    if (!*line || *line == '#')
        return true;
    Step step = {.line = parser->line};
    if (!parse_time(&line, &step.at))
        return bad(parser, "bad time, expected '@SECONDS key = value'");
    char *equals = strchr(line, '=');
    if (!equals)
        return bad(parser, "expected 'key = value'");
    *equals = 0;
    char *key = trim(line), *value = trim(equals + 1);
    char shown[128];
    snprintf(shown, sizeof shown, "%s", key); /* parse_key cuts the key up */
    Target target;
    if (!parse_key(key, &target))
        return bad(parser, "unknown key %s", shown);
    if (!*value)
        return bad(parser, "no value for %s", shown);
    if (!parse_value(parser, &target, value, &step))
        return false;
    if (target.form == CLOCK_START) {
        parser->scenario->clock_start = step.number;
        return true;
    }
    step.key = scenario_key(target.owner, target.kind, target.a, target.b);
    return add_step(parser, &target, &step);
}

static bool parse_lines(Parser *parser, char *text, size_t size)
{
    text[size] = 0;
    parser->line = 1;
    if (strlen(text) != size)
        return bad(parser, "the file holds a zero byte");
    for (char *line = text; line;) {
        char *end = strchr(line, '\n');
        if (end)
            *end++ = 0;
        if (!parse_line(parser, line))
            return false;
        parser->line++;
        line = end;
    }
    return true;
}

/* ---- the sorted store ---- */

static int compare_steps(const void *left, const void *right)
{
    const Step *a = left, *b = right;
    if (a->key != b->key)
        return a->key < b->key ? -1 : 1;
    if (a->at != b->at)
        return a->at < b->at ? -1 : 1;
    return a->line < b->line ? -1 : a->line > b->line;
}

static void integrate(Step *steps, uint32_t count)
{
    steps[0].integral = 0;
    for (uint32_t i = 1; i < count; i++) {
        double value = isnan(steps[i - 1].number) ? 0 : steps[i - 1].number;
        steps[i].integral = steps[i - 1].integral + value * (steps[i].at - steps[i - 1].at);
    }
}

static bool index_steps(Parser *parser)
{
    Scenario *s = parser->scenario;
    if (s->step_count)
        qsort(s->steps, s->step_count, sizeof *s->steps, compare_steps);
    s->series = malloc((s->step_count + 1) * sizeof *s->series);
    if (!s->series)
        return bad(parser, "out of memory");
    for (uint32_t i = 0; i < s->step_count; i++) {
        if (!i || s->steps[i].key != s->steps[i - 1].key)
            s->series[s->series_count++] = (Series){s->steps[i].key, i, 0};
        s->series[s->series_count - 1].count++;
    }
    for (uint32_t i = 0; i < s->series_count; i++)
        integrate(s->steps + s->series[i].first, s->series[i].count);
    for (unsigned gpu = 0; gpu < MAX_GPUS; gpu++) {
        uint32_t first, last;
        scenario_range(s, gpu, K_PROC, &first, &last);
        if (last - first > MAX_PROCESSES)
            return bad(parser, "more than %d processes on gpu.%u", MAX_PROCESSES, gpu);
    }
    return true;
}

Scenario *scenario_parse(const char *path, char *text, size_t size)
{
    Scenario *scenario = calloc(1, sizeof *scenario);
    Parser parser = {.scenario = scenario, .path = path};
    if (!scenario) {
        free(text);
        return NULL;
    }
    scenario->text = text;
    scenario->clock_start = NAN;
    if (!parse_lines(&parser, text, size) || !index_steps(&parser)) {
        scenario_free(scenario);
        return NULL;
    }
    return scenario;
}

void scenario_free(Scenario *scenario)
{
    if (!scenario)
        return;
    free(scenario->text);
    free(scenario->steps);
    free(scenario->series);
    free(scenario->processes);
    free(scenario->migs);
    free(scenario->events);
    free(scenario);
}

/* ---- questions ---- */

/* Owner, kind, a and b in one number whose order is theirs. A scope of "all" fits as the largest b. */
uint64_t scenario_key(unsigned owner, enum Kind kind, uint32_t a, uint32_t b)
{
    uint64_t low = b > 0xFFFF ? 0xFFFF : b;
    return (uint64_t)owner << 56 | (uint64_t)kind << 48 | (uint64_t)a << 16 | low;
}

/* Index of the first series whose key is not below the wanted one. */
static uint32_t lower_bound(const Scenario *scenario, uint64_t key)
{
    uint32_t low = 0, high = scenario->series_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (scenario->series[middle].key < key)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

const Series *scenario_series(const Scenario *scenario, uint64_t key)
{
    uint32_t index = lower_bound(scenario, key);
    return index < scenario->series_count && scenario->series[index].key == key ? &scenario->series[index]
                                                                                : NULL;
}

const Step *scenario_step(const Scenario *scenario, const Series *series, double t)
{
    const Step *steps = scenario->steps + series->first;
    uint32_t low = 0, high = series->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (steps[middle].at <= t)
            low = middle + 1;
        else
            high = middle;
    }
    return low ? &steps[low - 1] : NULL;
}

static const Step *own_step(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t a, uint32_t b,
                            double t)
{
    const Series *series = scenario_series(scenario, scenario_key(owner, kind, a, b));
    return series ? scenario_step(scenario, series, t) : NULL;
}

const Step *scenario_find(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t a, uint32_t b,
                          double t)
{
    const Step *step = own_step(scenario, owner, kind, a, b, t);
    return step || owner >= MAX_GPUS ? step : own_step(scenario, OWNER_ANY_GPU, kind, a, b, t);
}

double scenario_number(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t a, uint32_t b,
                       double t)
{
    const Step *step = scenario_find(scenario, owner, kind, a, b, t);
    return step ? step->number : NAN;
}

bool scenario_has(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t a, uint32_t b)
{
    return scenario_series(scenario, scenario_key(owner, kind, a, b))
           || scenario_series(scenario, scenario_key(OWNER_ANY_GPU, kind, a, b));
}

static double series_integral(const Scenario *scenario, const Series *series, double t)
{
    const Step *step = series ? scenario_step(scenario, series, t) : NULL;
    if (!step)
        return 0;
    return step->integral + (isnan(step->number) ? 0 : step->number * (t - step->at));
}

/* gpu.*'s series counts until gpu.N's own first step, as it does for scenario_find. */
double scenario_integral(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t a, uint32_t b,
                         double t)
{
    const Series *own = scenario_series(scenario, scenario_key(owner, kind, a, b));
    const Series *any = scenario_series(scenario, scenario_key(OWNER_ANY_GPU, kind, a, b));
    double until = t;
    if (own && scenario->steps[own->first].at < t)
        until = scenario->steps[own->first].at;
    return series_integral(scenario, own, t) + series_integral(scenario, any, until);
}

void scenario_range(const Scenario *scenario, unsigned owner, enum Kind kind, uint32_t *first, uint32_t *last)
{
    *first = lower_bound(scenario, scenario_key(owner, kind, 0, 0));
    *last = lower_bound(scenario, scenario_key(owner, kind + 1, 0, 0));
}

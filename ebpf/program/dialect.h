/* What the two ways to the kernel spell differently: an object compiled ahead for libbpf (the default), and bcc, which
 * compiles on the node and is told the maps' file descriptors as MAP_<name>. The maps are made by `ebpf/maps.py` either
 * way; libbpf is handed them in place of those declared here. */
#pragma once

#define INLINE static inline __attribute__((always_inline))

#ifdef FOR_BCC

#include <uapi/linux/ptrace.h>
#define PROBE(name) int name(struct pt_regs *ctx)
#define RAW_TRACEPOINT(name) int name(struct bpf_raw_tracepoint_args *ctx)
#define DECLARE_MAP(name, type, key_type, value_type)
#define MAP(name) ((void *)bpf_pseudo_fd(1, MAP_##name))
#define ARG1(ctx) PT_REGS_PARM1(ctx)
#define ARG2(ctx) PT_REGS_PARM2(ctx)
#define ARG3(ctx) PT_REGS_PARM3(ctx)
#define ARG4(ctx) PT_REGS_PARM4(ctx)
#define ARG5(ctx) PT_REGS_PARM5(ctx)
#define RESULT(ctx) PT_REGS_RC(ctx)
#define STACK_POINTER(ctx) PT_REGS_SP(ctx)
#define INSTRUCTION(ctx) PT_REGS_IP(ctx)
#define FRAME(ctx) PT_REGS_FP(ctx)
#if defined(__x86_64__)
#define RETURN_POPS 8
#else
#define RETURN_POPS 0
#endif

#else

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#define PROBE(name) SEC("uprobe") int name(struct registers *ctx)
#define RAW_TRACEPOINT(name) SEC("raw_tracepoint") int name(struct bpf_raw_tracepoint_args *ctx)
/* Sizes and flags are the loader's. */
#define DECLARE_MAP(map_name, map_type, key_type, value_type) \
  struct {                                                    \
    __uint(type, map_type);                                   \
    __uint(max_entries, 1);                                   \
    __type(key, key_type);                                    \
    __type(value, value_type);                                \
  } map_name##_map SEC(".maps");
#define MAP(name) ((void *)&name##_map)

/* The registers as the kernel hands them to the probe of a user's function; no kernel header is asked for them. */
#if defined(TARGET_X86_64)
struct registers {
  unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
};
#define ARG1(ctx) ((ctx)->di)
#define ARG2(ctx) ((ctx)->si)
#define ARG3(ctx) ((ctx)->dx)
#define ARG4(ctx) ((ctx)->cx)
#define ARG5(ctx) ((ctx)->r8)
#define RESULT(ctx) ((ctx)->ax)
#define STACK_POINTER(ctx) ((ctx)->sp)
#define INSTRUCTION(ctx) ((ctx)->ip)
#define FRAME(ctx) ((ctx)->bp)
#define RETURN_POPS 8 /* at the entry the stack pointer is at the return address, after the return above it */
#elif defined(TARGET_AARCH64)
struct registers {
  __u64 regs[31], sp, pc, pstate;
};
#define ARG1(ctx) ((ctx)->regs[0])
#define ARG2(ctx) ((ctx)->regs[1])
#define ARG3(ctx) ((ctx)->regs[2])
#define ARG4(ctx) ((ctx)->regs[3])
#define ARG5(ctx) ((ctx)->regs[4])
#define RESULT(ctx) ((ctx)->regs[0])
#define STACK_POINTER(ctx) ((ctx)->sp)
#define INSTRUCTION(ctx) ((ctx)->pc)
#define FRAME(ctx) ((ctx)->regs[29])
#define RETURN_POPS 0
#else
#error "give -DTARGET_X86_64 or -DTARGET_AARCH64"
#endif
char LICENSE[] SEC("license") = "Dual MIT/GPL";

#endif

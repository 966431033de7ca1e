// Runs a CUDA kernel on the CPU: one block at a time, its threads as fibres, __shared__ as static memory.
//
// A fibre runs until a barrier or a shuffle. A warp is advanced until all its lanes wait at a barrier, then the next
// warp: the order in which a missing barrier shows most. Warps and lanes are taken in an order drawn from a seed, and
// one barrier, named by its source line, can be left out (`skipped_line`): that is the mutation check.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define SUBQUAD_HOST
#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx;

namespace shim {

enum State { READY, SHUFFLE, BARRIER, DONE };
enum Result { OK, UNKNOWN_KERNEL, DIVERGED, LEFT_BEFORE_BARRIER };

constexpr int MAX_THREADS = 1024;
constexpr std::size_t STACK = 256 * 1024;

struct Fibre {
    void* stack_pointer;
    char* stack = nullptr;
    State state;
    bool parity;  // slots are double-buffered, so that one wait per shuffle is enough
};
inline Fibre fibres[MAX_THREADS];
inline void* scheduler;
inline std::uint64_t slots[MAX_THREADS / 32][2][32];
inline bool votes[2], vote_parity;
inline int skipped_line;

// Saves the callee-saved registers on the current stack and continues on another.
extern "C" void shim_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl shim_switch
.type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
inline void* prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    return std::memset(top - 6, 0, 6 * sizeof(void*));
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl shim_switch
.type shim_switch, %function
shim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
inline void* prepare(char* stack, void (*entry)()) {
    char* top = static_cast<char*>(std::memset(stack + STACK - 160, 0, 160));
    const auto address = reinterpret_cast<std::uint64_t>(entry);
    std::memcpy(top + 88, &address, 8);
    return top;
}
#else
#error "the shim switches fibres on x86-64 and aarch64 only"
#endif

inline void wait(State state) {
    Fibre& fibre = fibres[threadIdx.x];
    fibre.state = state;
    shim_switch(&fibre.stack_pointer, scheduler);
}

inline void barrier(int line) {
    if (line != skipped_line) wait(BARRIER);
}

inline bool barrier_and(bool vote, int line) {
    if (line == skipped_line) return vote;
    const bool parity = vote_parity;
    votes[parity] &= vote;
    wait(BARRIER);
    return votes[parity];
}

template <typename T> T shuffle_xor(T value, int mask) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Fibre& fibre = fibres[threadIdx.x];
    auto& slot = slots[warp][fibre.parity];
    fibre.parity = !fibre.parity;
    std::memcpy(&slot[lane], &value, sizeof value);
    wait(SHUFFLE);
    std::memcpy(&value, &slot[lane ^ mask], sizeof value);
    return value;
}

inline void (*body)();
inline void enter() {
    body();
    wait(DONE);
    std::abort();
}

// Advances a warp until its lanes wait at a barrier or are done.
inline Result run_warp(int warp, const std::vector<int>& lanes) {
    for (;;) {
        int waiting[4] = {};
        for (int lane : lanes) {
            Fibre& fibre = fibres[warp * 32 + lane];
            if (fibre.state == READY) {
                threadIdx.x = warp * 32 + lane;
                shim_switch(&scheduler, fibre.stack_pointer);
            }
            ++waiting[fibre.state];
        }
        if (waiting[SHUFFLE] == 0) return OK;
        if (waiting[SHUFFLE] != 32) return DIVERGED;
        for (int lane = 0; lane < 32; ++lane) fibres[warp * 32 + lane].state = READY;
    }
}

inline Result run_block(int threads, std::mt19937& random, bool shuffled) {
    std::vector<int> warps(threads / 32), lanes(32);
    for (int i = 0; i < int(warps.size()); ++i) warps[i] = i;
    for (int i = 0; i < 32; ++i) lanes[i] = i;
    for (int i = 0; i < threads; ++i) {
        Fibre& fibre = fibres[i];
        if (!fibre.stack) fibre.stack = static_cast<char*>(std::aligned_alloc(64, STACK));
        fibre.stack_pointer = prepare(fibre.stack, enter);
        fibre.state = READY;
        fibre.parity = false;
    }
    votes[0] = votes[1] = true;
    for (;;) {
        if (shuffled) {
            std::shuffle(warps.begin(), warps.end(), random);
            std::shuffle(lanes.begin(), lanes.end(), random);
        }
        for (int warp : warps)
            if (const Result result = run_warp(warp, lanes)) return result;
        int done = 0;
        for (int i = 0; i < threads; ++i) done += fibres[i].state == DONE;
        if (done == threads) return OK;
        if (done) return LEFT_BEFORE_BARRIER;
        for (int i = 0; i < threads; ++i) fibres[i].state = READY;
        vote_parity = !vote_parity;
        votes[vote_parity] = true;
    }
}

}  // namespace shim

#define __syncthreads() shim::barrier(__LINE__)
#define __syncthreads_and(vote) shim::barrier_and(vote, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) shim::shuffle_xor(value, lanes)

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
}
inline long long __double_as_longlong(double x) {
    long long bits;
    std::memcpy(&bits, &x, 8);
    return bits;
}
inline float exp2_(float x) { return std::exp2(x); }
inline double exp2_(double x) { return std::exp2(x); }
template <typename T> T reciprocal(T x) { return 1 / x; }
inline void assume_global(const void*) {}
inline float half_to_float(unsigned short bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return float(x);
}
inline unsigned short float_to_half(float x) {
    const _Float16 half = _Float16(x);
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

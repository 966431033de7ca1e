// Selective scan (S6), forward and backward. No #include: every NVRTC compiles it as it stands.
//
//     h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
//     y[t] = (C[t] . h[t] + D u[t]) silu(z[t])
//
// Mapping: lanes are channels, time is sequential, states live in registers. LPC neighbouring lanes share R
// neighbouring channels, and each keeps NS of their N = NS LPC states (states beyond d_state have A = B = C = 0).
// A block stages a tile of TT steps in shared memory: softplus, bias, D and the gate are paid once per (t, channel)
// in the cooperative phases, and one exp2 per state remains for the lanes, A being scaled by log2(e) beforehand.
// Padding is the identity: delta = 0 gives a = 1 and b = 0, so loops over time and states have no ragged branch.
//
// Time order and layout are strides: reverse=True is a negative time stride, a slice needs no copy.
// Nothing is atomic: every sum over blocks is left as partial sums, which the launcher adds in a fixed order.

#ifndef SUBQUAD_HOST  // the host shim of the tests brings its own form of these
__device__ inline float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline double exp2_(double x) { return exp2(x); }
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline double reciprocal(double x) { return 1 / x; }
// A pointer read from shared memory could point anywhere: this gives LDG and STG back.
__device__ inline void assume_global(const void* x) { __builtin_assume(__isGlobal(x)); }
__device__ inline float half_to_float(unsigned short bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}
__device__ inline unsigned short float_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

struct fp16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

template <typename T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <typename T> using accumulate = typename Accumulate<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(fp16 x) { return half_to_float(x.bits); }
__device__ inline float widen(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(float x, fp16& y) { y.bits = float_to_half(x); }
__device__ inline void narrow(float x, bf16& y) {  // to nearest even; NaN stays NaN
    unsigned u = __float_as_uint(x);
    y.bits = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}

template <typename T, int V> struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack { T x[V]; };

template <int V, typename T, typename acc>
__device__ inline void load(const T* from, int valid, bool vector, acc (&x)[V]) {
    if (vector && valid >= V) {
        const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = widen(pack.x[i]);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = i < valid ? widen(from[i]) : acc(0);
    }
}

template <int V, typename T, typename acc>
__device__ inline void store(T* to, int valid, bool vector, const acc (&x)[V]) {
    if (vector && valid >= V) {
        Pack<T, V> pack;
#pragma unroll
        for (int i = 0; i < V; ++i) narrow(x[i], pack.x[i]);
        *reinterpret_cast<Pack<T, V>*>(to) = pack;
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (i < valid) narrow(x[i], to[i]);
    }
}

// The arguments, mirrored field by field by SCAN in _launch.py.
struct Series { void* data; long long batch, time, group; };  // strides in bytes; the last axis is contiguous
namespace at { enum { u, delta, z, B, C, y, dy, du, ddelta, dz, dB, dC, count }; }

struct Scan {
    Series rows[at::count];        // z may be null; constant B and C are (d, d_state) in the accumulator's type;
                                   // dB, dC: partial sums (batch, n, blocks, d_state), or as dA where constant
    const void *A, *D, *bias;      // (d, d_state), (d,), (d,); D and bias may be null
    void *first, *last;            // (batch, d, d_state): the state (or its adjoint) that enters and leaves
    void *carry, *sums;            // (batch, chunks, d, d_state), (batch, chunks, d): what scan_tail leaves
    void* checkpoints;             // (batch, tiles, d, d_state): h before every backward_steps
    void *dA, *dD, *dbias;         // partial sums (batch, chunks, d, d_state), twice (batch, chunks, d)
    long long batch, n, d, d_state;
    long long groups, blocks;      // blocks: per batch item and chunk, a multiple of groups
    long long chunk, chunks, tiles;
    long long softplus, vector, vector_state;  // vector: the rows of u... (of B, C) are aligned for 4-wide access
};

// What a block works on. It lives in shared memory: in registers, the pointers alone would take two dozen.
struct Block {
    long long b, k, begin, entry;  // batch item, chunk, its first step, its first row in (batch, chunks, d, ...)
    int steps;                     // of the chunk; t below counts from its beginning, in 32 bits
    int c0, channels;              // the block's channels are c0 .. c0 + channels, all of one group
    char* rows[at::count];         // where each series begins
};

__device__ inline void locate(const Scan& p, int channels_per_block, Block& w) {
    const long long index = blockIdx.x % p.blocks, rest = blockIdx.x / p.blocks;
    const long long k = rest % p.chunks, b = rest / p.chunks, begin = k * p.chunk;
    const int per_group = int(p.blocks / p.groups), width = int(p.d / p.groups), group = int(index / per_group);
    if (threadIdx.x < at::count) {
        const Series& s = p.rows[threadIdx.x];
        w.rows[threadIdx.x] = static_cast<char*>(s.data) + (s.data ? b * s.batch + begin * s.time + group * s.group : 0);
    } else if (threadIdx.x == at::count) {
        const int within = int(index % per_group) * channels_per_block;
        w.b = b;
        w.k = k;
        w.begin = begin;
        w.steps = int(begin + p.chunk < p.n ? p.chunk : p.n - begin);
        w.c0 = group * width + within;
        w.channels = width - within < channels_per_block ? width - within : channels_per_block;
        w.entry = (b * p.chunks + k) * p.d + w.c0;
    }
    __syncthreads();
}

template <typename T> __device__ inline T* row(const Scan& p, const Block& w, int series, int t) {
    T* const x = reinterpret_cast<T*>(w.rows[series] + (long long)t * int(p.rows[series].time));
    assume_global(x);
    return x;
}

// A sum over all of a chunk's time in one register, and what its rounding lost (Kahan).
template <typename acc> struct Total {
    acc sum = 0, lost = 0;
    __device__ void add(acc x) {
        x -= lost;
        const acc next = sum + x;
        lost = (next - sum) - x;
        sum = next;
    }
};

template <> struct Total<double> {
    double sum = 0;
    __device__ void add(double x) { sum += x; }
};

// The states of one lane: channels c .. c + R of the block, states n .. n + NS of each.
template <int R, int NS> struct Lane {
    int c, n, channels, states;
    __device__ Lane(const Scan& p, const Block& w, int lpc)
        : c(threadIdx.x / lpc * R), n(threadIdx.x % lpc * NS), channels(w.channels - c), states(int(p.d_state) - n) {}

    template <typename acc>
    __device__ void read(const void* from, long long entry, const Scan& p, acc (&x)[R][NS]) const {
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int j = 0; j < NS; ++j)
                x[r][j] = from && r < channels && j < states
                              ? static_cast<const acc*>(from)[(entry + c + r) * p.d_state + n + j]
                              : acc(0);
    }
    template <typename acc>
    __device__ void write(void* to, long long entry, const Scan& p, const Total<acc> (&x)[R][NS]) const {
        acc sums[R][NS];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int j = 0; j < NS; ++j) sums[r][j] = x[r][j].sum;
        write(to, entry, p, sums);
    }
    template <typename acc>
    __device__ void write(void* to, long long entry, const Scan& p, const acc (&x)[R][NS]) const {
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int j = 0; j < NS; ++j)
                if (r < channels && j < states)
                    static_cast<acc*>(to)[(entry + c + r) * p.d_state + n + j] = x[r][j];
    }
};

template <int R, int NS, typename acc> __device__ inline void scale(acc (&x)[R][NS], acc by) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < NS; ++j) x[r][j] *= by;
}

template <typename acc> __device__ inline acc sigmoid(acc x) { return reciprocal(1 + exp2_(-x * acc(LOG2_E))); }

// softplus(x) = max(x, 0) + log1p(e), e = exp(-|x|), and log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3: the series
// keeps its relative accuracy where e is small, which lg2.approx(1 + e) does not.
__device__ inline float softplus(float x) {
    const float e = exp2_(-fabsf(x) * float(LOG2_E)), s = e * reciprocal(2 + e), q = s * s;
    float series = 1.f / 15;
    series = series * q + 1.f / 13;
    series = series * q + 1.f / 11;
    series = series * q + 1.f / 9;
    series = series * q + 1.f / 7;
    series = series * q + 1.f / 5;
    series = series * q + 1.f / 3;
    return fmaxf(x, 0) + 2 * s * (series * q + 1);
}
__device__ inline double softplus(double x) { return fmax(x, 0.) + log1p(exp2_(-fabs(x) * LOG2_E)); }

// One thread's share of a tile of (TT, CH) values: rows t, t + STRIDE, ... of the four channels c .. c + 4.
template <int CH> struct Quad {
    static constexpr int STRIDE = THREADS / (CH / 4);
    int t, c, valid;
    __device__ Quad(const Block& w) : t(threadIdx.x / (CH / 4)), c(threadIdx.x % (CH / 4) * 4), valid(w.channels - c) {}

    template <typename acc> __device__ void channel_values(const void* from, const Block& w, acc (&x)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = from && i < valid ? static_cast<const acc*>(from)[w.c0 + c + i] : acc(0);
    }
    template <typename T, typename acc>
    __device__ void read(const Scan& p, const Block& w, int series, int t, acc (&x)[4]) const {
        load<4>(row<T>(p, w, series, t) + w.c0 + c, t < w.steps ? valid : 0, p.vector, x);
    }
    template <typename T, typename acc>
    __device__ void write(const Scan& p, const Block& w, int series, int t, const acc (&x)[4]) const {
        store<4>(row<T>(p, w, series, t) + w.c0 + c, t < w.steps ? valid : 0, p.vector, x);
    }
    // delta' = softplus(delta + bias), and 0 in the padding
    template <typename T, typename acc>
    __device__ void step_sizes(const Scan& p, const Block& w, int t, const acc (&bias)[4], acc (&x)[4]) const {
        read<T>(p, w, at::delta, t, x);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i] += bias[i];
            if (p.softplus) x[i] = softplus(x[i]);
            if (t >= w.steps || i >= valid) x[i] = 0;
        }
    }
    // dy silu(z): the gradient of the ungated output
    template <typename T, typename acc>
    __device__ void ungated(const Scan& p, const Block& w, int t, acc (&g)[4]) const {
        read<T>(p, w, at::dy, t, g);
        if (!p.rows[at::z].data) return;
        acc gate[4];
        read<T>(p, w, at::z, t, gate);
#pragma unroll
        for (int i = 0; i < 4; ++i) g[i] *= gate[i] * sigmoid(gate[i]);
    }
};

// Rows t0 .. t0 + TT of B or C, padded with zeros.
template <typename T, int TT, int N, typename acc>
__device__ inline void stage(const Scan& p, const Block& w, int series, int t0, acc (&rows)[TT][N]) {
    constexpr int V = N < 4 ? N : 4;
    for (int i = threadIdx.x; i < TT * N / V; i += THREADS) {
        const int t = i / (N / V), n = i % (N / V) * V;
        const int valid = t0 + t < w.steps ? int(p.d_state) - n : 0;
        acc x[V];
        load<V>(row<const T>(p, w, series, t0 + t) + n, valid, p.vector_state, x);
#pragma unroll
        for (int j = 0; j < V; ++j) rows[t][n + j] = x[j];
    }
}

// Sums v[0 .. W) over the lanes that differ in the bits HIGH .. LOW, by halves: each step sends one half of the values
// and keeps the other, so W values cost W - 1 shuffles, not W log2(lanes). Afterwards the lane holds width() sums,
// those from index held() on; held() is negative where another lane holds the same.
template <int W, int HIGH, int LOW> struct Butterfly {
    static constexpr bool splits = W > 1;
    using Next = Butterfly<splits ? W / 2 : 1, HIGH / 2, LOW>;
    static constexpr int width = Next::width;
    template <typename acc> __device__ static void sum(acc* v) {
        const bool upper = threadIdx.x & HIGH;
        if constexpr (splits) {
#pragma unroll
            for (int i = 0; i < W / 2; ++i) {
                const acc kept = upper ? v[i + W / 2] : v[i], sent = upper ? v[i] : v[i + W / 2];
                v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, HIGH);
            }
        } else {
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], HIGH);
        }
        Next::sum(v);
    }
    __device__ static int held() {
        const bool upper = threadIdx.x & HIGH;
        return (upper ? (splits ? W / 2 : -4096) : 0) + Next::held();
    }
};
template <int W, int LOW> struct Done {
    static constexpr int width = W;
    template <typename acc> __device__ static void sum(acc*) {}
    __device__ static int held() { return 0; }
};
// HIGH < LOW ends the recursion; LOW is 1 (over the lanes of a channel) or LPC (over the channels of a warp).
template <int W> struct Butterfly<W, 0, 1> : Done<W, 1> {};
template <int W> struct Butterfly<W, 1, 2> : Done<W, 2> {};
template <int W> struct Butterfly<W, 2, 4> : Done<W, 4> {};
template <int W> struct Butterfly<W, 4, 8> : Done<W, 8> {};
template <int W> struct Butterfly<W, 8, 16> : Done<W, 16> {};
template <int W> struct Butterfly<W, 16, 32> : Done<W, 32> {};

__host__ __device__ constexpr int forward_steps(int channels, int states, int size) {  // the largest tile within 40 KiB
    int steps = 16;
    while (steps * (3 * channels + 2 * states) * size > 40 * 1024) steps /= 2;
    return steps;
}
// The tile of the backward pass, whose a and h stay in registers; one checkpoint each.
__host__ __device__ constexpr int backward_steps(int states, int size) {
    return size > 4 ? (states > 128 ? 1 : 4) : (states > 128 ? 4 : 8);
}

// Blocks that an SM should hold, which caps the registers: 65536 / (THREADS blocks).
__host__ __device__ constexpr int forward_blocks(int states, int size) { return size > 4 || states > 8 ? 3 : 5; }
__host__ __device__ constexpr int backward_blocks(int ns, int size, bool constant) {
    return ns * size > 16 || constant ? 2 : 3;
}

template <typename acc> struct Drive { acc delta, x; };  // x = delta u: what B[t] multiplies

template <typename T, int NS, int LPC, int R, bool CONSTANT_B, bool CONSTANT_C>
__global__ void __launch_bounds__(THREADS, forward_blocks(NS * R, sizeof(accumulate<T>))) scan_forward(const Scan p) {
    using acc = accumulate<T>;
    constexpr int N = NS * LPC, CH = THREADS / LPC * R, TT = forward_steps(CH, N, sizeof(acc));
    constexpr int EVERY = backward_steps(N, sizeof(acc));
    alignas(16) __shared__ Drive<acc> drive[TT][CH];
    alignas(16) __shared__ acc ys[TT][CH], Bs[CONSTANT_B ? 1 : TT][N], Cs[CONSTANT_C ? 1 : TT][N];

    __shared__ Block w;
    locate(p, CH, w);
    const Lane<R, NS> lane(p, w, LPC);
    const bool live = int(threadIdx.x) / 32 * (32 / LPC * R) < w.channels;  // the same for the whole warp
    acc A[R][NS], h[R][NS], Bc[R][NS], Cc[R][NS];
    lane.read(p.A, w.c0, p, A);
    scale(A, acc(LOG2_E));
    lane.read(p.chunks > 1 ? p.carry : p.first, w.entry, p, h);
    if constexpr (CONSTANT_B) lane.read(p.rows[at::B].data, w.c0, p, Bc);
    if constexpr (CONSTANT_C) lane.read(p.rows[at::C].data, w.c0, p, Cc);

    const Quad<CH> quad(w);

    for (int t0 = 0; t0 < w.steps; t0 += TT) {
        acc bias[4];
        quad.channel_values(p.bias, w, bias);
        for (int t = quad.t; t < TT; t += Quad<CH>::STRIDE) {
            acc delta[4], u[4];
            quad.template step_sizes<T>(p, w, t0 + t, bias, delta);
            quad.template read<T>(p, w, at::u, t0 + t, u);
#pragma unroll
            for (int i = 0; i < 4; ++i) drive[t][quad.c + i] = {delta[i], delta[i] * u[i]};
        }
        if constexpr (!CONSTANT_B) stage<T>(p, w, at::B, t0, Bs);
        if constexpr (!CONSTANT_C) stage<T>(p, w, at::C, t0, Cs);
        __syncthreads();

        for (int start = 0; live && start < TT; start += EVERY) {
            if (p.checkpoints && t0 + start < w.steps)
                lane.write(p.checkpoints, (w.b * p.tiles + (w.begin + t0 + start) / EVERY) * p.d + w.c0, p, h);
#pragma unroll 4
            for (int t = start; t < start + EVERY; ++t) {
                const auto step = *reinterpret_cast<const Pack<Drive<acc>, R>*>(&drive[t][lane.c]);
                Pack<acc, NS> B, C;
                if constexpr (!CONSTANT_B) B = *reinterpret_cast<const Pack<acc, NS>*>(&Bs[t][lane.n]);
                if constexpr (!CONSTANT_C) C = *reinterpret_cast<const Pack<acc, NS>*>(&Cs[t][lane.n]);
                acc y[R];
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    y[r] = 0;
#pragma unroll
                    for (int j = 0; j < NS; ++j) {
                        const acc a = exp2_(step.x[r].delta * A[r][j]);
                        h[r][j] = a * h[r][j] + step.x[r].x * (CONSTANT_B ? Bc[r][j] : B.x[j]);
                        y[r] += (CONSTANT_C ? Cc[r][j] : C.x[j]) * h[r][j];
                    }
                }
                using Sum = Butterfly<R, LPC / 2, 1>;
                Sum::sum(y);
                const int first = Sum::held();
#pragma unroll
                for (int i = 0; i < Sum::width; ++i)
                    if (first >= 0) ys[t][lane.c + first + i] = y[i];
            }
        }
        __syncthreads();

        if (!p.rows[at::y].data) continue;
        acc D[4];
        quad.channel_values(p.D, w, D);
        for (int t = quad.t; t < TT; t += Quad<CH>::STRIDE) {
            acc u[4], y[4];
            quad.template read<T>(p, w, at::u, t0 + t, u);
#pragma unroll
            for (int i = 0; i < 4; ++i) y[i] = ys[t][quad.c + i] + D[i] * u[i];
            if (p.rows[at::z].data) {
                acc z[4];
                quad.template read<T>(p, w, at::z, t0 + t, z);
#pragma unroll
                for (int i = 0; i < 4; ++i) y[i] *= z[i] * sigmoid(z[i]);
            }
            quad.template write<T>(p, w, at::y, t0 + t, y);
        }
    }
    if (p.last && w.k == p.chunks - 1) lane.write(p.last, w.b * p.d + w.c0, p, h);
}

// What each chunk contributes to its own end from a zero start, and how much time passes in it (`sums`). Tiles are
// walked from the end back, and the walk stops once exp(A S) of the steps behind has vanished for every state of
// the block, so a typical chunk costs its tail only. For the adjoint, r[t] = a[t] (r[t+1] + C[t] dy[t]), the same holds
// with time turned round: B is C, delta u is dy silu(z), and the tail is the chunk's beginning.
template <typename T, int NS, int LPC, int R, bool CONSTANT, bool ADJOINT>
__global__ void __launch_bounds__(THREADS, forward_blocks(NS * R, sizeof(accumulate<T>))) scan_tail(const Scan p) {
    using acc = accumulate<T>;
    constexpr int N = NS * LPC, CH = THREADS / LPC * R, TT = forward_steps(CH, N, sizeof(acc));
    constexpr acc VANISHED = sizeof(acc) == 8 ? -80 : -40, FOREVER = 1e30f;
    alignas(16) __shared__ Drive<acc> drive[TT][CH];
    alignas(16) __shared__ acc rows[CONSTANT ? 1 : TT][N];

    __shared__ Block w;
    locate(p, CH, w);
    if (w.k == (ADJOINT ? 0 : p.chunks - 1)) return;  // no chunk follows
    const Lane<R, NS> lane(p, w, LPC);
    const bool live = int(threadIdx.x) / 32 * (32 / LPC * R) < w.channels;
    constexpr int series = ADJOINT ? at::C : at::B;
    acc A[R][NS], constant[R][NS], end[R][NS] = {};
    lane.read(p.A, w.c0, p, A);
    scale(A, acc(LOG2_E));
    if constexpr (CONSTANT) lane.read(p.rows[series].data, w.c0, p, constant);
    const Quad<CH> quad(w);
    double passed[R] = {};  // up to 2^20 small terms
    bool vanished = false;
    const int tiles = (w.steps + TT - 1) / TT;
    for (int tile = 0; tile < tiles; ++tile) {
        const int t0 = (ADJOINT ? tile : tiles - 1 - tile) * TT;
        acc bias[4];
        quad.channel_values(p.bias, w, bias);
        for (int t = quad.t; t < TT; t += Quad<CH>::STRIDE) {
            acc delta[4], x[4];
            quad.template step_sizes<T>(p, w, t0 + t, bias, delta);
            if constexpr (ADJOINT) {
                quad.template ungated<T>(p, w, t0 + t, x);
            } else {
                quad.template read<T>(p, w, at::u, t0 + t, x);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) drive[t][quad.c + i] = {delta[i], ADJOINT ? x[i] : delta[i] * x[i]};
        }
        if constexpr (!CONSTANT) stage<T>(p, w, series, t0, rows);
        __syncthreads();

        if (live) {
            acc local[R][NS] = {}, sum[R] = {};
#pragma unroll 4
            for (int i = 0; i < TT; ++i) {
                const int t = ADJOINT ? TT - 1 - i : i;
                const auto step = *reinterpret_cast<const Pack<Drive<acc>, R>*>(&drive[t][lane.c]);
                Pack<acc, NS> B;
                if constexpr (!CONSTANT) B = *reinterpret_cast<const Pack<acc, NS>*>(&rows[t][lane.n]);
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    sum[r] += step.x[r].delta;
#pragma unroll
                    for (int j = 0; j < NS; ++j) {
                        const acc a = exp2_(step.x[r].delta * A[r][j]);
                        const acc x = step.x[r].x * (CONSTANT ? constant[r][j] : B.x[j]);
                        local[r][j] = ADJOINT ? a * (local[r][j] + x) : a * local[r][j] + x;
                    }
                }
            }
            vanished = p.softplus;  // a negative step would bring back what has vanished
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int j = 0; j < NS; ++j) end[r][j] += exp2_(A[r][j] * acc(passed[r])) * local[r][j];
                passed[r] += sum[r];
#pragma unroll
                for (int j = 0; j < NS; ++j)
                    if (r < lane.channels && j < lane.states) vanished &= A[r][j] * acc(passed[r]) < VANISHED;
            }
        }
        if (__syncthreads_and(vanished || !live)) {
            for (int r = 0; r < R; ++r) passed[r] = FOREVER;  // exp2(A passed) is then exactly 0
            break;
        }
    }
    lane.write(p.carry, w.entry, p, end);
    for (int r = 0; r < R; ++r)
        if (lane.n == 0 && r < lane.channels) static_cast<acc*>(p.sums)[w.entry + lane.c + r] = acc(passed[r]);
}

// carry[k] becomes what enters chunk k: carry[k+1] = end[k] + exp(A S[k]) carry[k]; one thread per (batch, c, state).
template <typename acc, bool ADJOINT> __global__ void __launch_bounds__(THREADS) scan_carry(const Scan p) {
    const long long index = (long long)blockIdx.x * THREADS + threadIdx.x, states = p.d * p.d_state;
    if (index >= p.batch * states) return;
    const long long b = index / states, state = index % states, c = state / p.d_state;
    const acc A = static_cast<const acc*>(p.A)[state] * acc(LOG2_E);
    acc* const carry = static_cast<acc*>(p.carry) + b * p.chunks * states + state;
    const acc* const sums = static_cast<const acc*>(p.sums) + b * p.chunks * p.d + c;
    acc entering = p.first ? static_cast<const acc*>(p.first)[index] : acc(0);
    for (long long i = 0; i < p.chunks; ++i) {
        const long long k = ADJOINT ? p.chunks - 1 - i : i;
        const bool leaves = i + 1 < p.chunks;
        const acc end = leaves ? carry[k * states] : acc(0), passed = leaves ? sums[k * p.d] : acc(0);
        carry[k * states] = entering;
        entering = end + exp2_(A * passed) * entering;
    }
}

// Adds up what the threads hold of each channel (thread i % (CH / 4) and those a multiple of CH / 4 further), in order.
template <int CH, typename acc>
__device__ inline void sum_shares(const Total<acc> (&share)[4], acc (&shares)[THREADS * 4], void* to, const Block& w) {
    __syncthreads();  // the shares of the sum before are still being read
#pragma unroll
    for (int i = 0; i < 4; ++i) shares[threadIdx.x * 4 + i] = share[i].sum;
    __syncthreads();
    for (int c = threadIdx.x; c < w.channels; c += THREADS) {
        acc sum = 0;
        for (int i = c; i < THREADS * 4; i += CH) sum += shares[i];
        static_cast<acc*>(to)[w.entry + c] = sum;
    }
}

// With the adjoint g[t] = dy[t] C[t] + a[t+1] g[t+1] of h[t], a = exp(delta A), and sums over what the left side lacks:
//     dB = delta u g,  dC = dy h,  dA = sum_t delta a g h[t-1],  d(delta u) = g . B,
//     ddelta = u (g . B) + sum_n A a g h[t-1],  du = delta (g . B) + D dy,  dD = sum_t dy u
// (dy here is dy silu(z)). Each tile recomputes a and h from its checkpoint into registers, then walks back.
template <typename T, int NS, int LPC, bool CONSTANT_B, bool CONSTANT_C>
__global__ void __launch_bounds__(THREADS, backward_blocks(NS, sizeof(accumulate<T>), CONSTANT_B || CONSTANT_C))
    scan_backward(const Scan p) {
    using acc = accumulate<T>;
    constexpr int N = NS * LPC, CH = THREADS / LPC, TT = backward_steps(N, sizeof(acc));
    constexpr int VARYING = !CONSTANT_B + !CONSTANT_C, M = VARYING ? VARYING * N : 1;
    alignas(16) __shared__ acc deltas[TT][CH], us[TT][CH], dys[TT][CH], out[3][TT][CH];
    alignas(16) __shared__ acc Bs[CONSTANT_B ? 1 : TT][N], Cs[CONSTANT_C ? 1 : TT][N];
    __shared__ acc parts[WARPS][VARYING ? TT : 1][M], shares[THREADS * 4];

    __shared__ Block w;
    locate(p, CH, w);
    const Lane<1, NS> lane(p, w, LPC);
    const bool live = int(threadIdx.x) / 32 * (32 / LPC) < w.channels;
    const int warp = threadIdx.x / 32;
    acc A[1][NS], r[1][NS], Bc[1][NS], Cc[1][NS];
    Total<acc> dA[1][NS], dBc[1][NS], dCc[1][NS];
    lane.read(p.A, w.c0, p, A);
    scale(A, acc(LOG2_E));
    lane.read(p.chunks > 1 ? p.carry : p.first, w.entry, p, r);
    if constexpr (CONSTANT_B) lane.read(p.rows[at::B].data, w.c0, p, Bc);
    if constexpr (CONSTANT_C) lane.read(p.rows[at::C].data, w.c0, p, Cc);

    const Quad<CH> quad(w);
    Total<acc> dD[4], dbias[4];
    if (!live)  // such a warp adds nothing to dB and dC
        for (int i = threadIdx.x % 32; i < (VARYING ? TT : 1) * M; i += 32) parts[warp][i / M][i % M] = 0;

    const int tiles = (w.steps + TT - 1) / TT;
    for (int tile = tiles - 1; tile >= 0; --tile) {
        const int t0 = tile * TT;
        acc start[1][NS];
        lane.read(p.checkpoints, (w.b * p.tiles + w.begin / TT + tile) * p.d + w.c0, p, start);
        acc bias[4];
        quad.channel_values(p.bias, w, bias);
        for (int t = quad.t; t < TT; t += Quad<CH>::STRIDE) {
            acc delta[4], u[4], dy[4];
            quad.template step_sizes<T>(p, w, t0 + t, bias, delta);
            quad.template read<T>(p, w, at::u, t0 + t, u);
            quad.template ungated<T>(p, w, t0 + t, dy);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                deltas[t][quad.c + i] = delta[i];
                us[t][quad.c + i] = u[i];
                dys[t][quad.c + i] = dy[i];
            }
        }
        if constexpr (!CONSTANT_B) stage<T>(p, w, at::B, t0, Bs);
        if constexpr (!CONSTANT_C) stage<T>(p, w, at::C, t0, Cs);
        __syncthreads();

        if (live) {
            acc a[TT][NS], h[TT][NS], tile_dA[NS] = {}, tile_dB[NS] = {}, tile_dC[NS] = {};
#pragma unroll
            for (int t = 0; t < TT; ++t) {
                const acc delta = deltas[t][lane.c], x = delta * us[t][lane.c];
#pragma unroll
                for (int j = 0; j < NS; ++j) {
                    a[t][j] = exp2_(delta * A[0][j]);
                    h[t][j] = a[t][j] * (t ? h[t - 1][j] : start[0][j]) + x * (CONSTANT_B ? Bc[0][j] : Bs[t][lane.n + j]);
                }
            }
#pragma unroll
            for (int t = TT - 1; t >= 0; --t) {
                const acc delta = deltas[t][lane.c], x = delta * us[t][lane.c], dy = dys[t][lane.c];
                acc sums[4] = {}, products[VARYING ? VARYING * NS : 1];  // sums: g . B, A a g h[t-1], y
#pragma unroll
                for (int j = 0; j < NS; ++j) {
                    const acc B = CONSTANT_B ? Bc[0][j] : Bs[t][lane.n + j], C = CONSTANT_C ? Cc[0][j] : Cs[t][lane.n + j];
                    const acc g = r[0][j] + dy * C;
                    r[0][j] = a[t][j] * g;
                    const acc da = r[0][j] * (t ? h[t - 1][j] : start[0][j]);
                    tile_dA[j] += delta * da;
                    sums[0] += g * B;
                    sums[1] += A[0][j] * da;
                    sums[2] += C * h[t][j];
                    if constexpr (CONSTANT_B) tile_dB[j] += x * g;
                    if constexpr (CONSTANT_C) tile_dC[j] += dy * h[t][j];
                    if constexpr (!CONSTANT_B) products[j] = x * g;
                    if constexpr (!CONSTANT_C) products[(VARYING - 1) * NS + j] = dy * h[t][j];
                }
                using Sum = Butterfly<4, LPC / 2, 1>;
                Sum::sum(sums);
#pragma unroll
                for (int i = 0; i < Sum::width; ++i) {
                    const int which = Sum::held() + i;
                    if (which >= 0 && which < 3) out[which][t][lane.c] = sums[i];
                }
                if constexpr (VARYING > 0) {
                    using Product = Butterfly<VARYING * NS, 16, LPC>;
                    Product::sum(products);
#pragma unroll
                    for (int i = 0; i < Product::width; ++i) {
                        const int which = Product::held() + i;
                        if (which >= 0) parts[warp][t][which / NS * N + lane.n + which % NS] = products[i];
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < NS; ++j) {
                dA[0][j].add(tile_dA[j]);
                if constexpr (CONSTANT_B) dBc[0][j].add(tile_dB[j]);
                if constexpr (CONSTANT_C) dCc[0][j].add(tile_dC[j]);
            }
        }
        __syncthreads();

        if constexpr (VARYING > 0) {
            for (int i = threadIdx.x; i < TT * M; i += THREADS) {
                const int t = i / M, n = i % N;
                if (t0 + t >= w.steps || n >= p.d_state) continue;
                acc sum = 0;
#pragma unroll
                for (int part = 0; part < WARPS; ++part) sum += parts[part][t][i % M];
                const int to = CONSTANT_B || i % M >= N ? at::dC : at::dB;
                row<acc>(p, w, to, t0 + t)[blockIdx.x % p.blocks * p.d_state + n] = sum;
            }
        }
        acc D[4];
        quad.channel_values(p.D, w, D);
        for (int t = quad.t; t < TT; t += Quad<CH>::STRIDE) {
            acc du[4], ddelta[4], raw[4], dz[4], z[4];
            if (p.softplus) quad.template read<T>(p, w, at::delta, t0 + t, raw);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const acc u = us[t][quad.c + i], dy = dys[t][quad.c + i], gB = out[0][t][quad.c + i];
                du[i] = deltas[t][quad.c + i] * gB + D[i] * dy;
                ddelta[i] = u * gB + acc(LN_2) * out[1][t][quad.c + i];
                if (p.softplus) ddelta[i] *= sigmoid(raw[i] + bias[i]);
                if (t0 + t < w.steps && i < quad.valid) {
                    dD[i].add(dy * u);
                    dbias[i].add(ddelta[i]);
                }
            }
            quad.template write<T>(p, w, at::du, t0 + t, du);
            quad.template write<T>(p, w, at::ddelta, t0 + t, ddelta);
            if (p.rows[at::z].data) {  // silu'(z) = s (1 + z (1 - s)), s = sigmoid(z)
                quad.template read<T>(p, w, at::z, t0 + t, z);
                quad.template read<T>(p, w, at::dy, t0 + t, dz);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const acc s = sigmoid(z[i]), y = out[2][t][quad.c + i] + D[i] * us[t][quad.c + i];
                    dz[i] *= y * s * (1 + z[i] * (1 - s));
                }
                quad.template write<T>(p, w, at::dz, t0 + t, dz);
            }
        }
    }

    lane.write(p.dA, w.entry, p, dA);
    if constexpr (CONSTANT_B) lane.write(p.rows[at::dB].data, w.entry, p, dBc);
    if constexpr (CONSTANT_C) lane.write(p.rows[at::dC].data, w.entry, p, dCc);
    if (p.last && w.k == 0) lane.write(p.last, w.b * p.d + w.c0, p, r);
    sum_shares<CH>(dD, shares, p.dD, w);
    sum_shares<CH>(dbias, shares, p.dbias, w);
}

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
// What the next tile needs is loaded before the lanes work on this one: few channels run on few warps, which could
// not hide the latency of memory by their number.
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

// Two values in one word, the first in its low half.
__device__ inline unsigned pair(float low, float high, fp16) {
    return float_to_half(low) | (unsigned)float_to_half(high) << 16;
}
__device__ inline unsigned pair(float low, float high, bf16) {
#if !defined(SUBQUAD_HOST) && __CUDA_ARCH__ >= 800
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    bf16 x, y;
    narrow(low, x);
    narrow(high, y);
    return x.bits | (unsigned)y.bits << 16;
#endif
}

// V neighbouring values as they lie in memory. They become numbers where they are used, not where they are loaded:
// what was asked for ahead of time is not waited for.
template <typename T, int V> struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Raw {
    unsigned words[sizeof(T) * V / 4];

    __device__ accumulate<T> operator[](int i) const {
        if constexpr (sizeof(T) == 2) return widen(T{(unsigned short)(words[i / 2] >> i % 2 * 16)});
        else if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
        else return __longlong_as_double((long long)words[2 * i + 1] << 32 | words[2 * i]);
    }
    __device__ void put(int i, T x) {  // over zeros
        if constexpr (sizeof(T) == 2) {
            words[i / 2] |= (unsigned)x.bits << i % 2 * 16;
        } else if constexpr (sizeof(T) == 4) {
            words[i] = __float_as_uint(x);
        } else {
            const long long bits = __double_as_longlong(x);
            words[2 * i] = (unsigned)bits;
            words[2 * i + 1] = (unsigned)(bits >> 32);
        }
    }
};

// The first `valid` of V values, and zeros; `vector`: the address is aligned.
template <int V, typename T> __device__ inline Raw<T, V> load(const T* from, int valid, bool vector) {
    if (vector && valid >= V) return *reinterpret_cast<const Raw<T, V>*>(from);
    Raw<T, V> raw = {};
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < valid) raw.put(i, from[i]);
    return raw;
}

template <int V, typename T, typename acc>
__device__ inline void store(T* to, int valid, bool vector, const acc (&x)[V]) {
    if (vector && valid >= V) {
        Raw<T, V> raw;
        if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int i = 0; i < V; i += 2) raw.words[i / 2] = pair(x[i], x[i + 1], T());
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i) raw.put(i, x[i]);
        }
        *reinterpret_cast<Raw<T, V>*>(to) = raw;
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (i < valid) narrow(x[i], to[i]);
    }
}

// V neighbouring values in shared memory.
template <typename T, int V> struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack { T x[V]; };

// The arguments, mirrored field by field by SCAN in device.py.
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
    const char* resets;            // the first step's: not 0 where 0 stands for the state before the step; or null
    long long batch, n, d, d_state;
    long long groups, blocks;      // blocks: per batch item and chunk, a multiple of groups
    long long chunk, chunks, tiles;
    long long softplus, vector, vector_state;  // vector: the rows of u... (of B, C) are aligned for 4-wide access
    long long resets_batch, resets_time;       // strides
};

// What a block works on. It lives in shared memory: in registers, the pointers alone would take two dozen.
struct Block {
    long long b, k, begin, entry;  // batch item, chunk, its first step, its first row in (batch, chunks, d, ...)
    long long index;               // among the blocks of this batch item and chunk
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
        const long long offset = s.data ? b * s.batch + begin * s.time + group * s.group : 0;
        w.rows[threadIdx.x] = static_cast<char*>(s.data) + offset;
    } else if (threadIdx.x == at::count) {
        const int within = int(index % per_group) * channels_per_block;
        w.b = b;
        w.k = k;
        w.begin = begin;
        w.index = index;
        w.steps = int(begin + p.chunk < p.n ? p.chunk : p.n - begin);
        w.c0 = group * width + within;
        w.channels = width - within < channels_per_block ? width - within : channels_per_block;
        w.entry = (b * p.chunks + k) * p.d + w.c0;
    }
    __syncthreads();
}

template <typename T> __device__ inline T* row(char* first, long long stride, int t) {
    T* const x = reinterpret_cast<T*>(first + (long long)t * int(stride));
    assume_global(x);
    return x;
}
template <typename T> __device__ inline T* row(const Scan& p, const Block& w, int series, int t) {
    return row<T>(w.rows[series], p.rows[series].time, t);
}

// Whether the state starts anew before step t of the chunk; the same for all threads of a block.
template <bool RESETS> __device__ inline bool starts(const Scan& p, const Block& w, int t) {
    if constexpr (!RESETS) return false;
    else return t < w.steps && p.resets[w.b * p.resets_batch + (w.begin + t) * p.resets_time];
}
constexpr float CUT = -1e30f;  // in the sums of scan_tail: a chunk in which the state starts anew

// K sums of each thread over all of a chunk's time, and what their rounding lost (Kahan).
template <typename acc, int K> struct Totals {
    static constexpr bool KEPT = sizeof(acc) == 4;
    acc sum[K][THREADS], lost[KEPT ? K : 1][KEPT ? THREADS : 1];

    __device__ void clear() {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            sum[k][threadIdx.x] = 0;
            if constexpr (KEPT) lost[k][threadIdx.x] = 0;
        }
    }
    __device__ void add(int k, acc x) {
        acc& total = sum[k][threadIdx.x];
        if constexpr (KEPT) {
            acc& missing = lost[k][threadIdx.x];
            x -= missing;
            const acc next = total + x;
            missing = (next - total) - x;
            total = next;
        } else {
            total += x;
        }
    }
    __device__ acc operator[](int k) const { return sum[k][threadIdx.x]; }
};

// The states of one lane: channels c .. c + R of the block, states n .. n + NS of each.
template <int R, int NS> struct Lane {
    int c, n, channels, states;
    __device__ Lane(const Scan& p, const Block& w, int lpc)
        : c(threadIdx.x / lpc * R), n(threadIdx.x % lpc * NS), channels(w.channels - c), states(int(p.d_state) - n) {}

    // Whether the lanes' states are aligned in memory that is.
    template <typename acc> __device__ static bool vector(const void* x, const Scan& p) {
        return p.d_state % NS == 0 && reinterpret_cast<unsigned long long>(x) % alignof(Raw<acc, NS>) == 0;
    }
    template <typename acc>
    __device__ void load(const void* from, long long entry, const Scan& p, Raw<acc, NS> (&x)[R]) const {
        const acc* const first = static_cast<const acc*>(from) + (entry + c) * p.d_state + n;
#pragma unroll
        for (int r = 0; r < R; ++r)
            x[r] = ::load<NS>(first + r * p.d_state, from && r < channels ? states : 0, vector<acc>(from, p));
    }
    template <typename acc>
    __device__ void read(const void* from, long long entry, const Scan& p, acc (&x)[R][NS]) const {
        Raw<acc, NS> raw[R];
        load(from, entry, p, raw);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int j = 0; j < NS; ++j) x[r][j] = raw[r][j];
    }
    template <typename acc>
    __device__ void write(void* to, long long entry, const Scan& p, const acc (&x)[R][NS]) const {
        acc* const first = static_cast<acc*>(to) + (entry + c) * p.d_state + n;
#pragma unroll
        for (int r = 0; r < R; ++r)
            store(first + r * p.d_state, r < channels ? states : 0, vector<acc>(to, p), x[r]);
    }
    template <typename acc>
    __device__ void write(void* to, long long entry, const Scan& p, const Totals<acc, R * NS>& x) const {
        acc sums[R][NS];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int j = 0; j < NS; ++j) sums[r][j] = x[r * NS + j];
        write(to, entry, p, sums);
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

// The block's part of a vector over channels, and zeros.
template <int CH, typename acc> __device__ inline void stage(const void* from, const Block& w, acc (&to)[CH]) {
    for (int c = threadIdx.x; c < CH; c += THREADS)
        to[c] = from && c < w.channels ? static_cast<const acc*>(from)[w.c0 + c] : acc(0);
}

// One thread's share of a tile of (TT, CH) values: rows t, t + STRIDE, ... of the V channels c .. c + V.
template <int CH, int TT> struct Share {
    static constexpr int V = TT * CH < 4 * THREADS ? 2 : 4, STRIDE = THREADS / (CH / V);
    static constexpr int ROUNDS = (TT + STRIDE - 1) / STRIDE, CHANNELS = CH, STEPS = TT;
    int t, c, valid;
    __device__ Share(const Block& w)
        : t(threadIdx.x / (CH / V)), c(threadIdx.x % (CH / V) * V), valid(w.channels - c) {}

    template <typename F> __device__ void each(F work) const {  // work(round, t)
#pragma unroll
        for (int k = 0; k < ROUNDS; ++k)
            if (TT % STRIDE == 0 || t + k * STRIDE < TT) work(k, t + k * STRIDE);
    }
    // delta' = softplus(delta + bias), and 0 in the padding
    template <typename T, typename acc>
    __device__ void step_sizes(
        const Scan& p, const Block& w, int t, Raw<T, V> delta, const acc (&bias)[CH], acc (&x)[V]
    ) const {
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = delta[i] + bias[c + i];
        if (p.softplus) {
#pragma unroll
            for (int i = 0; i < V; ++i) x[i] = softplus(x[i]);
        }
        const int valid = t < w.steps ? this->valid : 0;
        if (valid < V) {
#pragma unroll
            for (int i = 0; i < V; ++i) x[i] = i < valid ? x[i] : acc(0);
        }
    }
    // dy silu(z): the gradient of the ungated output
    template <typename T, typename acc>
    __device__ void ungated(const Scan& p, Raw<T, V> dy, Raw<T, V> z, acc (&g)[V]) const {
#pragma unroll
        for (int i = 0; i < V; ++i) g[i] = dy[i] * gate(p, z[i]);
    }
    template <typename acc> __device__ static acc gate(const Scan& p, acc z) {
        return p.rows[at::z].data ? z * sigmoid(z) : acc(1);
    }
    template <typename T, typename acc>
    __device__ void write(const Scan& p, const Block& w, int series, int t, const acc (&x)[V]) const {
        store<V>(row<T>(p, w, series, t) + w.c0 + c, t < w.steps ? valid : 0, p.vector, x);
    }
};

// A thread's share of SERIES in one tile; zeros where z is absent.
template <typename T, typename Share, int... SERIES> struct Tile {
    Raw<T, Share::V> x[sizeof...(SERIES)][Share::ROUNDS];

    __device__ void load(const Scan& p, const Block& w, const Share& share, int t0) {
        if (p.vector && w.channels == Share::CHANNELS && t0 + Share::STEPS <= w.steps) load_all<true>(p, w, share, t0);
        else load_all<false>(p, w, share, t0);
    }

private:
    template <bool WHOLE> __device__ void load_all(const Scan& p, const Block& w, const Share& share, int t0) {
        int i = 0;
        (load_one<WHOLE, SERIES>(p, w, share, t0, x[i++]), ...);
    }
    template <bool WHOLE, int S>
    __device__ void load_one(
        const Scan& p, const Block& w, const Share& share, int t0, Raw<T, Share::V> (&x)[Share::ROUNDS]
    ) {
        if constexpr (S != at::count)
            share.each([&](int k, int t) {
                const int valid = WHOLE ? Share::V : t0 + t < w.steps ? share.valid : 0;
                x[k] = {};
                if (S != at::z || p.rows[S].data)
                    x[k] = ::load<Share::V>(row<const T>(p, w, S, t0 + t) + w.c0 + share.c, valid, WHOLE || p.vector);
            });
    }
};

// Rows of B, of C, or of both in one tile, padded with zeros. As many as registers allow are loaded ahead.
template <typename T, int TT, int N, bool B, bool C> struct Maps {
    static constexpr int QUADS = N < 4 ? 1 : N / 4, ITEMS = (B + C) * TT * QUADS;
    static constexpr int ROUNDS = (ITEMS + THREADS - 1) / THREADS, AHEAD = ROUNDS < 2 ? ROUNDS : 2;
    Raw<T, 4> x[AHEAD ? AHEAD : 1];

    __device__ void load(const Scan& p, const Block& w, int t0) {
        if (p.vector_state && p.d_state == N && t0 + TT <= w.steps) load_all<true>(p, w, t0);
        else load_all<false>(p, w, t0);
    }
    template <typename acc, int COUNT>
    __device__ void stage(const Scan& p, const Block& w, int t0, acc (&to)[COUNT][TT][N]) const {
#pragma unroll
        for (int k = 0; k < ROUNDS; ++k) {
            const int i = threadIdx.x + k * THREADS, t = i / QUADS % TT, n = i % QUADS * 4;
            if (ITEMS % THREADS && i >= ITEMS) break;
            const Raw<T, 4> from = k < AHEAD ? x[k < AHEAD ? k : 0] : load_one<false>(p, w, t0, k);
#pragma unroll
            for (int j = 0; j < (N < 4 ? N : 4); ++j) to[i / (TT * QUADS)][t][n + j] = from[j];
        }
    }

private:
    template <bool WHOLE> __device__ void load_all(const Scan& p, const Block& w, int t0) {
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) x[k] = load_one<WHOLE>(p, w, t0, k);
    }
    template <bool WHOLE> __device__ static Raw<T, 4> load_one(const Scan& p, const Block& w, int t0, int k) {
        const int i = threadIdx.x + k * THREADS, t = i / QUADS % TT, n = i % QUADS * 4;
        if (ITEMS % THREADS && i >= ITEMS) return {};
        const int valid = WHOLE ? 4 : t0 + t < w.steps ? int(p.d_state) - n : 0;
        const bool of_B = B && (!C || i < TT * QUADS);
        const long long stride = of_B ? p.rows[at::B].time : p.rows[at::C].time;
        const T* const from = row<const T>(w.rows[of_B ? at::B : at::C], stride, t0 + t);
        return ::load<4>(from + n, valid, WHOLE || p.vector_state);
    }
};

// Sums v[0 .. W) over the lanes that differ in the bits HIGH .. LOW, by halves: each step sends one half of the values
// and keeps the other, so W values cost W - 1 shuffles, not W log2(lanes). Afterwards the lane holds width() sums,
// those from index held() on; held() is negative where another lane holds the same.
template <int W, int HIGH, int LOW> struct Butterfly {
    static constexpr bool splits = W > 1;
    using Next = Butterfly<splits ? W / 2 : 1, HIGH / 2, LOW>;
    static constexpr int width = Next::width;
    template <typename acc> __device__ static void sum(acc* v) {
        constexpr int HALF = splits ? W / 2 : 1;
        const bool upper = threadIdx.x & HIGH;
        acc kept[HALF], received[HALF];  // the compiler moves nothing across a shuffle: so none waits for a sum
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            kept[i] = splits && upper ? v[splits ? i + HALF : 0] : v[i];
            received[i] = splits && !upper ? v[splits ? i + HALF : 0] : v[i];
        }
#pragma unroll
        for (int i = 0; i < HALF; ++i) received[i] = __shfl_xor_sync(0xffffffffu, received[i], HIGH);
#pragma unroll
        for (int i = 0; i < HALF; ++i) v[i] = kept[i] + received[i];
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
// The tile of the backward pass, whose h stay in registers; one checkpoint each.
__host__ __device__ constexpr int backward_steps(int states, int size) {
    const int steps = 2048 / (states * size), most = size > 4 ? 4 : 8;
    return steps < most ? steps : most;
}

// Blocks that an SM should hold, which caps the registers: 65536 / (THREADS blocks).
__host__ __device__ constexpr int forward_blocks(int ns, int lpc, int size) {
    return size > 4 ? 2 : ns > 4 || lpc < 4 ? 3 : 4;
}

template <typename acc> struct Drive { acc delta, x; };  // x = delta u: what B[t] multiplies

// Y: whether y is asked for, and not the states alone. RESETS, here and below: whether there are any.
template <typename T, int NS, int LPC, int R, bool CONSTANT_B, bool CONSTANT_C, bool Y, bool RESETS = false>
__global__ void __launch_bounds__(THREADS, forward_blocks(NS, LPC, sizeof(accumulate<T>)))
    scan_forward(const Scan p) {
    using acc = accumulate<T>;
    constexpr int N = NS * LPC, CH = THREADS / LPC * R, TT = forward_steps(CH, N, sizeof(acc));
    constexpr int EVERY = backward_steps(N, sizeof(acc));
    constexpr int GROUP = EVERY < 4 ? EVERY : 4;  // steps whose sums over lanes are taken together
    constexpr bool STAGED_C = Y && !CONSTANT_C;
    constexpr int STAGED = !CONSTANT_B + STAGED_C;
    alignas(16) __shared__ Drive<acc> drive[TT][CH];
    alignas(16) __shared__ acc ys[Y ? TT : 1][CH], maps[STAGED ? STAGED : 1][TT][N], bias[CH], D[CH];

    __shared__ Block w;
    locate(p, CH, w);
    const Lane<R, NS> lane(p, w, LPC);
    acc A[R][NS], h[R][NS], Bc[R][NS], Cc[R][NS];
    lane.read(p.A, w.c0, p, A);
    scale(A, acc(LOG2_E));
    lane.read(p.chunks > 1 ? p.carry : p.first, w.entry, p, h);
    if constexpr (CONSTANT_B) lane.read(p.rows[at::B].data, w.c0, p, Bc);
    if constexpr (Y && CONSTANT_C) lane.read(p.rows[at::C].data, w.c0, p, Cc);

    stage(p.bias, w, bias);
    stage(p.D, w, D);
    __syncthreads();
    using Part = Share<CH, TT>;
    const Part share(w);
    Tile<T, Part, at::delta, at::u, Y ? int(at::z) : int(at::count)> next;
    Maps<T, TT, N, !CONSTANT_B, STAGED_C> next_maps;
    next.load(p, w, share, 0);
    next_maps.load(p, w, 0);
    for (int t0 = 0; t0 < w.steps; t0 += TT) {
        const auto rows = next;
        share.each([&](int k, int t) {
            acc delta[Part::V];
            share.step_sizes(p, w, t0 + t, rows.x[0][k], bias, delta);
#pragma unroll
            for (int i = 0; i < Part::V; ++i) drive[t][share.c + i] = {delta[i], delta[i] * rows.x[1][k][i]};
        });
        next_maps.stage(p, w, t0, maps);
        __syncthreads();

        if (t0 + TT < w.steps) {
            next.load(p, w, share, t0 + TT);
            next_maps.load(p, w, t0 + TT);
        }
        for (int start = 0; start < TT; start += EVERY) {
            if (p.checkpoints && t0 + start < w.steps)
                lane.write(p.checkpoints, (w.b * p.tiles + (w.begin + t0 + start) / EVERY) * p.d + w.c0, p, h);
            for (int t = start; t < start + EVERY; t += GROUP) {
                acc y[GROUP * R] = {};
#pragma unroll
                for (int i = 0; i < GROUP; ++i) {
                    const auto step = *reinterpret_cast<const Pack<Drive<acc>, R>*>(&drive[t + i][lane.c]);
                    Pack<acc, NS> B, C;
                    if constexpr (!CONSTANT_B) B = *reinterpret_cast<const Pack<acc, NS>*>(&maps[0][t + i][lane.n]);
                    constexpr int LAST = STAGED ? STAGED - 1 : 0;
                    if constexpr (STAGED_C) C = *reinterpret_cast<const Pack<acc, NS>*>(&maps[LAST][t + i][lane.n]);
                    const bool anew = starts<RESETS>(p, w, t0 + t + i);
#pragma unroll
                    for (int r = 0; r < R; ++r)
#pragma unroll
                        for (int j = 0; j < NS; ++j) {
                            const acc a = exp2_(step.x[r].delta * A[r][j]);
                            h[r][j] = a * (anew ? acc(0) : h[r][j]) + step.x[r].x * (CONSTANT_B ? Bc[r][j] : B.x[j]);
                            if constexpr (Y) y[i * R + r] += (CONSTANT_C ? Cc[r][j] : C.x[j]) * h[r][j];
                        }
                }
                if constexpr (Y) {
                    using Sum = Butterfly<GROUP * R, LPC / 2, 1>;
                    Sum::sum(y);
                    const int first = Sum::held();
#pragma unroll
                    for (int i = 0; i < Sum::width; ++i)
                        if (first >= 0) ys[t + (first + i) / R][lane.c + (first + i) % R] = y[i];
                }
            }
        }
        __syncthreads();

        if constexpr (Y) {
            share.each([&](int k, int t) {
                acc y[Part::V];
#pragma unroll
                for (int i = 0; i < Part::V; ++i)
                    y[i] = (ys[t][share.c + i] + D[share.c + i] * rows.x[1][k][i]) * share.gate(p, rows.x[2][k][i]);
                share.template write<T>(p, w, at::y, t0 + t, y);
            });
        }
    }
    if (p.last && w.k == p.chunks - 1) lane.write(p.last, w.b * p.d + w.c0, p, h);
}

// What each chunk contributes to its own end from a zero start, and how much time passes in it (`sums`). Tiles are
// walked from the end back, and the walk stops once exp(A S) of the steps behind has vanished for every state of
// the block, so a typical chunk costs its tail only. For the adjoint, r[t] = a[t] (r[t+1] + C[t] dy[t]), the same holds
// with time turned round: B is C, delta u is dy silu(z), and the tail is the chunk's beginning. The walk also stops at
// a tile in which the state starts anew: nothing from behind it counts, be it infinite or NaN.
template <typename T, int NS, int LPC, int R, bool CONSTANT, bool ADJOINT, bool RESETS = false>
__global__ void __launch_bounds__(THREADS, forward_blocks(NS, LPC, sizeof(accumulate<T>)))
    scan_tail(const Scan p) {
    using acc = accumulate<T>;
    constexpr int N = NS * LPC, CH = THREADS / LPC * R, TT = forward_steps(CH, N, sizeof(acc));
    constexpr acc VANISHED = sizeof(acc) == 8 ? -80 : -40, FOREVER = 1e30f;
    alignas(16) __shared__ Drive<acc> drive[TT][CH];
    alignas(16) __shared__ acc maps[1][TT][N], bias[CH];

    __shared__ Block w;
    locate(p, CH, w);
    if (w.k == (ADJOINT ? 0 : p.chunks - 1)) return;  // no chunk follows
    const Lane<R, NS> lane(p, w, LPC);
    constexpr int series = ADJOINT ? at::C : at::B;
    acc A[R][NS], constant[R][NS], end[R][NS] = {};
    lane.read(p.A, w.c0, p, A);
    scale(A, acc(LOG2_E));
    if constexpr (CONSTANT) lane.read(p.rows[series].data, w.c0, p, constant);
    stage(p.bias, w, bias);
    __syncthreads();
    using Part = Share<CH, TT>;
    const Part share(w);
    Tile<T, Part, at::delta, ADJOINT ? int(at::dy) : int(at::u), ADJOINT ? int(at::z) : int(at::count)> next;
    Maps<T, TT, N, !CONSTANT && !ADJOINT, !CONSTANT && ADJOINT> next_maps;
    double passed[R] = {};  // up to 2^20 small terms
    bool vanished = false;
    const int last = (w.steps - 1) / TT * TT;
    next.load(p, w, share, ADJOINT ? 0 : last);
    next_maps.load(p, w, ADJOINT ? 0 : last);
    for (int walked = 0; walked <= last; walked += TT) {
        const int t0 = ADJOINT ? walked : last - walked;
        share.each([&](int k, int t) {
            acc delta[Part::V], x[Part::V];
            share.step_sizes(p, w, t0 + t, next.x[0][k], bias, delta);
            if constexpr (ADJOINT) share.ungated(p, next.x[1][k], next.x[2][k], x);
#pragma unroll
            for (int i = 0; i < Part::V; ++i)
                drive[t][share.c + i] = {delta[i], ADJOINT ? x[i] : delta[i] * next.x[1][k][i]};
        });
        next_maps.stage(p, w, t0, maps);
        __syncthreads();

        if (walked < last) {
            next.load(p, w, share, ADJOINT ? t0 + TT : t0 - TT);
            next_maps.load(p, w, ADJOINT ? t0 + TT : t0 - TT);
        }

        acc local[R][NS] = {}, sum[R] = {};
        bool cut = false;
#pragma unroll 4
        for (int i = 0; i < TT; ++i) {
            const int t = ADJOINT ? TT - 1 - i : i;
            const bool anew = starts<RESETS>(p, w, t0 + t);
            cut |= anew;
            const auto step = *reinterpret_cast<const Pack<Drive<acc>, R>*>(&drive[t][lane.c]);
            Pack<acc, NS> B;
            if constexpr (!CONSTANT) B = *reinterpret_cast<const Pack<acc, NS>*>(&maps[0][t][lane.n]);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                sum[r] += step.x[r].delta;
#pragma unroll
                for (int j = 0; j < NS; ++j) {
                    const acc a = exp2_(step.x[r].delta * A[r][j]);
                    const acc x = step.x[r].x * (CONSTANT ? constant[r][j] : B.x[j]);
                    if constexpr (ADJOINT) local[r][j] = anew ? acc(0) : a * (local[r][j] + x);
                    else local[r][j] = a * (anew ? acc(0) : local[r][j]) + x;
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
        if (RESETS && cut) {
            for (int r = 0; r < R; ++r) passed[r] = CUT;
            break;
        }
        if (__syncthreads_and(vanished)) {
            for (int r = 0; r < R; ++r) passed[r] = FOREVER;  // exp2(A passed) is then exactly 0
            break;
        }
    }
    lane.write(p.carry, w.entry, p, end);
    for (int r = 0; r < R; ++r)
        if (lane.n == 0 && r < lane.channels) static_cast<acc*>(p.sums)[w.entry + lane.c + r] = acc(passed[r]);
}

// carry[k] becomes what enters chunk k: carry[k+1] = end[k] + exp(A S[k]) carry[k]; one thread per (batch, c, state).
template <typename acc, bool ADJOINT, bool RESETS = false>
__global__ void __launch_bounds__(THREADS) scan_carry(const Scan p) {
    const long long index = (long long)blockIdx.x * THREADS + threadIdx.x, states = p.d * p.d_state;
    if (index >= p.batch * states) return;
    const long long b = index / states, state = index % states, c = state / p.d_state;
    const acc A = static_cast<const acc*>(p.A)[state] * acc(LOG2_E);
    acc* const carry = static_cast<acc*>(p.carry) + b * p.chunks * states + state;
    const acc* const sums = static_cast<const acc*>(p.sums) + b * p.chunks * p.d + c;
    acc entering = p.first ? static_cast<const acc*>(p.first)[index] : acc(0);
    constexpr int AHEAD = 32 / sizeof(acc);  // loads that do not wait for one another
    for (long long i = 0; i < p.chunks; i += AHEAD) {
        acc end[AHEAD], passed[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const long long k = ADJOINT ? p.chunks - 1 - i - j : i + j;
            const bool leaves = i + j + 1 < p.chunks;
            end[j] = leaves ? carry[k * states] : acc(0);
            passed[j] = leaves ? sums[k * p.d] : acc(0);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (i + j >= p.chunks) break;
            carry[(ADJOINT ? p.chunks - 1 - i - j : i + j) * states] = entering;
            entering = RESETS && passed[j] == acc(CUT) ? end[j] : end[j] + exp2_(A * passed[j]) * entering;
        }
    }
}

// Adds up what the threads hold of each channel (thread i % (CH / V) and those a multiple of CH / V further), in order.
template <int CH, int V, typename acc>
__device__ inline void sum_shares(const Totals<acc, V>& shares, void* to, const Block& w) {
    for (int c = threadIdx.x; c < w.channels; c += THREADS) {
        acc sum = 0;
        for (int i = c / V; i < THREADS; i += CH / V) sum += shares.sum[c % V][i];
        static_cast<acc*>(to)[w.entry + c] = sum;
    }
}

// With the adjoint g[t] = dy[t] C[t] + a[t+1] g[t+1] of h[t], a = exp(delta A), and sums over what the left side lacks:
//     dB = delta u g,  dC = dy h,  dA = sum_t delta a g h[t-1],  d(delta u) = g . B,
//     ddelta = u (g . B) + sum_n A a g h[t-1],  du = delta (g . B) + D dy,  dD = sum_t dy u
// (dy here is dy silu(z)). Each tile recomputes h from its checkpoint into registers, then walks back. Where the state
// starts anew at step t, 0 stands for h[t-1], and nothing of g[t] enters g[t-1].
template <typename T, int NS, int LPC, int R, bool CONSTANT_B, bool CONSTANT_C, bool RESETS = false>
__global__ void __launch_bounds__(THREADS, 2) scan_backward(const Scan p) {
    using acc = accumulate<T>;
    constexpr int N = NS * LPC, CH = THREADS / LPC * R, TT = backward_steps(N, sizeof(acc));
    constexpr int GROUP = TT < 2 ? TT : 2;  // steps whose sums over lanes are taken together
    constexpr int VARYING = !CONSTANT_B + !CONSTANT_C, M = VARYING ? VARYING * N : 1;
    using Part = Share<CH, TT>;
    constexpr int V = Part::V;
    alignas(16) __shared__ Drive<acc> drive[TT][CH];
    alignas(16) __shared__ acc dys[TT][CH], out[3][TT][CH], maps[VARYING ? VARYING : 1][TT][N], bias[CH], D[CH];
    alignas(16) __shared__ acc parts[WARPS][VARYING ? TT : 1][M];
    __shared__ Totals<acc, R * NS> totals[1 + CONSTANT_B + CONSTANT_C];  // dA, and dB and dC where they are constant
    __shared__ Totals<acc, V> dD, dbias;

    __shared__ Block w;
    locate(p, CH, w);
    const Lane<R, NS> lane(p, w, LPC);
    const int warp = threadIdx.x / 32;
    acc A[R][NS], adjoint[R][NS], Bc[R][NS], Cc[R][NS];  // adjoint: a[t+1] g[t+1]
    Totals<acc, R * NS>&dA = totals[0], &dBc = totals[CONSTANT_B], &dCc = totals[CONSTANT_B + CONSTANT_C];
    for (auto& each : totals) each.clear();
    dD.clear();
    dbias.clear();
    lane.read(p.A, w.c0, p, A);
    scale(A, acc(LOG2_E));
    lane.read(p.chunks > 1 ? p.carry : p.first, w.entry, p, adjoint);
    if constexpr (CONSTANT_B) lane.read(p.rows[at::B].data, w.c0, p, Bc);
    if constexpr (CONSTANT_C) lane.read(p.rows[at::C].data, w.c0, p, Cc);

    stage(p.bias, w, bias);
    stage(p.D, w, D);
    __syncthreads();
    const Part share(w);

    Tile<T, Part, at::delta, at::u, at::dy, at::z> next;
    Maps<T, TT, N, !CONSTANT_B, !CONSTANT_C> next_maps;
    Raw<acc, NS> next_start[R];
    const long long checkpoint = w.b * p.tiles + w.begin / TT;
    const int last = (w.steps - 1) / TT * TT;
    const auto ahead = [&](int t0) {
        next.load(p, w, share, t0);
        next_maps.load(p, w, t0);
        lane.load(p.checkpoints, (checkpoint + t0 / TT) * p.d + w.c0, p, next_start);
    };
    constexpr bool AHEAD = sizeof(acc) == 4;  // float64 has no registers for it
    if (AHEAD) ahead(last);
    for (int t0 = last; t0 >= 0; t0 -= TT) {
        if (!AHEAD) ahead(t0);
        const auto rows = next;
        acc start[R][NS];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int j = 0; j < NS; ++j) start[r][j] = next_start[r][j];
        share.each([&](int k, int t) {
            acc delta[V], dy[V];
            share.step_sizes(p, w, t0 + t, rows.x[0][k], bias, delta);
            share.ungated(p, rows.x[2][k], rows.x[3][k], dy);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                drive[t][share.c + i] = {delta[i], delta[i] * rows.x[1][k][i]};
                dys[t][share.c + i] = dy[i];
            }
        });
        next_maps.stage(p, w, t0, maps);
        __syncthreads();

        if (AHEAD && t0) ahead(t0 - TT);
        acc h[TT][R][NS], tile_dA[R][NS] = {}, tile_dB[R][NS] = {}, tile_dC[R][NS] = {};
#pragma unroll
        for (int t = 0; t < TT; ++t) {
            const auto step = *reinterpret_cast<const Pack<Drive<acc>, R>*>(&drive[t][lane.c]);
            const bool anew = starts<RESETS>(p, w, t0 + t);
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
                for (int j = 0; j < NS; ++j) {
                    const acc B = CONSTANT_B ? Bc[r][j] : maps[0][t][lane.n + j];
                    const acc a = exp2_(step.x[r].delta * A[r][j]);
                    const acc before = anew ? acc(0) : t ? h[t ? t - 1 : 0][r][j] : start[r][j];
                    h[t][r][j] = a * before + step.x[r].x * B;
                }
        }
#pragma unroll
        for (int t = TT - GROUP; t >= 0; t -= GROUP) {
            acc sums[GROUP * R * 4] = {};  // g . B, A a g h[t-1], y
            acc products[VARYING ? GROUP * VARYING * NS : 1] = {};
#pragma unroll
            for (int i = GROUP - 1; i >= 0; --i) {
                const auto step = *reinterpret_cast<const Pack<Drive<acc>, R>*>(&drive[t + i][lane.c]);
                const auto dy = *reinterpret_cast<const Pack<acc, R>*>(&dys[t + i][lane.c]);
                const bool anew = starts<RESETS>(p, w, t0 + t + i);
                acc* const sum = sums + i * R * 4;
                acc* const product = products + i * VARYING * NS;
#pragma unroll
                for (int r = 0; r < R; ++r)
#pragma unroll
                    for (int j = 0; j < NS; ++j) {
                        const acc B = CONSTANT_B ? Bc[r][j] : maps[0][t + i][lane.n + j];
                        const acc C = CONSTANT_C ? Cc[r][j] : maps[VARYING ? VARYING - 1 : 0][t + i][lane.n + j];
                        const acc g = adjoint[r][j] + dy.x[r] * C;
                        adjoint[r][j] = exp2_(step.x[r].delta * A[r][j]) * g;
                        const acc before = anew ? acc(0) : t + i ? h[t + i ? t + i - 1 : 0][r][j] : start[r][j];
                        const acc da = adjoint[r][j] * before;
                        if (anew) adjoint[r][j] = 0;
                        tile_dA[r][j] += step.x[r].delta * da;
                        sum[4 * r] += g * B;
                        sum[4 * r + 1] += A[r][j] * da;
                        sum[4 * r + 2] += C * h[t + i][r][j];
                        if constexpr (CONSTANT_B) tile_dB[r][j] += step.x[r].x * g;
                        if constexpr (CONSTANT_C) tile_dC[r][j] += dy.x[r] * h[t + i][r][j];
                        if constexpr (!CONSTANT_B) product[j] += step.x[r].x * g;
                        if constexpr (!CONSTANT_C) product[(VARYING - 1) * NS + j] += dy.x[r] * h[t + i][r][j];
                    }
            }
            using Sum = Butterfly<GROUP * R * 4, LPC / 2, 1>;
            Sum::sum(sums);
#pragma unroll
            for (int i = 0; i < Sum::width; ++i) {
                const int which = Sum::held() + i;
                if (which >= 0 && which % 4 < 3) out[which % 4][t + which / (4 * R)][lane.c + which / 4 % R] = sums[i];
            }
            if constexpr (VARYING > 0) {
                using Product = Butterfly<GROUP * VARYING * NS, 16, LPC>;
                Product::sum(products);
#pragma unroll
                for (int i = 0; i < Product::width; ++i) {
                    const int which = Product::held() + i, state = which % (VARYING * NS);
                    if (which >= 0)
                        parts[warp][t + which / (VARYING * NS)][state / NS * N + lane.n + state % NS] = products[i];
                }
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int j = 0; j < NS; ++j) {
                dA.add(r * NS + j, tile_dA[r][j]);
                if constexpr (CONSTANT_B) dBc.add(r * NS + j, tile_dB[r][j]);
                if constexpr (CONSTANT_C) dCc.add(r * NS + j, tile_dC[r][j]);
            }
        __syncthreads();

        if constexpr (VARYING > 0) {
            constexpr int W = N < 4 ? N : TT * M < 4 * THREADS ? 2 : 4, ITEMS = TT * M / W;
#pragma unroll
            for (int k = 0; k < (ITEMS + THREADS - 1) / THREADS; ++k) {
                const int i = threadIdx.x + k * THREADS, t = i / (M / W), m = i % (M / W) * W, n = m % N;
                if (ITEMS % THREADS && i >= ITEMS) break;
                acc sum[W] = {};
#pragma unroll
                for (int part = 0; part < WARPS; ++part)
#pragma unroll
                    for (int j = 0; j < W; ++j) sum[j] += parts[part][t][m + j];
                const bool of_C = CONSTANT_B || (!CONSTANT_C && m >= N);
                const long long stride = of_C ? p.rows[at::dC].time : p.rows[at::dB].time;
                acc* const to = row<acc>(w.rows[of_C ? at::dC : at::dB], stride, t0 + t) + w.index * p.d_state;
                store<W>(to + n, t0 + t < w.steps ? int(p.d_state) - n : 0, p.d_state % W == 0, sum);
            }
        }
        share.each([&](int k, int t) {
            acc du[V], ddelta[V], dz[V];
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const acc u = rows.x[1][k][i], dy = dys[t][share.c + i], gB = out[0][t][share.c + i];
                du[i] = drive[t][share.c + i].delta * gB + D[share.c + i] * dy;
                ddelta[i] = u * gB + acc(LN_2) * out[1][t][share.c + i];
                dD.add(i, dy * u);  // 0 in the padding
            }
            if (p.softplus) {
#pragma unroll
                for (int i = 0; i < V; ++i) ddelta[i] *= sigmoid(rows.x[0][k][i] + bias[share.c + i]);
            }
            if (t0 + t < w.steps) {
#pragma unroll
                for (int i = 0; i < V; ++i) dbias.add(i, ddelta[i]);
            }
            share.template write<T>(p, w, at::du, t0 + t, du);
            share.template write<T>(p, w, at::ddelta, t0 + t, ddelta);
            if (p.rows[at::z].data) {  // silu'(z) = s (1 + z (1 - s)), s = sigmoid(z)
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const acc z = rows.x[3][k][i], s = sigmoid(z);
                    const acc y = out[2][t][share.c + i] + D[share.c + i] * rows.x[1][k][i];
                    dz[i] = rows.x[2][k][i] * y * s * (1 + z * (1 - s));
                }
                share.template write<T>(p, w, at::dz, t0 + t, dz);
            }
        });
    }

    lane.write(p.dA, w.entry, p, dA);
    if constexpr (CONSTANT_B) lane.write(p.rows[at::dB].data, w.entry, p, dBc);
    if constexpr (CONSTANT_C) lane.write(p.rows[at::dC].data, w.entry, p, dCc);
    if (p.last && w.k == 0) lane.write(p.last, w.b * p.d + w.c0, p, adjoint);
    __syncthreads();
    sum_shares<CH>(dD, p.dD, w);
    sum_shares<CH>(dbias, p.dbias, w);
}

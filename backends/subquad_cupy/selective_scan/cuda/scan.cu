// Selective scan (S6), forward and backward. The files of this folder are joined in the order that compile.py gives,
// without an #include, so that every NVRTC compiles them.
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

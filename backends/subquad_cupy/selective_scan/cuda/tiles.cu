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

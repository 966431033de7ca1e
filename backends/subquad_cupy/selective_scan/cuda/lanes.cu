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

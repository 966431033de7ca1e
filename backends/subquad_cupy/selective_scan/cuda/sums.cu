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

// Adds up what the threads hold of each channel (thread i % (CH / V) and those a multiple of CH / V further), in order.
template <int CH, int V, typename acc>
__device__ inline void sum_shares(const Totals<acc, V>& shares, void* to, const Block& w) {
    for (int c = threadIdx.x; c < w.channels; c += THREADS) {
        acc sum = 0;
        for (int i = c / V; i < THREADS; i += CH / V) sum += shares.sum[c % V][i];
        static_cast<acc*>(to)[w.entry + c] = sum;
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

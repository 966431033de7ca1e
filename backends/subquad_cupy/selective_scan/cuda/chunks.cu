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

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

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

// The ceiling for the compiled selective scan: the same fused loop, channels last, in plain C++.
//
//     h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t],   y[t] = (C[t] · h[t] + D u[t]) silu(z[t]),   Δ = softplus(delta)
//
// Meant for: g++ -O3 -march=native -ffast-math -fopenmp -shared -fPIC. float32, one group, B and C per step.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <vector>

namespace {

constexpr float LOG2_E = 1.44269504f;

// 2^x by the polynomial of the package; without branches, so that the compiler vectorises its callers.
inline float exp2_polynomial(float x) {
    x = std::min(std::max(x, -127.0f), 128.0f);
    const float whole = std::nearbyintf(x);
    const float f = x - whole;
    float p = 0.0001545316295f;
    p = p * f + 0.001339086336f;
    p = p * f + 0.009618082557f;
    p = p * f + 0.05550357114f;
    p = p * f + 0.2402265076f;
    p = p * f + 0.693147188f;
    p = p * f + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &p, sizeof bits);
    bits += static_cast<int32_t>(whole) << 23;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

inline float softplus(float x) {
    const float e = exp2_polynomial(-std::fabs(x) * LOG2_E);
    const float s = e / (2.0f + e), w = s * s;
    return std::max(x, 0.0f)
        + s * (2.0f + w * (0.6666632164f + w * (0.4002459523f + w * (0.2796515775f + w * 0.2815777836f))));
}

inline float silu(float z) { return z / (1.0f + exp2_polynomial(-z * LOG2_E)); }

}  // namespace

// u, delta, z, y: (batch, n, d); A: (d, d_state); B, C: (batch, n, d_state); D: (d).
// `block` channels of one batch item are a unit of work for a thread.
extern "C" void selective_scan(
    int64_t batch, int64_t n, int64_t d, int64_t d_state, int64_t block, int threads,
    const float* u, const float* delta, const float* A, const float* B, const float* C, const float* D,
    const float* z, float* y
) {
    const int64_t blocks = (d + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < batch * blocks; ++task) {
        const int64_t item = task / blocks, c0 = task % blocks * block, width = std::min(block, d - c0);
        std::vector<float> rates(d_state * width), states(d_state * width), rows(3 * width);
        for (int64_t s = 0; s < d_state; ++s)
            for (int64_t c = 0; c < width; ++c) rates[s * width + c] = A[(c0 + c) * d_state + s] * LOG2_E;
        float* __restrict step = rows.data();
        float* __restrict drive = step + width;
        float* __restrict out = drive + width;
        for (int64_t t = 0; t < n; ++t) {
            const int64_t row = (item * n + t) * d + c0;
            const float* b = B + (item * n + t) * d_state;
            const float* c_ = C + (item * n + t) * d_state;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) {
                step[c] = softplus(delta[row + c]);
                drive[c] = step[c] * u[row + c];
                out[c] = D[c0 + c] * u[row + c];
            }
            int64_t s = 0;
            for (; s + 4 <= d_state; s += 4) {  // four states a pass: a quarter of the loads of step, drive, out
                float* __restrict h = states.data() + s * width;
                const float* __restrict a = rates.data() + s * width;
#pragma omp simd
                for (int64_t c = 0; c < width; ++c) {
                    float sum = out[c];
                    for (int64_t k = 0; k < 4; ++k) {
                        const float next = exp2_polynomial(step[c] * a[k * width + c]) * h[k * width + c] + drive[c] * b[s + k];
                        h[k * width + c] = next;
                        sum += c_[s + k] * next;
                    }
                    out[c] = sum;
                }
            }
            for (; s < d_state; ++s) {
                float* __restrict h = states.data() + s * width;
                const float* __restrict a = rates.data() + s * width;
#pragma omp simd
                for (int64_t c = 0; c < width; ++c) {
                    h[c] = exp2_polynomial(step[c] * a[c]) * h[c] + drive[c] * b[s];
                    out[c] += c_[s] * h[c];
                }
            }
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) y[row + c] = out[c] * silu(z[row + c]);
        }
    }
}

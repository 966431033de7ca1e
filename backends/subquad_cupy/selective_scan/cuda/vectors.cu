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

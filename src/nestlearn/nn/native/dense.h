// Small dense kernels in cache: matrix products, transposes, sigmoid. Row-major, any element type.
//
// Written with the compilers' vector extensions, so that one source serves AVX-512, AVX2 and NEON.
// Vectors are as long as the machine's registers: compilers split longer ones through memory.
// Matrices here are some 64 x 64: calls to a BLAS library would spend a good part of their time on
// dispatch, and no library fuses what comes between the products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

namespace dense {

// Vector registers there are: a tile's sums have to fit.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool MANY_REGISTERS = true;  // 32
#else
constexpr bool MANY_REGISTERS = false;  // 16
#endif

// While it lives, this thread reads and writes denormal numbers as 0: they are up to a hundred times
// slower, and a rate or a retention that is nearly 0 makes whole matrices of them.
class NoDenormals {
   public:
#if defined(__x86_64__)
    NoDenormals() : before(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~NoDenormals() { __builtin_ia32_ldmxcsr(before); }

   private:
    unsigned before;
#elif defined(__aarch64__)
    NoDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | (uint64_t(1) << 24)));
    }
    ~NoDenormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }

   private:
    uint64_t before;
#endif
};

template <typename T>
struct Vector {
    static constexpr long width = VECTOR_BYTES / sizeof(T);
    typedef T type __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

constexpr long LANES = Vector<float>::width;

// R rows by V vectors of C (+)= A B, accumulated in registers. A[i, k] is at A[i * ra + k * ca].
template <typename T, int R, int V>
inline void tile(const T* A, long ra, long ca, const T* B, long ldb, T* C, long ldc, long K,
                 bool add) {
    using vec = typename Vector<T>::type;
    constexpr long width = Vector<T>::width;
    vec c[R][V];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++)
            c[i][j] = add ? *(const vec*)(C + i * ldc + width * j) : vec{};
    for (long k = 0; k < K; k++) {
        vec b[V];
        for (int j = 0; j < V; j++) b[j] = *(const vec*)(B + k * ldb + width * j);
        for (int i = 0; i < R; i++) {
            const T a = A[i * ra + k * ca];
            for (int j = 0; j < V; j++) c[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) *(vec*)(C + i * ldc + width * j) = c[i][j];
}

template <typename T, int R, int V>
void panel(long M, long K, const T* A, long ra, long ca, const T* B, long ldb, T* C, long ldc,
           bool add) {
    long m = 0;
    for (; m + R <= M; m += R) tile<T, R, V>(A + m * ra, ra, ca, B, ldb, C + m * ldc, ldc, K, add);
    for (; m + 4 <= M; m += 4) tile<T, 4, V>(A + m * ra, ra, ca, B, ldb, C + m * ldc, ldc, K, add);
    for (; m + 2 <= M; m += 2) tile<T, 2, V>(A + m * ra, ra, ca, B, ldb, C + m * ldc, ldc, K, add);
    for (; m < M; m++) tile<T, 1, V>(A + m * ra, ra, ca, B, ldb, C + m * ldc, ldc, K, add);
}

// C (M, N) = A B, or += with `add`; B (K, N) has rows of ldb elements, A any strides.
template <typename T>
void gemm(long M, long N, long K, const T* A, long ra, long ca, const T* B, long ldb, T* C,
          long ldc, bool add) {
    constexpr long width = Vector<T>::width;
    if (N == 1 && ldb == 1 && ldc == 1) {
        if (ra == 1 && ca > 1) return gemm(1, M, K, B, 0, 1, A, ca, C, M, add);
        for (long m = 0; m < M; m++) {
            T sum = 0;
            for (long k = 0; k < K; k++) sum += A[m * ra + k * ca] * B[k];
            C[m] = add ? C[m] + sum : sum;
        }
        return;
    }
    long n = 0;
    if constexpr (MANY_REGISTERS)
        for (; n + 4 * width <= N; n += 4 * width)
            panel<T, 6, 4>(M, K, A, ra, ca, B + n, ldb, C + n, ldc, add);
    for (; n + 2 * width <= N; n += 2 * width)
        panel<T, MANY_REGISTERS ? 12 : 6, 2>(M, K, A, ra, ca, B + n, ldb, C + n, ldc, add);
    for (; n + width <= N; n += width)
        panel<T, 12, 1>(M, K, A, ra, ca, B + n, ldb, C + n, ldc, add);
    if (n == N) return;
    for (long m = 0; m < M; m++) {
        T sum[width] = {};
        if (add)
            for (long j = n; j < N; j++) sum[j - n] = C[m * ldc + j];
        for (long k = 0; k < K; k++) {
            const T a = A[m * ra + k * ca];
            for (long j = n; j < N; j++) sum[j - n] += a * B[k * ldb + j];
        }
        for (long j = n; j < N; j++) C[m * ldc + j] = sum[j - n];
    }
}

// C (M, N) (+)= A (M, K) B (K, N)
template <typename T>
inline void nn(long M, long N, long K, const T* A, const T* B, T* C, bool add = false) {
    gemm(M, N, K, A, K, 1, B, N, C, N, add);
}

// C (M, N) (+)= A^T B with A (K, M)
template <typename T>
inline void tn(long M, long N, long K, const T* A, const T* B, T* C, bool add = false) {
    gemm(M, N, K, A, 1, M, B, N, C, N, add);
}

// One step of a transpose of LANES x LANES: rows i and i + S exchange blocks of S columns.
template <int S>
inline void exchange(typename Vector<float>::type* rows) {
    using vec = typename Vector<float>::type;
    typedef int32_t index __attribute__((vector_size(VECTOR_BYTES)));
    index low, high;
    for (int j = 0; j < LANES; j++) {
        low[j] = j & S ? LANES + j - S : j;
        high[j] = j & S ? LANES + j : j + S;
    }
    for (int i = 0; i < LANES; i++) {
        if (i & S) continue;
        const vec a = rows[i], b = rows[i + S];
#if defined(__clang__)
        vec x, y;
        for (int j = 0; j < LANES; j++) {
            x[j] = low[j] < LANES ? a[low[j]] : b[low[j] - LANES];
            y[j] = high[j] < LANES ? a[high[j]] : b[high[j] - LANES];
        }
        rows[i] = x;
        rows[i + S] = y;
#else
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + S] = __builtin_shuffle(a, b, high);
#endif
    }
}

inline void transpose_tile(const float* from, long ldf, float* to, long ldt) {
    using vec = typename Vector<float>::type;
    vec rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = *(const vec*)(from + i * ldf);
    exchange<1>(rows);
    exchange<2>(rows);
    if constexpr (LANES >= 8) exchange<4>(rows);
    if constexpr (LANES >= 16) exchange<8>(rows);
    for (int i = 0; i < LANES; i++) *(vec*)(to + i * ldt) = rows[i];
}

// to (cols, rows) = from (rows, cols)^T
template <typename T>
void transpose(long rows, long cols, const T* from, T* to) {
    if (rows == 1 || cols == 1) {
        std::memcpy(to, from, rows * cols * sizeof(T));
        return;
    }
    long i = 0;
    if constexpr (sizeof(T) == 4) {
        const long full = cols - cols % LANES;
        for (; i + LANES <= rows; i += LANES) {
            for (long j = 0; j < full; j += LANES)
                transpose_tile(from + i * cols + j, cols, to + j * rows + i, rows);
            for (long j = full; j < cols; j++)
                for (long r = i; r < i + LANES; r++) to[j * rows + r] = from[r * cols + j];
        }
    }
    for (; i < rows; i++)
        for (long j = 0; j < cols; j++) to[j * rows + i] = from[i * cols + j];
}

// f(i, c) for every element i of a (rows, C) matrix, c its column; iterations are independent.
template <typename F>
inline void each(long rows, long C, F f) {
    if (C == 1) {
        INDEPENDENT
        for (long r = 0; r < rows; r++) f(r, 0);
        return;
    }
    for (long r = 0; r < rows; r++) {
        INDEPENDENT
        for (long c = 0; c < C; c++) f(r * C + c, c);
    }
}

// sums[c] (+)= sum over rows of f(i, c) at the elements i of column c
template <typename T, typename F>
inline void sum_rows(long rows, long C, T* sums, bool add, F f) {
    if (C == 1) {
        T sum = 0;
        for (long r = 0; r < rows; r++) sum += f(r, 0);
        sums[0] = add ? sums[0] + sum : sum;
        return;
    }
    if (!add) std::fill(sums, sums + C, T(0));
    for (long r = 0; r < rows; r++) {
        INDEPENDENT
        for (long c = 0; c < C; c++) sums[c] += f(r * C + c, c);
    }
}

template <typename T>
inline T dot(long n, const T* a, const T* b) {
    T sum = 0;
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// exp of a vector of floats, to about one unit in the last place: 2^n times a polynomial of the rest
inline typename Vector<float>::type exponential(typename Vector<float>::type x) {
    using vec = typename Vector<float>::type;
    typedef int32_t ivec __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    x = x < -87.0f ? vec{} - 87.0f : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    const vec scaled = x * 1.44269504088896341f;
    const ivec n = __builtin_convertvector(scaled + (scaled < 0.0f ? vec{} - 0.5f : vec{} + 0.5f),
                                           ivec);
    const vec whole = __builtin_convertvector(n, vec);
    const vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec p = vec{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((n + 127) << 23);
}

// s = 1 / (1 + exp(-z))
inline void sigmoid(long n, const float* z, float* s) {
    using vec = typename Vector<float>::type;
    long i = 0;
    for (; i + LANES <= n; i += LANES) *(vec*)(s + i) = 1.0f / (1.0f + exponential(-*(const vec*)(z + i)));
    if (i == n) return;
    vec rest = {};
    std::memcpy(&rest, z + i, (n - i) * sizeof(float));
    rest = 1.0f / (1.0f + exponential(-rest));
    std::memcpy(s + i, &rest, (n - i) * sizeof(float));
}

inline void sigmoid(long n, const double* z, double* s) {
    for (long i = 0; i < n; i++) s[i] = 1.0 / (1.0 + std::exp(-z[i]));
}

}  // namespace dense

// What all memories of a group share within one chunk: gates, products of keys, momentum's decay, and
// the gradients they add up. See memories.h.
#pragma once

#include <vector>

#include "dense.h"

namespace memories {

using namespace dense;

constexpr long MAX_DEPTH = 4;
constexpr double SMALLEST_RETENTION = 1e-20;  // as in rules/decay.py
constexpr double FLUSH = 1e-17;  // smaller weights become 0: denormal numbers are slow

struct Shape {
    long size, hidden, depth, chunk;  // d, width of the hidden layers, L, C
    bool l2;                          // objective: 1/2 ||M(k) - v||^2, else -<M(k), v>
    bool shared_targets;              // v itself, not M(v)
    bool delta;                       // delta gradient descent, else gradient descent
    bool momentum;                    // S <- beta S - eta' g a^T in the place of the gradient

    long in(long layer) const { return layer == 0 ? size : hidden; }
    long out(long layer) const { return layer == depth - 1 ? size : hidden; }
    bool residual() const { return depth > 1; }
    long widest() const { return std::max(size, hidden); }
};

// Aligned buffers that live as long as their owner.
template <typename T>
class Arena {
   public:
    Arena() = default;
    Arena(const Arena&) = delete;
    ~Arena() {
        for (T* block : blocks) std::free(block);
    }
    T* take(long count) {
        const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
        blocks.push_back(static_cast<T*>(std::aligned_alloc(64, bytes)));
        std::memset(blocks.back(), 0, bytes);
        return blocks.back();
    }

   private:
    std::vector<T*> blocks;
};

template <typename T>
void clear(T* a, long n) {
    std::memset(a, 0, n * sizeof(T));
}

// What all memories of a group share within a chunk, and the gradients that they add up.
template <typename T>
struct Chunk {
    const Shape shape;
    const T *k_rows, *v_rows;                      // (C, d)
    T *k, *v, *eta, *before, *after, *rest, total;  // (d, C), then (C)
    T *mix;                 // gamma_t / gamma_s for s <= t, else 0; (C, C), row t
    T *gram, *inverse_t, *step;  // of the first layers, which all read the key
    T *g_k, *g_v, *g_eta, *g_before, *g_after, *g_rest, g_total, *g_mix, *g_lower, *g_step;
    T *scratch, *scratch2;  // (C, C)
    // With momentum M_t = ... + gain_t S_0 + sum_s late[t, s] v_s a_s^T, see rules/chunk.py.
    T *powers, *gain, *late;  // beta^j for j = 0 .. C, then (C) and (C, C)
    T *g_powers, *g_gain, *g_late, *g_gram;

    Chunk(const Shape& s, Arena<T>& arena) : shape(s) {
        const long C = s.chunk, n = s.size * C;
        for (T** buffer : {&k, &v, &g_k, &g_v}) *buffer = arena.take(n);
        for (T** buffer : {&eta, &before, &after, &rest, &step, &g_eta, &g_before, &g_after,
                           &g_rest, &g_step})
            *buffer = arena.take(C);
        for (T** buffer : {&mix, &gram, &inverse_t, &g_mix, &g_lower, &scratch, &scratch2})
            *buffer = arena.take(C * C);
        if (!s.momentum) return;
        for (T** buffer : {&powers, &gain, &g_powers, &g_gain}) *buffer = arena.take(C + 1);
        for (T** buffer : {&late, &g_late, &g_gram}) *buffer = arena.take(C * C);
    }

    // Everything that depends on keys, values, gates and the momentum's decay only.
    void prepare(const T* keys, const T* values, const T* rates, const T* retention,
                 const T* beta) {
        const long C = shape.chunk;
        k_rows = keys;
        v_rows = values;
        transpose(C, shape.size, keys, k);
        transpose(C, shape.size, values, v);
        std::copy(rates, rates + C, eta);
        T gamma = 1;
        for (long t = 0; t < C; t++) {
            const T alpha = std::max(retention[t], T(SMALLEST_RETENTION));
            before[t] = gamma;
            after[t] = gamma *= alpha;
            T* row = mix + t * C;
            for (long s = 0; s < t; s++) row[s] = row[s - C] * alpha;
            row[t] = 1;
            for (long s = t + 1; s < C; s++) row[s] = 0;
        }
        total = gamma;
        std::copy(mix + (C - 1) * C, mix + C * C, rest);
        nn(C, C, shape.size, keys, k, gram);
        solve(gram, step, inverse_t);
        if (shape.momentum) prepare_momentum(retention, *beta);
    }

    void prepare_momentum(const T* retention, T beta) {
        const long C = shape.chunk;
        powers[0] = 1;
        for (long j = 0; j < C; j++) powers[j + 1] = powers[j] * beta;
        for (long t = 0; t < C; t++) {
            const T alpha = std::max(retention[t], T(SMALLEST_RETENTION));
            T* row = late + t * C;
            for (long s = 0; s < t; s++) row[s] = row[s - C] * alpha + powers[t - s];
            row[t] = 1;
            for (long s = t + 1; s < C; s++) row[s] = 0;
            gain[t] = powers[t + 1] + (t ? alpha * gain[t - 1] : 0);
        }
    }


    // Proximal steps and, under the delta rule, ((I + L)^-1)^T of L[t, s] = step_t gamma_{t-1}/gamma_s <a_t, a_s>, s < t.
    void solve(const T* products, T* steps, T* inverse) {
        const long C = shape.chunk;
        for (long t = 0; t < C; t++) {
            steps[t] = eta[t] / (1 + eta[t] * products[t * C + t]);
            const T *pairs = mix + (t - 1) * C, *row = products + t * C;
            T* negative = scratch + t * C;
            for (long s = 0; s < t; s++) negative[s] = -steps[t] * pairs[s] * row[s];
        }
        if (!shape.delta) return;
        for (long s = C - 1; s >= 0; s--) {
            T* row = inverse + s * C;
            const long below = C - 1 - s;
            if (below)
                gemm(1, C, below, scratch + (s + 1) * C + s, 0, C, row + C, C, row, C, false);
            else
                clear(row, C);
            row[s] = 1;
        }
    }

    void clear_gradients() {
        const long C = shape.chunk;
        clear(g_k, shape.size * C);
        clear(g_v, shape.size * C);
        for (T* g : {g_eta, g_before, g_after, g_rest, g_step}) clear(g, C);
        clear(g_mix, C * C);
        clear(g_lower, C * C);
        g_total = 0;
        if (!shape.momentum) return;
        for (T* g : {g_powers, g_gain}) clear(g, C + 1);
        for (T* g : {g_late, g_gram}) clear(g, C * C);
    }

    // From dL = -(g_x^T u) to the inputs `a` (in, C) of a layer, its steps and the retention.
    // `more`, if not null: what else their products have as gradients, (C, C) below the diagonal.
    void solve_backward(const T* lower, const T* products, const T* more, const T* steps,
                        T* g_steps, long in, const T* a, T* g_a) {
        const long C = shape.chunk;
        T *g_gram = scratch, *mirror = scratch2;
        for (long t = 0; t < C; t++) {
            const T *pairs = mix + (t - 1) * C, *g = lower + t * C, *row = products + t * C;
            T *to = g_gram + t * C, *g_pairs = g_mix + (t - 1) * C;
            const T eta_step = steps[t];
            T sum = 0;
            INDEPENDENT
            for (long s = 0; s < t; s++) {
                const T both = g[s] * row[s];
                sum += both * pairs[s];
                g_pairs[s] -= eta_step * both;
                to[s] = -g[s] * pairs[s] * eta_step;
            }
            if (more)
                for (long s = 0; s < t; s++) to[s] += more[t * C + s];
            g_steps[t] -= sum;
            clear(to + t, C - t);
            to[t] = -eta_step * eta_step * g_steps[t];  // d eta'/d ||a||^2 = -eta'^2
            const T denominator = 1 + eta[t] * row[t];
            g_eta[t] += g_steps[t] / (denominator * denominator);
        }
        transpose(C, C, g_gram, mirror);
        each(C, C, [=](long i, long) { mirror[i] += g_gram[i]; });
        nn(in, C, C, a, mirror, g_a, true);
    }

    // Gradient of the retention, (C).
    void retention_backward(const T* retention, T* g_retention) {
        const long C = shape.chunk;
        T* g_log = g_after;  // by log gamma_t
        for (long t = 0; t < C; t++) g_log[t] *= after[t];
        for (long t = 1; t < C; t++) g_log[t - 1] += g_before[t] * before[t];
        T last = g_total * total;
        for (long s = 0; s < C; s++) {
            const T g = g_rest[s] * rest[s];
            last += g;
            g_log[s] -= g;
        }
        g_log[C - 1] += last;
        for (long t = 1; t < C; t++)
            for (long s = 0; s < t; s++) {
                const T g = g_mix[t * C + s] * mix[t * C + s];
                g_log[t] += g;
                g_log[s] -= g;
            }
        T sum = 0;
        for (long t = C - 1; t >= 0; t--) {
            sum += g_log[t];
            g_retention[t] = retention[t] < T(SMALLEST_RETENTION) ? 0 : sum / retention[t];
        }
    }

    // Gradients of `prepare_momentum`: g_retention +=; returns that of beta.
    T momentum_backward(const T* retention, T* g_retention) {
        const long C = shape.chunk;
        for (long t = C - 1; t >= 0; t--) {
            const bool clamped = retention[t] < T(SMALLEST_RETENTION);
            const T alpha = clamped ? T(SMALLEST_RETENTION) : retention[t];
            T sum = 0;
            for (long s = 0; s < t; s++) {
                const T g = g_late[t * C + s];
                sum += g * late[(t - 1) * C + s];
                g_late[(t - 1) * C + s] += alpha * g;
                g_powers[t - s] += g;
            }
            g_powers[t + 1] += g_gain[t];
            if (t) {
                sum += g_gain[t] * gain[t - 1];
                g_gain[t - 1] += alpha * g_gain[t];
            }
            if (!clamped) g_retention[t] += sum;
        }
        T g_beta = 0;
        for (long j = 1; j <= C; j++) g_beta += j * powers[j - 1] * g_powers[j];
        return g_beta;
    }
};

}  // namespace memories

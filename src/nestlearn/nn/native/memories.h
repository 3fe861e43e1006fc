// One chunk of delta gradient descent on a memory of some layers that makes its own targets, and its
// gradient (SPEC 4-5). The same computation as nn/self_write.py and rules/dgd_write.py, against which
// it is tested; the names are theirs. Tokens are columns here: (rows, C).
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

    Chunk(const Shape& s, Arena<T>& arena) : shape(s) {
        const long C = s.chunk, n = s.size * C;
        for (T** buffer : {&k, &v, &g_k, &g_v}) *buffer = arena.take(n);
        for (T** buffer : {&eta, &before, &after, &rest, &step, &g_eta, &g_before, &g_after,
                           &g_rest, &g_step})
            *buffer = arena.take(C);
        for (T** buffer : {&mix, &gram, &inverse_t, &g_mix, &g_lower, &scratch, &scratch2})
            *buffer = arena.take(C * C);
    }

    // Everything that depends on keys, values and gates only.
    void prepare(const T* keys, const T* values, const T* rates, const T* retention) {
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
    }

    // Proximal steps and ((I + L)^-1)^T of L[t, s] = step_t gamma_{t-1}/gamma_s <a_t, a_s>, s < t.
    void solve(const T* products, T* steps, T* inverse) {
        const long C = shape.chunk;
        for (long t = 0; t < C; t++) {
            steps[t] = eta[t] / (1 + eta[t] * products[t * C + t]);
            const T *pairs = mix + (t - 1) * C, *row = products + t * C;
            T* negative = scratch + t * C;
            for (long s = 0; s < t; s++) negative[s] = -steps[t] * pairs[s] * row[s];
        }
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
    }

    // From dL = -(g_x^T u) to the inputs `a` (in, C) of a layer, its steps and the retention.
    void solve_backward(const T* lower, const T* products, const T* steps, T* g_steps, long in,
                        const T* a, T* g_a) {
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
};

// One memory within a chunk: weights are given layer by layer, (out, in).
template <typename T>
class Memory {
   public:
    // What retention pulls to, by layer, (out, in); null: zero. Gradients are added to g_anchor.
    const T* anchor[MAX_DEPTH] = {};
    T* g_anchor[MAX_DEPTH] = {};

    Memory(const Shape& s, Chunk<T>& c, Arena<T>& arena) : shape(s), chunk(c), C(s.chunk) {
        const long n = s.widest() * C;
        for (long l = 0; l < s.depth; l++) {
            for (T** buffer : {&a[l], &a_gate[l], &response[l], &b[l], &b_gate[l], &z[l], &grad[l],
                               &product[l], &u[l], &g_a[l], &g_response[l], &g_grad[l], &g_u[l],
                               &read_in[l], &read_gate[l], &read_plain[l], &read_out[l],
                               &g_read[l], &fixed[l], &read_fixed[l], &g_fixed[l]})
                *buffer = arena.take(n);
            for (T** buffer : {&gram[l], &inverse_t[l], &scores[l], &raw_scores[l]})
                *buffer = arena.take(C * C);
            step[l] = arena.take(C);
            g_step[l] = arena.take(C);
        }
        for (T** buffer : {&target, &answer, &one, &two, &three}) *buffer = arena.take(n);
        for (T** buffer : {&square_one, &square_two}) *buffer = arena.take(C * C);
        scale = arena.take(C);
        along = arena.take(C);
        a[0] = chunk.k;
        gram[0] = chunk.gram;
        inverse_t[0] = chunk.inverse_t;
        step[0] = chunk.step;
        g_a[0] = chunk.g_k;
        g_step[0] = chunk.g_step;
    }

    // y = M(x), keeping what `respond_backward` needs; x and y (d, C).
    void respond(T* const* W, const T* x, T* y) {
        forward(W, x, b, b_gate, z);
        finish(x, z[shape.depth - 1], y);
    }

    // Gradients of `respond`: g_W += and g_x +=; overwrites the buffers of `respond`.
    void respond_backward(T* const* W, const T* x_rows, const T* g_y, T* const* g_W, T* g_x) {
        const long last = shape.depth - 1, n = shape.size * C;
        if (shape.residual()) each(shape.size, C, [=](long i, long) { g_x[i] += g_y[i]; });
        std::copy(g_y, g_y + n, one);
        T *g_z = one, *g_b = two;
        for (long l = last; l > 0; l--) {
            transpose(shape.in(l), C, b[l], three);
            nn(shape.out(l), shape.in(l), C, g_z, three, g_W[l], true);
            tn(shape.in(l), C, shape.out(l), W[l], g_z, g_b);
            const T *value = b[l], *gate = b_gate[l];
            each(shape.in(l), C, [=](long i, long) { g_b[i] *= slope(value[i], gate[i]); });
            std::swap(g_z, g_b);
        }
        nn(shape.out(0), shape.size, C, g_z, x_rows, g_W[0], true);
        tn(shape.size, C, shape.out(0), W[0], g_z, g_x, true);
    }

    // Inner gradients at the chunk's initial weights and the terms u of every layer (Eq. 84-93).
    void write(T* const* W) {
        const long last = shape.depth - 1;
        forward(W, chunk.k, a, a_gate, response);
        if (shape.shared_targets) {
            std::copy(chunk.v, chunk.v + shape.size * C, target);
        } else {
            respond(W, chunk.v, answer);
            unit(answer, target, scale);
        }
        T* g = grad[last];
        const T* t = target;
        each(shape.size, C, [=](long i, long) { g[i] = -t[i]; });
        if (shape.l2) {
            const T* r = response[last];
            each(shape.size, C, [=](long i, long) { g[i] += r[i]; });
            if (shape.residual()) {
                const T* key = chunk.k;
                each(shape.size, C, [=](long i, long) { g[i] += key[i]; });
            }
        }
        for (long l = last; l > 0; l--) {
            tn(shape.in(l), C, shape.out(l), W[l], grad[l], product[l]);
            const T *value = a[l], *gate = a_gate[l], *p = product[l];
            T* to = grad[l - 1];
            each(shape.in(l), C, [=](long i, long) { to[i] = p[i] * slope(value[i], gate[i]); });
        }
        for (long l = 0; l <= last; l++) {
            if (l > 0) {
                tn(C, C, shape.in(l), a[l], a[l], gram[l]);
                chunk.solve(gram[l], step[l], inverse_t[l]);
            }
            const T *r = response[l], *error = grad[l], *before = chunk.before, *s = step[l];
            const T* f = fixed[l];  // zero without an anchor
            if (anchor[l]) nn(shape.out(l), C, shape.in(l), anchor[l], a[l], fixed[l]);
            T* x = one;
            each(shape.out(l), C, [=](long i, long c) {
                x[i] = -s[c] * (error[i] + f[i] + before[c] * (r[i] - f[i]));
            });
            nn(shape.out(l), C, C, x, inverse_t[l], u[l]);
        }
    }

    // W = guard(gamma_C W + (u rest) a^T) for every layer; `row_scale` (out) may be null.
    void update(T* const* W, const T* const* bound, T* const* row_scale) {
        for (long l = 0; l < shape.depth; l++) {
            const long out = shape.out(l), in = shape.in(l);
            const T *terms = u[l], *rest = chunk.rest, total = chunk.total, *rows = chunk.k_rows;
            T *weighted = one, *w = W[l];
            each(out, C, [=](long i, long c) { weighted[i] = terms[i] * rest[c]; });
            if (l > 0) {
                transpose(in, C, a[l], two);
                rows = two;
            }
            each(1, out * in, [=](long i, long) { w[i] *= total; });
            if (const T* to = anchor[l])
                each(1, out * in, [=](long i, long) { w[i] += (1 - total) * to[i]; });
            nn(out, in, C, weighted, rows, w, true);
            for (long r = 0; r < out; r++) {
                T* row = w + r * in;
                const T norm = std::sqrt(dot(in, row, row)), limit = bound[l][r];
                // written so that a norm that is not a number stays one
                const T factor = norm <= limit ? T(1) : limit / norm;
                INDEPENDENT
                for (long j = 0; j < in; j++) {
                    const T scaled = row[j] * factor;
                    row[j] = std::abs(scaled) < T(FLUSH) ? T(0) : scaled;
                }
                if (row_scale) row_scale[l][r] = factor;
            }
        }
    }

    // o_t = M_t(q_t), every token after its own write; q and o (d, C). After `write`.
    void read_written(T* const* W, const T* q, T* o) {
        std::copy(q, q + shape.size * C, read_in[0]);
        for (long l = 0; l < shape.depth; l++) {
            const long in = shape.in(l), out = shape.out(l);
            T *raw = raw_scores[l], *score = scores[l], *y = read_out[l], *plain = read_plain[l];
            const T *mix = chunk.mix, *after = chunk.after;
            tn(C, C, in, read_in[l], a[l], raw);
            each(C, C, [=](long i, long) { score[i] = raw[i] * mix[i]; });
            nn(out, C, in, W[l], read_in[l], plain);
            T* f = read_fixed[l];
            if (anchor[l]) nn(out, C, in, anchor[l], read_in[l], f);
            each(out, C, [=](long i, long c) { y[i] = f[i] + after[c] * (plain[i] - f[i]); });
            transpose(C, C, score, square_one);
            nn(out, C, C, u[l], square_one, y, true);
            if (l + 1 < shape.depth) activate(out, y, read_in[l + 1], read_gate[l + 1]);
        }
        finish(q, read_out[shape.depth - 1], o);
    }

    void clear_gradients() {
        for (long l = 0; l < shape.depth; l++) {
            clear(g_u[l], shape.out(l) * C);
            clear(g_grad[l], shape.out(l) * C);
            if (l > 0) {
                clear(g_a[l], shape.in(l) * C);
                clear(g_step[l], C);
            }
        }
    }

    // Gradients of `read_written`, but for the weights: see `read_weights_backward`. g_q (d, C) =.
    void read_backward(T* const* W, const T* g_o, T* g_q) {
        const long last = shape.depth - 1, n = shape.size * C;
        std::copy(g_o, g_o + n, g_read[last]);
        for (long l = last; l >= 0; l--) {
            const long in = shape.in(l), out = shape.out(l);
            T *g_y = g_read[l], *g_score = square_one, *g_mix = chunk.g_mix, *g_x = two;
            const T *raw = raw_scores[l], *mix = chunk.mix, *plain = read_plain[l];
            const T* after = chunk.after;
            nn(out, C, C, g_y, scores[l], g_u[l], true);
            tn(C, C, out, g_y, u[l], g_score);
            each(C, C, [=](long i, long) {
                g_mix[i] += g_score[i] * raw[i];
                g_score[i] *= mix[i];
            });
            nn(in, C, C, read_in[l], g_score, g_a[l], true);
            transpose(C, C, g_score, square_two);
            nn(in, C, C, a[l], square_two, g_x);
            const T* f = read_fixed[l];
            T* g_f = g_fixed[l];
            sum_rows(out, C, chunk.g_after, true,
                     [=](long i, long) { return g_y[i] * (plain[i] - f[i]); });
            each(out, C, [=](long i, long c) {
                g_f[i] = g_y[i] * (1 - after[c]);
                g_y[i] *= after[c];
            });
            tn(in, C, out, W[l], g_y, g_x, true);
            if (anchor[l]) tn(in, C, out, anchor[l], g_f, g_x, true);
            if (l > 0) {
                const T *value = read_in[l], *gate = read_gate[l];
                T* to = g_read[l - 1];
                each(in, C, [=](long i, long) { to[i] = g_x[i] * slope(value[i], gate[i]); });
            } else {
                std::copy(g_x, g_x + n, g_q);
            }
        }
        if (shape.residual()) each(shape.size, C, [=](long i, long) { g_q[i] += g_o[i]; });
    }

    // The part of `read_backward` that belongs to the weights at the chunk's start.
    void read_weights_backward(T* const* g_W) {
        for (long l = 0; l < shape.depth; l++) {
            transpose(shape.in(l), C, read_in[l], one);
            nn(shape.out(l), shape.in(l), C, g_read[l], one, g_W[l], true);
            if (anchor[l]) nn(shape.out(l), shape.in(l), C, g_fixed[l], one, g_anchor[l], true);
        }
    }

    // Gradients of `write` and `update`. g_W comes in by the new weights, and goes out by the old.
    void write_backward(T* const* W, const T* const* W_new, const T* const* row_scale,
                        T* const* g_W) {
        for (long l = 0; l < shape.depth; l++) {
            guard_backward(l, W_new[l], row_scale[l], g_W[l]);
            layer_backward(l, W[l], g_W[l]);
        }
        inner_backward(W, g_W);
    }

    // y = x / sqrt(||x||^2 + 1e-6) by columns; keeps the factor.
    void unit(const T* x, T* y, T* factor) {
        sum_rows(shape.size, C, factor, false, [=](long i, long) { return x[i] * x[i]; });
        for (long c = 0; c < C; c++) factor[c] = 1 / std::sqrt(factor[c] + T(1e-6));
        each(shape.size, C, [=](long i, long c) { y[i] = x[i] * factor[c]; });
    }

    // g = gradient by x of `unit`, in place.
    void unit_backward(const T* y, const T* factor, T* g) {
        T* dots = along;
        sum_rows(shape.size, C, dots, false, [=](long i, long) { return g[i] * y[i]; });
        each(shape.size, C, [=](long i, long c) { g[i] = (g[i] - y[i] * dots[c]) * factor[c]; });
    }

   private:
    const Shape shape;
    Chunk<T>& chunk;
    const long C;
    // inputs of layers on the key path and their sigmoids; the same on the value path
    T *a[MAX_DEPTH], *a_gate[MAX_DEPTH], *response[MAX_DEPTH];
    T *b[MAX_DEPTH], *b_gate[MAX_DEPTH], *z[MAX_DEPTH];
    T *grad[MAX_DEPTH], *product[MAX_DEPTH], *u[MAX_DEPTH];
    T *gram[MAX_DEPTH], *inverse_t[MAX_DEPTH], *step[MAX_DEPTH];
    T *g_a[MAX_DEPTH], *g_response[MAX_DEPTH], *g_grad[MAX_DEPTH], *g_u[MAX_DEPTH];
    T* g_step[MAX_DEPTH];
    // token-level read-out
    T *read_in[MAX_DEPTH], *read_gate[MAX_DEPTH], *read_plain[MAX_DEPTH], *read_out[MAX_DEPTH];
    // responses of the anchors, in `write` and in the read-out
    T *fixed[MAX_DEPTH], *read_fixed[MAX_DEPTH], *g_fixed[MAX_DEPTH];
    T *scores[MAX_DEPTH], *raw_scores[MAX_DEPTH], *g_read[MAX_DEPTH];
    T *target, *answer, *scale, *along, *one, *two, *three, *square_one, *square_two;

    static inline T slope(T value, T gate) { return gate + value - value * gate; }

    // silu(z) and its sigmoid
    void activate(long rows, const T* from, T* value, T* gate) {
        sigmoid(rows * C, from, gate);
        each(rows, C, [=](long i, long) { value[i] = from[i] * gate[i]; });
    }

    // Pre-activations of every layer; `in[0]` is x.
    void forward(T* const* W, const T* x, T* const* in, T* const* gate, T* const* pre) {
        nn(shape.out(0), C, shape.size, W[0], x, pre[0]);
        for (long l = 1; l < shape.depth; l++) {
            activate(shape.in(l), pre[l - 1], in[l], gate[l]);
            nn(shape.out(l), C, shape.in(l), W[l], in[l], pre[l]);
        }
    }

    void finish(const T* x, const T* top, T* y) {
        const T share = shape.residual() ? 1 : 0;
        each(shape.size, C, [=](long i, long) { y[i] = top[i] + share * x[i]; });
    }

    // Clipped rows lose the part of the gradient along themselves: w_new = bound w / ||w||.
    void guard_backward(long l, const T* w_new, const T* row_scale, T* g_w) {
        const long in = shape.in(l);
        for (long r = 0; r < shape.out(l); r++) {
            if (row_scale[r] == 1) continue;
            T* g = g_w + r * in;
            const T* w = w_new + r * in;
            const T part = dot(in, g, w) / std::max(dot(in, w, w), T(1e-30));
            for (long j = 0; j < in; j++) g[j] = (g[j] - w[j] * part) * row_scale[r];
        }
    }

    // As _DGDWrite.backward in rules/dgd_write.py.
    void layer_backward(long l, const T* w, T* g_w) {
        const long in = shape.in(l), out = shape.out(l);
        const T *terms = u[l], *rest = chunk.rest, *before = chunk.before, *s = step[l];
        const T *error = grad[l], *r = response[l], total = chunk.total;
        T *g_weighted = one, *weighted = two, *g_x = three;
        T *g_error = g_grad[l], *g_r = g_response[l], *g_terms = g_u[l];
        const T *f = fixed[l], *to = anchor[l];
        chunk.g_total += dot(out * in, g_w, w) - (to ? dot(out * in, g_w, to) : 0);
        nn(out, C, in, g_w, a[l], g_weighted);
        sum_rows(out, C, chunk.g_rest, true, [=](long i, long) { return g_weighted[i] * terms[i]; });
        each(out, C, [=](long i, long c) {
            weighted[i] = terms[i] * rest[c];
            g_terms[i] += g_weighted[i] * rest[c];
        });
        tn(in, C, out, g_w, weighted, g_a[l], true);
        transpose(C, C, inverse_t[l], square_one);
        nn(out, C, C, g_terms, square_one, g_x);
        sum_rows(out, C, g_step[l], true,
                 [=](long i, long c) {
                     return -g_x[i] * (error[i] + f[i] + before[c] * (r[i] - f[i]));
                 });
        T* g_e = weighted;
        each(out, C, [=](long i, long c) {
            g_e[i] = -s[c] * g_x[i];
            g_error[i] += g_e[i];
            g_r[i] = g_e[i] * before[c];
        });
        sum_rows(out, C, chunk.g_before, true,
                 [=](long i, long) { return g_e[i] * (r[i] - f[i]); });
        if (to) anchor_backward(l, g_e, g_w);
        if (l == 0) {
            tn(C, C, out, g_x, terms, chunk.g_lower, true);
        } else {
            tn(C, C, out, g_x, terms, square_one);
            chunk.solve_backward(square_one, gram[l], s, g_step[l], in, a[l], g_a[l]);
        }
        each(1, out * in, [=](long i, long) { g_w[i] *= total; });
    }

    // Of the response of an anchor, and of what it adds to the weights; overwrites g_e.
    void anchor_backward(long l, T* g_e, const T* g_w) {
        const long in = shape.in(l), out = shape.out(l);
        const T *before = chunk.before, *rows = chunk.k_rows, rest = 1 - chunk.total;
        T *g_f = g_e, *g_to = g_anchor[l];
        each(out, C, [=](long i, long c) { g_f[i] *= 1 - before[c]; });
        tn(in, C, out, anchor[l], g_f, g_a[l], true);
        if (l > 0) {
            transpose(in, C, a[l], one);
            rows = one;
        }
        nn(out, in, C, g_f, rows, g_to, true);
        each(1, out * in, [=](long i, long) { g_to[i] += rest * g_w[i]; });
    }

    // From the gradients by layer responses, errors and inputs to weights, keys and values.
    void inner_backward(T* const* W, T* const* g_W) {
        const long last = shape.depth - 1;
        for (long l = 1; l <= last; l++) {
            const long in = shape.in(l);
            const T *below = g_grad[l - 1], *value = a[l], *gate = a_gate[l];
            T *p = product[l], *g_p = one;
            each(in, C, [=](long i, long) {
                p[i] *= below[i];  // now the gradient by the slope
                g_p[i] = below[i] * slope(value[i], gate[i]);
            });
            transpose(in, C, g_p, two);
            nn(shape.out(l), in, C, grad[l], two, g_W[l], true);
            nn(shape.out(l), C, in, W[l], g_p, g_grad[l], true);
        }
        const T* g_top = g_grad[last];
        if (shape.l2) {
            T *g_r = g_response[last], *g_k = chunk.g_k;
            const T share = shape.residual() ? 1 : 0;
            each(shape.size, C, [=](long i, long) {
                g_r[i] += g_top[i];
                g_k[i] += share * g_top[i];
            });
        }
        T *g_target = answer, *g_v = chunk.g_v;
        each(shape.size, C, [=](long i, long) { g_target[i] = -g_top[i]; });
        if (shape.shared_targets) {
            each(shape.size, C, [=](long i, long) { g_v[i] += g_target[i]; });
        } else {
            unit_backward(target, scale, g_target);
            respond_backward(W, chunk.v_rows, g_target, g_W, g_v);
        }
        for (long l = last; l > 0; l--) {
            const long in = shape.in(l);
            transpose(in, C, a[l], one);
            nn(shape.out(l), in, C, g_response[l], one, g_W[l], true);
            tn(in, C, shape.out(l), W[l], g_response[l], g_a[l], true);
            const T *pre = response[l - 1], *value = a[l], *gate = a_gate[l];
            const T *g_slope = product[l], *g_value = g_a[l];
            T* to = g_response[l - 1];
            each(in, C, [=](long i, long) {
                const T s = gate[i];
                const T curve = s * (1 - s) * (2 + pre[i] * (1 - 2 * s));
                to[i] += g_value[i] * slope(value[i], s) + g_slope[i] * curve;
            });
        }
        nn(shape.out(0), shape.size, C, g_response[0], chunk.k_rows, g_W[0], true);
        tn(shape.size, C, shape.out(0), W[0], g_response[0], chunk.g_k, true);
    }
};

}  // namespace memories

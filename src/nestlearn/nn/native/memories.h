// One chunk of delta gradient descent on a memory of some layers that makes its own targets, and its
// gradient (SPEC 4-5). The same computation as nn/self_write.py and rules/dgd_write.py, against which
// it is tested; the names are theirs. Tokens are columns here: (rows, C).
#pragma once

#include "chunk.h"

namespace memories {

// One memory within a chunk: weights are given layer by layer, (out, in).
template <typename T>
class Memory {
   public:
    // What retention pulls to, by layer, (out, in); null: zero. Gradients are added to g_anchor.
    const T* anchor[MAX_DEPTH] = {};
    T* g_anchor[MAX_DEPTH] = {};
    // Momentum at the chunk's start, `update` carries it on; its gradient, like that of weights.
    T *momentum[MAX_DEPTH] = {}, *g_momentum[MAX_DEPTH] = {};

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
        for (long l = 0; s.momentum && l < s.depth; l++) {
            for (T** buffer : {&v[l], &g_v[l], &carried[l], &inner[l], &read_carried[l],
                               &g_read_carried[l]})
                *buffer = arena.take(n);
            for (T** buffer : {&pairs[l], &late_scores[l]}) *buffer = arena.take(C * C);
        }
        for (T** buffer : {&target, &answer, &one, &two, &three, &four}) *buffer = arena.take(n);
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
            T* own = shape.momentum ? v[l] : u[l];
            const T *s = step[l], *error = grad[l];
            if (shape.momentum || !shape.delta)
                each(shape.out(l), C, [=](long i, long c) { own[i] = -s[c] * error[i]; });
            if (shape.delta) write_delta(l);  // else u of a momentum stays zero
        }
    }

    // W = guard(gamma_C W + (u rest) a^T) for every layer; `row_scale` (out) may be null.
    void update(T* const* W, const T* const* bound, T* const* row_scale) {
        for (long l = 0; l < shape.depth; l++) {
            const long out = shape.out(l), in = shape.in(l);
            const T *terms = u[l], *rest = chunk.rest, total = chunk.total, *rows = chunk.k_rows;
            T *weighted = one, *w = W[l];
            each(out, C, [=](long i, long c) { weighted[i] = terms[i] * rest[c]; });
            if (shape.momentum) add_late(l, weighted);
            if (l > 0) {
                transpose(in, C, a[l], two);
                rows = two;
            }
            each(1, out * in, [=](long i, long) { w[i] *= total; });
            if (const T* to = anchor[l])
                each(1, out * in, [=](long i, long) { w[i] += (1 - total) * to[i]; });
            if (shape.momentum) {
                const T gain = chunk.gain[C - 1], kept = chunk.powers[C], *powers = chunk.powers;
                const T* own = v[l];
                T *S = momentum[l], *recent = three;
                each(1, out * in, [=](long i, long) {
                    w[i] += gain * S[i];
                    S[i] *= kept;
                });
                each(out, C, [=](long i, long c) { recent[i] = own[i] * powers[C - 1 - c]; });
                nn(out, in, C, recent, rows, S, true);
            }
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
            if (shape.momentum) read_late(l);
            if (l + 1 < shape.depth) activate(out, y, read_in[l + 1], read_gate[l + 1]);
        }
        finish(q, read_out[shape.depth - 1], o);
    }

    void clear_gradients() {
        for (long l = 0; l < shape.depth; l++) {
            clear(g_u[l], shape.out(l) * C);
            clear(g_grad[l], shape.out(l) * C);
            if (shape.momentum) clear(g_v[l], shape.out(l) * C);
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
            if (shape.momentum) read_late_backward(l, g_y, g_score);
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
            if (shape.momentum) tn(in, C, out, momentum[l], g_read_carried[l], g_x, true);
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
            if (shape.momentum)
                nn(shape.out(l), shape.in(l), C, g_read_carried[l], one, g_momentum[l], true);
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
    // momentum: terms v, responses S_0 a and S_0 x, what stands in brackets in `write_delta`
    T *v[MAX_DEPTH] = {}, *g_v[MAX_DEPTH] = {}, *carried[MAX_DEPTH] = {}, *inner[MAX_DEPTH] = {};
    T *read_carried[MAX_DEPTH] = {}, *g_read_carried[MAX_DEPTH] = {};
    T *pairs[MAX_DEPTH] = {}, *late_scores[MAX_DEPTH] = {};
    T *target, *answer, *scale, *along, *one, *two, *three, *four, *square_one, *square_two;

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

    // u of a layer under the delta rule: ((I + L)^-1 x)^T.
    void write_delta(long l) {
        const long in = shape.in(l), out = shape.out(l);
        const T *r = response[l], *error = grad[l], *before = chunk.before, *s = step[l];
        const T* f = fixed[l];  // zero without an anchor
        if (anchor[l]) nn(out, C, in, anchor[l], a[l], fixed[l]);
        T* x = one;
        if (shape.momentum) {
            inner_of_momentum(l);
            const T* y = inner[l];
            each(out, C, [=](long i, long c) { x[i] = -s[c] * y[i]; });
        } else {
            each(out, C, [=](long i, long c) {
                x[i] = -s[c] * (error[i] + f[i] + before[c] * (r[i] - f[i]));
            });
        }
        nn(out, C, C, x, inverse_t[l], u[l]);
    }

    // M_{t-1} a_t but for what the terms u of the chunk add, which the inverse sees to.
    void inner_of_momentum(long l) {
        const long in = shape.in(l), out = shape.out(l);
        const T *products = gram[l], *late = chunk.late, *r = response[l], *f = fixed[l];
        T *both = pairs[l], *p = carried[l], *y = inner[l];
        for (long t = 0; t < C; t++)
            for (long c = 0; c < C; c++)
                both[t * C + c] = c < t ? products[t * C + c] * late[(t - 1) * C + c] : T(0);
        transpose(C, C, both, square_one);
        nn(out, C, C, v[l], square_one, y);
        nn(out, C, in, momentum[l], a[l], p);
        const T *before = chunk.before, *gain = chunk.gain;
        each(out, C, [=](long i, long c) {
            y[i] += f[i] + before[c] * (r[i] - f[i]) + (c ? gain[c - 1] : T(0)) * p[i];
        });
    }

    void add_late(long l, T* weighted) {
        const T *own = v[l], *rest = chunk.late + (C - 1) * C;
        each(shape.out(l), C, [=](long i, long c) { weighted[i] += own[i] * rest[c]; });
    }

    // What momentum adds to the read-out of a layer.
    void read_late(long l) {
        const long in = shape.in(l), out = shape.out(l);
        const T *raw = raw_scores[l], *late = chunk.late, *gain = chunk.gain;
        T *score = late_scores[l], *y = read_out[l], *p = read_carried[l];
        each(C, C, [=](long i, long) { score[i] = raw[i] * late[i]; });
        transpose(C, C, score, square_one);
        nn(out, C, C, v[l], square_one, y, true);
        nn(out, C, in, momentum[l], read_in[l], p);
        each(out, C, [=](long i, long c) { y[i] += gain[c] * p[i]; });
    }

    // Gradients of `read_late`, but for the momentum's and the inputs': g_scores +=.
    void read_late_backward(long l, const T* g_y, T* g_scores) {
        const long out = shape.out(l);
        const T *raw = raw_scores[l], *late = chunk.late, *gain = chunk.gain;
        const T* p = read_carried[l];
        T *g_late = chunk.g_late, *g_score = square_two, *g_p = g_read_carried[l];
        nn(out, C, C, g_y, late_scores[l], g_v[l], true);
        tn(C, C, out, g_y, v[l], g_score);
        each(C, C, [=](long i, long) {
            g_late[i] += g_score[i] * raw[i];
            g_scores[i] += g_score[i] * late[i];
        });
        sum_rows(out, C, chunk.g_gain, true, [=](long i, long) { return g_y[i] * p[i]; });
        each(out, C, [=](long i, long c) { g_p[i] = g_y[i] * gain[c]; });
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

    // As _DGDWrite.backward in rules/dgd_write.py, and what momentum adds.
    void layer_backward(long l, const T* w, T* g_w) {
        const long in = shape.in(l), out = shape.out(l);
        const T *terms = u[l], *rest = chunk.rest, *s = step[l], *error = grad[l];
        const T *to = anchor[l], total = chunk.total;
        T *g_weighted = one, *weighted = two, *g_x = three, *g_terms = g_u[l];
        chunk.g_total += dot(out * in, g_w, w) - (to ? dot(out * in, g_w, to) : 0);
        nn(out, C, in, g_w, a[l], g_weighted);
        sum_rows(out, C, chunk.g_rest, true, [=](long i, long) { return g_weighted[i] * terms[i]; });
        each(out, C, [=](long i, long c) {
            weighted[i] = terms[i] * rest[c];
            g_terms[i] += g_weighted[i] * rest[c];
        });
        if (shape.momentum) {
            add_late(l, weighted);
            carry_backward(l, g_w, g_weighted);
        }
        tn(in, C, out, g_w, weighted, g_a[l], true);
        const T* more = nullptr;
        if (shape.delta) {
            transpose(C, C, inverse_t[l], square_one);
            nn(out, C, C, g_terms, square_one, g_x);
            if (shape.momentum) more = inner_backward_of_momentum(l, g_x);
            delta_backward(l, g_x, g_w);
        } else {
            clear(g_response[l], out * C);
        }
        if (shape.momentum || !shape.delta) {
            const T* g_own = shape.momentum ? g_v[l] : g_u[l];
            T* g_error = g_grad[l];
            sum_rows(out, C, g_step[l], true,
                     [=](long i, long) { return -g_own[i] * error[i]; });
            each(out, C, [=](long i, long c) { g_error[i] -= s[c] * g_own[i]; });
        }
        if (to) {
            const T left = 1 - total;
            T* g_to = g_anchor[l];
            each(1, out * in, [=](long i, long) { g_to[i] += left * g_w[i]; });
        }
        if (l == 0) {
            if (shape.delta) tn(C, C, out, g_x, terms, chunk.g_lower, true);
        } else {
            if (shape.delta)
                tn(C, C, out, g_x, terms, square_one);
            else
                clear(square_one, C * C);
            chunk.solve_backward(square_one, gram[l], more, s, g_step[l], in, a[l], g_a[l]);
        }
        each(1, out * in, [=](long i, long) { g_w[i] *= total; });
    }

    // Of x in `write_delta`: errors, responses, steps and anchors. Overwrites `one` and `two`.
    void delta_backward(long l, const T* g_x, const T* g_w) {
        const long out = shape.out(l);
        const T *before = chunk.before, *s = step[l], *error = grad[l], *r = response[l];
        const T *f = fixed[l], *y = inner[l];
        T *g_e = two, *g_error = g_grad[l], *g_r = g_response[l];
        if (shape.momentum) {
            sum_rows(out, C, g_step[l], true, [=](long i, long) { return -g_x[i] * y[i]; });
            each(out, C, [=](long i, long c) {
                g_e[i] = -s[c] * g_x[i];
                g_r[i] = g_e[i] * before[c];
            });
        } else {
            sum_rows(out, C, g_step[l], true, [=](long i, long c) {
                return -g_x[i] * (error[i] + f[i] + before[c] * (r[i] - f[i]));
            });
            each(out, C, [=](long i, long c) {
                g_e[i] = -s[c] * g_x[i];
                g_error[i] += g_e[i];
                g_r[i] = g_e[i] * before[c];
            });
        }
        sum_rows(out, C, chunk.g_before, true,
                 [=](long i, long) { return g_e[i] * (r[i] - f[i]); });
        if (anchor[l]) anchor_backward(l, g_e);
    }

    // Of the response of an anchor; overwrites g_e.
    void anchor_backward(long l, T* g_e) {
        const long in = shape.in(l), out = shape.out(l);
        const T* before = chunk.before;
        T* g_f = g_e;
        each(out, C, [=](long i, long c) { g_f[i] *= 1 - before[c]; });
        tn(in, C, out, anchor[l], g_f, g_a[l], true);
        nn(out, in, C, g_f, input_rows(l), g_anchor[l], true);
    }

    // Inputs of a layer with tokens as rows, (C, in); those of hidden layers lie in `one`.
    const T* input_rows(long l) {
        if (l == 0) return chunk.k_rows;
        transpose(shape.in(l), C, a[l], one);
        return one;
    }

    // Of what `update` does with momentum; g_momentum goes from the new one to the old.
    void carry_backward(long l, const T* g_w, const T* g_weighted) {
        const long in = shape.in(l), out = shape.out(l);
        const T *own = v[l], *S = momentum[l], *powers = chunk.powers;
        const T *rest = chunk.late + (C - 1) * C, gain = chunk.gain[C - 1], kept = powers[C];
        T *g_S = g_momentum[l], *g_own = g_v[l], *g_recent = four, *dots = along;
        sum_rows(out, C, chunk.g_late + (C - 1) * C, true,
                 [=](long i, long) { return g_weighted[i] * own[i]; });
        chunk.g_gain[C - 1] += dot(out * in, g_w, S);
        chunk.g_powers[C] += dot(out * in, g_S, S);
        nn(out, C, in, g_S, a[l], g_recent);
        sum_rows(out, C, dots, false, [=](long i, long) { return g_recent[i] * own[i]; });
        for (long c = 0; c < C; c++) chunk.g_powers[C - 1 - c] += dots[c];
        T* recent = four;
        each(out, C, [=](long i, long c) {
            g_own[i] += g_weighted[i] * rest[c] + g_recent[i] * powers[C - 1 - c];
            recent[i] = own[i] * powers[C - 1 - c];
        });
        tn(in, C, out, g_S, recent, g_a[l], true);
        each(1, out * in, [=](long i, long) { g_S[i] = kept * g_S[i] + gain * g_w[i]; });
    }

    // Gradients of `inner_of_momentum`, but for responses and anchors. Returns that of the
    // products of the inputs, or adds it to the chunk's where all memories share them.
    const T* inner_backward_of_momentum(long l, const T* g_x) {
        const long in = shape.in(l), out = shape.out(l);
        const T *s = step[l], *p = carried[l], *products = gram[l], *late = chunk.late;
        const T* gain = chunk.gain;
        T *g_y = two, *g_p = four, *g_both = square_one, *dots = along;
        T *g_products = l == 0 ? chunk.g_gram : square_two, *g_late = chunk.g_late;
        each(out, C, [=](long i, long c) {
            g_y[i] = -s[c] * g_x[i];
            g_p[i] = (c ? gain[c - 1] : T(0)) * g_y[i];
        });
        sum_rows(out, C, dots, false, [=](long i, long) { return g_y[i] * p[i]; });
        for (long c = 1; c < C; c++) chunk.g_gain[c - 1] += dots[c];
        nn(out, C, C, g_y, pairs[l], g_v[l], true);
        tn(C, C, out, g_y, v[l], g_both);
        for (long t = 0; t < C; t++) {
            const T *g = g_both + t * C, *pair = products + t * C, *before = late + (t - 1) * C;
            T *to = g_products + t * C, *g_before = g_late + (t - 1) * C;
            if (l > 0) clear(to, C);
            INDEPENDENT
            for (long c = 0; c < t; c++) {
                g_before[c] += g[c] * pair[c];
                to[c] += g[c] * before[c];
            }
        }
        tn(in, C, out, momentum[l], g_p, g_a[l], true);
        nn(out, in, C, g_p, input_rows(l), g_momentum[l], true);
        return g_products;
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

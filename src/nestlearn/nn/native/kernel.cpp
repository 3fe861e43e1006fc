// Whole sequences of chunks through self-modifying memories, forward and backward, one head of one
// batch row at a time: `forward_f32`, `backward_f32` and their float64 twins, called by kernel.py.
//
// Forward keeps the weights at every chunk's start and nothing else; backward computes a chunk again
// from them, which is cheaper than writing its intermediate results to memory and reading them back.
#include <atomic>

#include "memories.h"

namespace {

using namespace memories;

enum Role { KEY, VALUE, QUERY, ETA, ALPHA, ROLES };
constexpr int VECTORS = ETA;
// Which x the memory of a role reads: eta and alpha have none of their own.
constexpr int source_of(int role) { return role < VECTORS ? role : VALUE; }

// Mirrored by _Problem in kernel.py. Arrays have a leading axis of units = batch x heads; T is the
// number of tokens, chunks x C. A null pointer is "not wanted".
struct Problem {
    int64_t units, heads, count, size, hidden, depth, chunk, chunks;
    int64_t l2, token, projections, anchored, shared_targets, truncate, delta, momentum;
    int64_t memory_of[ROLES];  // the memory that generates a role; -1: the role is given
    double eta_max, threshold;  // eta = eta_max max(0, gate - threshold) / (1 - threshold)
    std::atomic<int64_t> next;  // unit that no thread has taken yet
    void* weights[MAX_DEPTH];      // per layer (units, N, out, in): the state, updated in place
    void* initial[MAX_DEPTH];      // (heads, N, out, in): the state before the first token
    void* bounds[MAX_DEPTH];       // (heads, N, out)
    void* trajectory[MAX_DEPTH];   // (units, chunks, N, out, in): at every chunk's start
    void* row_scales[MAX_DEPTH];   // (units, chunks, N, out)
    void* momenta[MAX_DEPTH];      // like weights
    void* momenta_trajectory[MAX_DEPTH];
    void* decay;                   // (heads): of momenta
    void* x[VECTORS];              // (units, T, d), what memories read to generate k, v, q
    void* roles[ROLES];            // (units, T, d) or (units, T): given, or generated
    void* out;                     // (units, T, d), read-out
    void* readout[2];              // (heads, d): eta, alpha
    void* bias[2];                 // (heads)
    void* g_weights[MAX_DEPTH];    // in: by the last state; out: by the first
    void* g_initial[MAX_DEPTH];    // (units, N, out, in)
    void* g_momenta[MAX_DEPTH];    // like g_weights
    void* g_decay;                 // (units)
    void* g_x[VECTORS];
    void* g_roles[ROLES];          // generated roles: in; given roles: out
    void* g_out;
    void* g_readout[2];            // (units, d)
    void* g_bias[2];               // (units)
};

template <typename T>
class Unit {
   public:
    explicit Unit(Problem& problem)
        : p(problem),
          shape{p.size, p.hidden, p.depth, p.chunk, p.l2 != 0, p.shared_targets != 0,
                p.delta != 0, p.momentum != 0},
          C(p.chunk), d(p.size), vector(d * C),
          chunk(shape, arena), memory(shape, chunk, arena) {
        for (T** buffer : {&x, &y, &g_y, &g_out}) *buffer = arena.take(vector);
        for (T*& buffer : g_x) buffer = arena.take(vector);
        for (int r = 0; r < ROLES; r++) {
            generator[r] = p.memory_of[r];
            g_role[r] = arena.take(vector);
        }
        for (long l = 0; l < p.depth; l++) elements[l] = shape.out(l) * shape.in(l);
    }

    void forward(long unit) {
        T* W[MAX_DEPTH];
        for (long i = 0; i < p.chunks; i++) {
            for (long l = 0; l < p.depth; l++) {
                const size_t bytes = p.count * elements[l] * sizeof(T);
                if (p.trajectory[l])
                    std::memcpy(start(p.trajectory, l, unit, i, 0), weight(p.weights, l, unit, 0),
                                bytes);
                if (p.momentum && p.momenta_trajectory[l])
                    std::memcpy(start(p.momenta_trajectory, l, unit, i, 0),
                                weight(p.momenta, l, unit, 0), bytes);
            }
            if (p.projections) generate(unit, i);
            prepare(unit, i);
            for (long n = 0; n < p.count; n++) {
                const T* limit[MAX_DEPTH];
                T* scale[MAX_DEPTH];
                for (long l = 0; l < p.depth; l++) {
                    W[l] = weight(p.weights, l, unit, n);
                    limit[l] = at(p.bounds[l], ((unit % p.heads) * p.count + n) * shape.out(l));
                    scale[l] = row_scale(l, unit, i, n);
                    if (p.momentum) memory.momentum[l] = weight(p.momenta, l, unit, n);
                }
                anchor(unit, n);
                memory.write(W);
                if (p.out) {
                    transpose(C, d, token(p.roles[QUERY], unit, i, d), x);
                    if (p.token)
                        memory.read_written(W, x, y);
                    else
                        memory.respond(W, x, y);
                    transpose(d, C, y, token(p.out, unit, i, d));
                }
                memory.update(W, limit, p.row_scales[0] ? &scale[0] : nullptr);
            }
        }
    }

    void backward(long unit) {
        for (long i = p.chunks - 1; i >= 0; i--) {
            prepare(unit, i);
            chunk.clear_gradients();
            for (long n = 0; n < p.count; n++) write_backward(unit, i, n);
            chunk.solve_backward(chunk.g_lower, chunk.gram, p.momentum ? chunk.g_gram : nullptr,
                                 chunk.step, chunk.g_step, d, chunk.k, chunk.g_k);
            const T* retention = token(p.roles[ALPHA], unit, i, 1);
            chunk.retention_backward(retention, g_role[ALPHA]);
            if (p.momentum)
                *at(p.g_decay, unit) += chunk.momentum_backward(retention, g_role[ALPHA]);
            std::copy(chunk.g_eta, chunk.g_eta + C, g_role[ETA]);
            hand_out(unit, i);
            if (p.projections) generate_backward(unit, i);
            if (p.truncate) cut(unit);
        }
    }

   private:
    Problem& p;
    const Shape shape;
    const long C, d, vector;
    Arena<T> arena;
    Chunk<T> chunk;
    Memory<T> memory;
    long generator[ROLES], elements[MAX_DEPTH];
    T *x, *y, *g_y, *g_out, *g_x[VECTORS], *g_role[ROLES];

    static T* at(void* base, long offset) { return static_cast<T*>(base) + offset; }
    T* token(void* base, long unit, long i, long width) const {
        return at(base, (unit * p.chunks + i) * C * width);
    }
    T* weight(void* const* base, long l, long unit, long n) const {
        return at(base[l], (unit * p.count + n) * elements[l]);
    }
    T* start(void* const* base, long l, long unit, long i, long n) const {
        return at(base[l], ((unit * p.chunks + i) * p.count + n) * elements[l]);
    }
    T* row_scale(long l, long unit, long i, long n) const {
        return p.row_scales[l]
                   ? at(p.row_scales[l], ((unit * p.chunks + i) * p.count + n) * shape.out(l))
                   : nullptr;
    }

    void anchor(long unit, long n) {
        if (!p.anchored) return;
        for (long l = 0; l < p.depth; l++) {
            memory.anchor[l] = at(p.initial[l], ((unit % p.heads) * p.count + n) * elements[l]);
            if (p.g_initial[l]) memory.g_anchor[l] = weight(p.g_initial, l, unit, n);
        }
    }

    // A chunk's start is the initial state plus a constant: its gradient goes no further.
    void cut(long unit) {
        for (long l = 0; l < p.depth; l++) {
            T *from = weight(p.g_weights, l, unit, 0), *to = weight(p.g_initial, l, unit, 0);
            each(1, p.count * elements[l], [=](long i, long) { to[i] += from[i]; });
            clear(from, p.count * elements[l]);
        }
    }

    void prepare(long unit, long i) {
        chunk.prepare(token(p.roles[KEY], unit, i, d), token(p.roles[VALUE], unit, i, d),
                      token(p.roles[ETA], unit, i, 1), token(p.roles[ALPHA], unit, i, 1),
                      p.momentum ? at(p.decay, unit % p.heads) : nullptr);
    }

    // The memories' answers to x, by role (Eq. 84, 86): unit vectors and gates.
    void generate(long unit, long i) {
        for (int role = 0; role < ROLES; role++) {
            if (generator[role] < 0) continue;
            transpose(C, d, token(p.x[source_of(role)], unit, i, d), x);
            T* W[MAX_DEPTH];
            for (long l = 0; l < p.depth; l++)
                W[l] = weight(p.weights, l, unit, generator[role]);
            memory.respond(W, x, y);
            if (role < ETA) {
                memory.unit(y, g_y, g_out);
                transpose(d, C, g_y, token(p.roles[role], unit, i, d));
                continue;
            }
            T* gate = token(p.roles[role], unit, i, 1);
            open(role, unit, gate);
            if (role != ETA) continue;
            const T shut = p.threshold, most = T(p.eta_max) / (1 - shut);
            for (long t = 0; t < C; t++) gate[t] = most * std::max(T(0), gate[t] - shut);
        }
    }

    // Gates, in (0, 1), of a chunk from what the memory of a scalar role answered (y).
    void open(int role, long unit, T* gate) {
        const long head = unit % p.heads;
        const T bias = *at(p.bias[role - ETA], head);
        gemm(1, C, d, at(p.readout[role - ETA], head * d), 0, 1, y, C, gate, C, false);
        for (long t = 0; t < C; t++) gate[t] += bias;
        sigmoid(C, gate, gate);
    }

    void write_backward(long unit, long i, long n) {
        T *W[MAX_DEPTH], *g_W[MAX_DEPTH], *scale[MAX_DEPTH];
        const T* next[MAX_DEPTH];
        for (long l = 0; l < p.depth; l++) {
            W[l] = start(p.trajectory, l, unit, i, n);
            next[l] = i + 1 < p.chunks ? start(p.trajectory, l, unit, i + 1, n)
                                       : weight(p.weights, l, unit, n);
            g_W[l] = weight(p.g_weights, l, unit, n);
            scale[l] = row_scale(l, unit, i, n);
            if (!p.momentum) continue;
            memory.momentum[l] = start(p.momenta_trajectory, l, unit, i, n);
            memory.g_momentum[l] = weight(p.g_momenta, l, unit, n);
        }
        anchor(unit, n);
        memory.clear_gradients();
        memory.write(W);
        if (p.out) {
            transpose(C, d, token(p.roles[QUERY], unit, i, d), x);
            transpose(C, d, token(p.g_out, unit, i, d), g_y);
            if (p.token) {
                memory.read_written(W, x, y);
                memory.read_backward(W, g_y, g_role[QUERY]);
            }
        }
        memory.write_backward(W, next, scale, g_W);
        if (!p.out) return;
        if (p.token) {
            memory.read_weights_backward(g_W);
        } else {
            clear(g_role[QUERY], vector);
            memory.respond(W, x, y);
            memory.respond_backward(W, token(p.roles[QUERY], unit, i, d), g_y, g_W,
                                    g_role[QUERY]);
        }
    }

    // Gradients of given roles go out; those of generated roles are joined by what came in.
    void hand_out(long unit, long i) {
        std::copy(chunk.g_k, chunk.g_k + vector, g_role[KEY]);
        std::copy(chunk.g_v, chunk.g_v + vector, g_role[VALUE]);
        // Inside the recurrence a closed gate has the exact gradient, none: see nn/gates.py.
        if (generator[ETA] >= 0 && p.threshold > 0) {
            const T* eta = token(p.roles[ETA], unit, i, 1);
            for (long t = 0; t < C; t++)
                if (eta[t] == 0) g_role[ETA][t] = 0;
        }
        for (int role = 0; role < ROLES; role++) {
            const long width = role < ETA ? d : 1;
            if (!p.g_roles[role]) continue;
            T* outside = token(p.g_roles[role], unit, i, width);
            if (generator[role] < 0) {
                transpose(width, C, g_role[role], outside);
                continue;
            }
            transpose(C, width, outside, g_out);
            T *g = g_role[role], *more = g_out;
            if (role == QUERY) clear(g, vector);  // no memory of this group is read with it
            each(width, C, [=](long j, long) { g[j] += more[j]; });
        }
    }

    void generate_backward(long unit, long i) {
        const long head = unit % p.heads;
        for (T* g : g_x) clear(g, vector);
        for (int role = 0; role < ROLES; role++) {
            if (generator[role] < 0) continue;
            T* rows = token(p.x[source_of(role)], unit, i, d);
            transpose(C, d, rows, x);
            T *W[MAX_DEPTH], *g_W[MAX_DEPTH], *g = g_role[role];
            for (long l = 0; l < p.depth; l++) {
                W[l] = start(p.trajectory, l, unit, i, generator[role]);
                g_W[l] = weight(p.g_weights, l, unit, generator[role]);
            }
            memory.respond(W, x, y);
            if (role < ETA) {
                T* factor = chunk.g_after;  // free by now
                memory.unit(y, g_y, factor);
                memory.unit_backward(g_y, factor, g);
            } else {
                // The gate itself: of a token that wrote nothing the role does not tell it.
                const T most = role == ETA ? T(p.eta_max) / (1 - T(p.threshold)) : T(1);
                T *raw = chunk.g_before, *g_readout = at(p.g_readout[role - ETA], unit * d);
                open(role, unit, raw);
                for (long t = 0; t < C; t++) {
                    raw[t] = g[t] * most * raw[t] * (1 - raw[t]);
                    *at(p.g_bias[role - ETA], unit) += raw[t];
                }
                const T* readout = at(p.readout[role - ETA], head * d);
                for (long r = 0; r < d; r++) {
                    g_readout[r] += dot(C, y + r * C, raw);
                    for (long t = 0; t < C; t++) g[r * C + t] = readout[r] * raw[t];
                }
            }
            memory.respond_backward(W, rows, g, g_W, g_x[source_of(role)]);
        }
        for (int s = 0; s < VECTORS; s++)
            if (p.g_x[s]) transpose(d, C, g_x[s], token(p.g_x[s], unit, i, d));
    }
};

// Any number of threads may run this at once on one problem: each takes the next unit.
template <typename T>
void work(Problem& p, bool back) {
    const NoDenormals guard;
    Unit<T> unit(p);
    for (long i = p.next++; i < p.units; i = p.next++) back ? unit.backward(i) : unit.forward(i);
}

}  // namespace

extern "C" {
int64_t problem_size() { return sizeof(Problem); }
void forward_f32(Problem* p) { work<float>(*p, false); }
void backward_f32(Problem* p) { work<float>(*p, true); }
void forward_f64(Problem* p) { work<double>(*p, false); }
void backward_f64(Problem* p) { work<double>(*p, true); }
}

// A decoder layer for few rows, in two calls around its attention: what comes before it (norm, queries, keys and values,
// rotation) and what follows (output projection, residual, norm, gated MLP, residual). One call wakes the threads once;
// they meet at barriers, where a layer of separate operations would start them anew a dozen times.
//
// Every row of x is computed in one order, whatever M and the number of threads are.
// Shapes: M rows, C hidden size, I inner size of the MLP, D elements of a head.
#include <exception>
#include <vector>

#include "linear.h"
#include "simd.h"

// Mirrored in kernels/layer/native.py.
struct kva_norm {
    const float* weight;  // of RMSNorm, or null: no norm
    float eps;
};

struct kva_layer {
    kva_linear q, k, v, o, gate, up, down;
    kva_norm input_norm, output_norm;  // [C], before the attention and before the MLP
    kva_norm query_norm, key_norm;     // [D], of every head before its rotation
    int32_t query_heads, kv_heads, head_dim;
};

namespace KVA_ISA {
namespace {

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
void norm_row(const kva_norm& norm, const float* x, float* y, int64_t n) {
    vf sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * VF <= n; i += 4 * VF)
        for (int s = 0; s < 4; s++) {
            const vf part = load(x + i + s * VF);
            sums[s] = fma(part, part, sums[s]);
        }
    for (; i < n; i += VF) {
        const vf part = load_part(x + i, int(n - i < VF ? n - i : VF));
        sums[0] = fma(part, part, sums[0]);
    }
    const float mean = hsum((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(n);
    const float factor = 1.0f / std::sqrt(mean + norm.eps);
    for (i = 0; i + VF <= n; i += VF) store(y + i, load(x + i) * factor * load(norm.weight + i));
    for (; i < n; i++) y[i] = x[i] * factor * norm.weight[i];
}

// Rotates the halves of a head: (a, b) -> (a cos - b sin, b cos + a sin); cos and sin have all D elements.
void rotate_head(float* head, const float* cos, const float* sin, int D) {
    const int half = D / 2;
    int i = 0;
    for (; i + VF <= half; i += VF) {
        const vf a = load(head + i), b = load(head + half + i);
        store(head + i, a * load(cos + i) - b * load(sin + i));
        store(head + half + i, b * load(cos + half + i) + a * load(sin + half + i));
    }
    for (; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[half + i] + a * sin[half + i];
    }
}

KVA_INLINE vf silu(vf x) { return x / (1.0f + exp2(vmin(x * -1.44269504f, set1(126.0f)))); }

// gate = silu(gate) * up
void silu_mul(float* gate, const float* up, int64_t n) {
    int64_t i = 0;
    for (; i + VF <= n; i += VF) store(gate + i, silu(load(gate + i)) * load(up + i));
    for (; i < n; i++) gate[i] = silu(set1(gate[i]))[0] * up[i];
}

void add(float* y, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

// This thread's share of `heads` heads of each of M rows.
void turn_heads(const kva_norm& norm, float* rows, int heads, int D, const float* cos, const float* sin, int64_t M,
                Team team) {
    for (int64_t i = team.begin(M * heads); i < team.end(M * heads); i++) {
        float* head = rows + i * D;
        if (norm.weight) norm_row(norm, head, head, D);
        rotate_head(head, cos + i / heads * D, sin + i / heads * D, D);
    }
}

void turn(const kva_layer& a, float* q, float* k, const float* cos, const float* sin, int64_t M, Team team) {
    turn_heads(a.query_norm, q, a.query_heads, a.head_dim, cos, sin, M, team);
    turn_heads(a.key_norm, k, a.kv_heads, a.head_dim, cos, sin, M, team);
}

int64_t bytes(const kva_linear& a) { return a.num_outputs * linear_row_bytes(a); }

// Room for intermediate results, or null. It stays with the calling thread, as fresh memory would cost a page fault per 4 KiB.
float* scratch(int64_t floats) {
    thread_local std::vector<float> room;
    try {
        if (int64_t(room.size()) < floats) room.resize(floats);
    } catch (const std::exception&) {  // none may leave through the C ABI
        return nullptr;
    }
    return room.data();
}

bool fits(const kva_layer& a) {
    const int64_t C = a.q.num_inputs, I = a.gate.num_outputs, D = a.head_dim;
    return D > 0 && D % 2 == 0 && a.q.num_outputs == a.query_heads * D && a.k.num_outputs == a.kv_heads * D &&
           a.v.num_outputs == a.k.num_outputs && a.k.num_inputs == C && a.v.num_inputs == C && a.o.num_outputs == C &&
           a.gate.num_inputs == C && a.up.num_inputs == C && a.up.num_outputs == I && a.down.num_inputs == I &&
           a.down.num_outputs == C;
}

bool known(const kva_layer& a) {
    for (const kva_linear* each : {&a.q, &a.k, &a.v, &a.o, &a.gate, &a.up, &a.down})
        if (each->format < KVA_FP32 || each->format > KVA_INT8) return false;
    return true;
}

int refusal(const kva_layer& a, int32_t M) {
    return M < 0 || M > MAX_ROWS || !fits(a) ? KVA_ESHAPE : known(a) ? KVA_OK : KVA_EFORMAT;
}

}  // namespace
}  // namespace KVA_ISA

// q [M, Hq, D], k and v [M, H, D] of x [M, C], the first two rotated by cos and sin [M, D]; at most 32 rows.
KVA_EXPORT(kva_layer_queries)(const kva_layer* a, const float* x, const float* cos, const float* sin, float* q, float* k,
                              float* v, int32_t M, int32_t threads) {
    using namespace KVA_ISA;
    if (const int code = refusal(*a, M)) return code;
    const int64_t C = a->q.num_inputs;
    if (M == 0) return KVA_OK;
    float* const normed = scratch(M * C);
    if (!normed) return KVA_EMEMORY;
    together(worthwhile(bytes(a->q) + bytes(a->k) + bytes(a->v), threads), [&](Team team) {
        for (int64_t m = team.begin(M); m < team.end(M); m++) norm_row(a->input_norm, x + m * C, normed + m * C, C);
        team.wait();
        const auto product = [&](const kva_linear& linear, float* y) {
            share_rows(linear, team, [&](int64_t n, int64_t end) { linear_rows(linear, normed, y, M, n, end); });
        };
        product(a->q, q);
        product(a->k, k);
        product(a->v, v);
        team.wait();
        turn(*a, q, k, cos, sin, M, team);
    });
    return KVA_OK;
}

// y [M, C], the layer's output, of its input x and what its queries read, attended [M, Hq * D]; at most 32 rows.
KVA_EXPORT(kva_layer_output)(const kva_layer* a, const float* x, const float* attended, float* y, int32_t M,
                             int32_t threads) {
    using namespace KVA_ISA;
    if (const int code = refusal(*a, M)) return code;
    if (a->o.num_inputs != a->q.num_outputs) return KVA_ESHAPE;
    const int64_t C = a->q.num_inputs, I = a->gate.num_outputs;
    if (M == 0) return KVA_OK;
    float* const normed = scratch(2 * M * (C + I));
    if (!normed) return KVA_EMEMORY;
    float *part = normed + M * C, *gate = part + M * C, *up = gate + M * I;
    const int64_t read = bytes(a->o) + bytes(a->gate) + bytes(a->up) + bytes(a->down);
    together(worthwhile(read, threads), [&](Team team) {
        share_rows(a->o, team, [&](int64_t n, int64_t end) {
            linear_rows(a->o, attended, y, M, n, end);
            for (int64_t m = 0; m < M; m++) add(y + m * C + n, x + m * C + n, end - n);
        });
        team.wait();
        for (int64_t m = team.begin(M); m < team.end(M); m++) norm_row(a->output_norm, y + m * C, normed + m * C, C);
        team.wait();
        share_rows(a->gate, team, [&](int64_t n, int64_t end) {
            linear_rows(a->gate, normed, gate, M, n, end);
            linear_rows(a->up, normed, up, M, n, end);
            for (int64_t m = 0; m < M; m++) silu_mul(gate + m * I + n, up + m * I + n, end - n);
        });
        team.wait();
        share_rows(a->down, team, [&](int64_t n, int64_t end) {
            linear_rows(a->down, gate, part, M, n, end);
            for (int64_t m = 0; m < M; m++) add(y + m * C + n, part + m * C + n, end - n);
        });
    });
    return KVA_OK;
}

// What a layer of many rows needs beside its products.

// y = norm(x), M rows of n elements.
KVA_EXPORT(kva_norm_rows)(const kva_norm* norm, const float* x, float* y, int64_t M, int64_t n, int32_t threads) {
    using namespace KVA_ISA;
    together(worthwhile(M * n * sizeof(float), threads), [&](Team team) {
        for (int64_t m = team.begin(M); m < team.end(M); m++) norm_row(*norm, x + m * n, y + m * n, n);
    });
    return KVA_OK;
}

// Norms and rotates q [M, Hq, D] and k [M, H, D] in place.
KVA_EXPORT(kva_turn_heads)(const kva_layer* a, float* q, float* k, const float* cos, const float* sin, int64_t M,
                           int32_t threads) {
    using namespace KVA_ISA;
    if (!fits(*a)) return KVA_ESHAPE;
    together(worthwhile(M * a->q.num_outputs * sizeof(float), threads),
             [&](Team team) { turn(*a, q, k, cos, sin, M, team); });
    return KVA_OK;
}

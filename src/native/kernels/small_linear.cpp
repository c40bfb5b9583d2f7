// y = x W^T + b for few rows of x, where reading W is what takes the time.
//
// W lies as torch keeps it, [N, K] row by row, in float32, bfloat16, float16, or int8 with one scale per row. Outputs are
// dot products: MT rows of x times NT rows of W are accumulated at once in vectors along K, so that each number of W is
// converted once for MT rows. Every output is summed in one order, whatever M and the number of threads are: a row of x
// gives the same bits alone and in company.
#include "linear.h"
#include "simd.h"

namespace KVA_ISA {
namespace {

#if defined(KVA_ISA_avx512)
constexpr int TILE = 6;  // most rows of x at once: 6 x 4 accumulators, 6 of x and 1 of W fill 31 of 32 registers
#else
constexpr int TILE = 3;  // 3 x 4 accumulators, 3 of x and 1 of W: all 16 registers
#endif
// One or two rows of x leave registers free for more rows of W: more reads at once, and vectors of x are used more often.
constexpr bool narrow(int rows) { return VF == 16 && rows <= 2; }
constexpr int companions(int rows) { return narrow(rows) ? 8 : 4; }

constexpr int64_t STEP_BYTES = 1 << 17;   // of W, taken by one thread at a time: in the L2 cache for all tiles
constexpr int64_t AHEAD_BYTES = 1 << 16;  // prefetch distance, of which a memory's latency covers half

template <int FORMAT>
struct Weights;
template <>
struct Weights<KVA_FP32> {
    typedef vf raw;
    static KVA_INLINE vf floats(raw r) { return r; }
};
template <>
struct Weights<KVA_BF16> {
    typedef vh raw;
    static KVA_INLINE vf floats(raw r) { return from_bf16(r); }
};
template <>
struct Weights<KVA_FP16> {
    typedef vh raw;
    static KVA_INLINE vf floats(raw r) { return from_fp16(r); }
};
template <>
struct Weights<KVA_INT8> {
    typedef vb raw;
    static KVA_INLINE vf floats(raw r) { return from_int8(r); }
};

template <int F>
constexpr int64_t element() {
    return sizeof(typename Weights<F>::raw) / VF;
}

// Vectors of a row read in turn. Where there are registers for it, a cache line: rows whose distance is a power of two
// evict each other from the L1 cache, so a line is best read whole.
template <int F, int MT>
constexpr int steps() {
    return narrow(MT) ? int(64 / (VF * element<F>())) : 1;
}

template <int F, int MT, int NT, int STEPS>
KVA_INLINE void columns(const uint8_t* w, int64_t w_row, int64_t ahead, const float* x, int64_t x_row,
                        vf (&acc)[MT][NT]) {
    typedef typename Weights<F>::raw raw;
    vf xs[STEPS][MT];
    for (int s = 0; s < STEPS; s++)
        for (int m = 0; m < MT; m++) xs[s][m] = load(x + m * x_row + s * VF);
    for (int n = 0; n < NT; n++) {
        const uint8_t* p = w + n * w_row;
        __builtin_prefetch(p + ahead, 0, 2);
        for (int s = 0; s < STEPS; s++) {
            const vf ws = Weights<F>::floats(load_as<raw>(p + s * int64_t(sizeof(raw))));
            for (int m = 0; m < MT; m++) acc[m][n] = fma(xs[s][m], ws, acc[m][n]);
        }
    }
}

// acc[m][n] += x[m] * w[n] over K columns.
template <int F, int MT, int NT>
KVA_INLINE void accumulate(const uint8_t* w, int64_t w_row, int64_t ahead, const float* x, int64_t K,
                           vf (&acc)[MT][NT]) {
    typedef typename Weights<F>::raw raw;
    constexpr int STEPS = steps<F, MT>();
    int64_t k = 0;
    for (; k + STEPS * VF <= K; k += STEPS * VF)
        columns<F, MT, NT, STEPS>(w + k * element<F>(), w_row, ahead, x + k, K, acc);
    for (; k + VF <= K; k += VF) columns<F, MT, NT, 1>(w + k * element<F>(), w_row, ahead, x + k, K, acc);
    if (const int rest = int(K - k)) {
        for (int n = 0; n < NT; n++) {
            const vf ws = Weights<F>::floats(load_part_as<raw>(w + n * w_row + k * element<F>(), rest));
            for (int m = 0; m < MT; m++) acc[m][n] = fma(load_part(x + m * K + k, rest), ws, acc[m][n]);
        }
    }
}

// COUNT outputs from n on of one row of x: one expression for all, so that none is rounded otherwise.
template <int COUNT>
KVA_INLINE void finish(const kva_linear& a, vf4 sums, float* y, int64_t n) {
    vf4 scale = vf4{} + 1.0f, bias{};
    if (a.scale) std::memcpy(&scale, a.scale + n, COUNT * sizeof(float));
    if (a.bias) std::memcpy(&bias, a.bias + n, COUNT * sizeof(float));
    const vf4 result = sums * scale + bias;
    std::memcpy(y + n, &result, COUNT * sizeof(float));
}

// Rows [n, n + NT) of W with all of their columns.
template <int F, int MT, int NT>
KVA_INLINE void whole_rows(const kva_linear& a, const float* x, float* y, int64_t n, int64_t ahead) {
    const int64_t K = a.num_inputs, w_row = K * element<F>();
    vf acc[MT][NT] = {};
    accumulate<F, MT, NT>(a.weight + n * w_row, w_row, ahead, x, K, acc);
    for (int m = 0; m < MT; m++) {
        float* y_row = y + m * a.num_outputs;
        if constexpr (NT == 1) {
            finish<1>(a, sum4(acc[m][0], vf{}, vf{}, vf{}), y_row, n);
        } else {
            for (int i = 0; i < NT; i += 4)
                finish<4>(a, sum4(acc[m][i], acc[m][i + 1], acc[m][i + 2], acc[m][i + 3]), y_row, n + i);
        }
    }
}

// Some rows of x with rows [begin, end) of W. Every `turns`th step prefetches what lies `ahead`, from `turn` on.
template <int F, int MT>
void tile(const kva_linear& a, const float* x, float* y, int64_t begin, int64_t end, int64_t ahead, int turn, int turns) {
    constexpr int NT = companions(MT);
    int64_t n = begin;
    for (; n + NT <= end; n += NT, turn++) whole_rows<F, MT, NT>(a, x, y, n, turn % turns ? 0 : ahead);
    for (; n < end; n++) whole_rows<F, MT, 1>(a, x, y, n, 0);
}

// All rows of x, in tiles of nearly equal height, with rows [begin, end) of W. The first tile reads them from memory
// unless the tiles of the block before have prefetched them, each its share.
template <int F>
void block(const kva_linear& a, const float* x, float* y, int M, int64_t begin, int64_t end) {
    const int tiles = (M + TILE - 1) / TILE;
    const int64_t w_row = a.num_inputs * element<F>();
    const int64_t ahead = tiles > 1 ? (end - begin) * w_row : 8 * w_row > AHEAD_BYTES ? 8 * w_row : AHEAD_BYTES;
    for (int i = 0; i < tiles; i++) {
        const int first = M * i / tiles;
        const float* xs = x + first * a.num_inputs;
        float* ys = y + first * a.num_outputs;
        switch (M * (i + 1) / tiles - first) {
            case 1: tile<F, 1>(a, xs, ys, begin, end, ahead, i, tiles); break;
            case 2: tile<F, 2>(a, xs, ys, begin, end, ahead, i, tiles); break;
            case 3: tile<F, 3>(a, xs, ys, begin, end, ahead, i, tiles); break;
#if defined(KVA_ISA_avx512)
            case 4: tile<F, 4>(a, xs, ys, begin, end, ahead, i, tiles); break;
            case 5: tile<F, 5>(a, xs, ys, begin, end, ahead, i, tiles); break;
            case 6: tile<F, 6>(a, xs, ys, begin, end, ahead, i, tiles); break;
#endif
        }
    }
}

}  // namespace

int64_t linear_row_bytes(const kva_linear& a) {
    switch (a.format) {
        case KVA_FP32: return a.num_inputs * element<KVA_FP32>();
        case KVA_BF16: return a.num_inputs * element<KVA_BF16>();
        case KVA_FP16: return a.num_inputs * element<KVA_FP16>();
        case KVA_INT8: return a.num_inputs * element<KVA_INT8>();
    }
    return 0;
}

int64_t linear_step(const kva_linear& a) {
    const int64_t rows = STEP_BYTES / (linear_row_bytes(a) + 1) / 8 * 8;
    return rows < 8 ? 8 : rows;
}

void linear_rows(const kva_linear& a, const float* x, float* y, int M, int64_t begin, int64_t end) {
    switch (a.format) {
        case KVA_FP32: return block<KVA_FP32>(a, x, y, M, begin, end);
        case KVA_BF16: return block<KVA_BF16>(a, x, y, M, begin, end);
        case KVA_FP16: return block<KVA_FP16>(a, x, y, M, begin, end);
        case KVA_INT8: return block<KVA_INT8>(a, x, y, M, begin, end);
    }
}

}  // namespace KVA_ISA

// x [M, K] and y [M, N], contiguous float32; M is at most 32.
KVA_EXPORT(kva_small_linear)(const kva_linear* a, const float* x, float* y, int32_t M, int32_t threads) {
    using namespace KVA_ISA;
    if (M < 0 || M > MAX_ROWS || a->num_outputs < 0 || a->num_inputs < 0) return KVA_ESHAPE;
    if (a->format < KVA_FP32 || a->format > KVA_INT8) return KVA_EFORMAT;
    if (M == 0) return KVA_OK;
    together(worthwhile(a->num_outputs * linear_row_bytes(*a), threads), [&](Team team) {
        share_rows(*a, team, [&](int64_t begin, int64_t end) { linear_rows(*a, x, y, M, begin, end); });
    });
    return KVA_OK;
}

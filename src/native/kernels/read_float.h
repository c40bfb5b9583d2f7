// Readers of float formats: each key and value is a row of numbers.
//
// A tile of scores keeps heads x tokens sums in registers while it walks the channels, so that a key is converted once
// for all heads and a query is loaded once for several tokens. A tile of values keeps heads x channels.
#pragma once
#include <type_traits>

#include "tile.h"

namespace KVA_ISA {

struct Fp32 {
    static constexpr int64_t BYTES = 4;
    static KVA_INLINE vf load(const uint8_t* p) { return load_as<vf>(p); }
    static KVA_INLINE vf load_part(const uint8_t* p, int n) { return KVA_ISA::load_part((const float*)p, n); }
};
struct Bf16 {
    static constexpr int64_t BYTES = 2;
    static KVA_INLINE vf load(const uint8_t* p) { return from_bf16(load_as<vh>(p)); }
    static KVA_INLINE vf load_part(const uint8_t* p, int n) { return from_bf16(load_part_as<vh>(p, n)); }
};
struct Fp16 {
    static constexpr int64_t BYTES = 2;
    static KVA_INLINE vf load(const uint8_t* p) { return from_fp16(load_as<vh>(p)); }
    static KVA_INLINE vf load_part(const uint8_t* p, int n) { return from_fp16(load_part_as<vh>(p, n)); }
};

// Where the rows of a tile start: its keys, or its values.
struct DenseRows {
    const uint8_t* first;
    int64_t stride;
    KVA_INLINE const uint8_t* operator()(int token) const { return first + token * stride; }
};
struct ScatteredRows {
    const uint8_t* const* blocks;
    const int32_t* offsets;
    int64_t at, stride;
    KVA_INLINE const uint8_t* operator()(int token) const { return blocks[token] + at + offsets[token] * stride; }
};

// Dot products of HEADS queries with TOKENS keys.
template <class Element, int HEADS, int TOKENS, class Rows>
KVA_INLINE void dot_tile(const Rows& rows, int first, int dim, const float* q, int64_t q_stride, float* out,
                         int64_t out_stride, const uint8_t* next) {
    constexpr int64_t BYTES = Element::BYTES, STEP = VF * BYTES;
    const uint8_t* row[TOKENS];
    for (int t = 0; t < TOKENS; ++t) row[t] = rows(first + t);
    vf sum[HEADS][TOKENS] = {};
    int c = 0;
    for (; c + VF <= dim; c += VF) {
        prefetch_next(next, c * BYTES * TOKENS, STEP * TOKENS);
        vf key[TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) key[t] = Element::load(row[t] + c * BYTES);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h) {
            const vf query = load(q + h * q_stride + c);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) sum[h][t] = fma(query, key[t], sum[h][t]);
        }
    }
    if (c < dim) {
        for (int t = 0; t < TOKENS; ++t) {
            const vf key = Element::load_part(row[t] + c * BYTES, dim - c);
            for (int h = 0; h < HEADS; ++h) sum[h][t] = fma(load(q + h * q_stride + c), key, sum[h][t]);
        }
    }
    if constexpr (TOKENS % 4 == 0) {
        for (int h = 0; h < HEADS; ++h) {
            for (int t = 0; t < TOKENS; t += 4) {
                const vf4 sums = sum4(sum[h][t], sum[h][t + 1], sum[h][t + 2], sum[h][t + 3]);
                std::memcpy(out + h * out_stride + first + t, &sums, sizeof sums);
            }
        }
    } else if constexpr (TOKENS == 2 && HEADS % 2 == 0) {
        for (int h = 0; h < HEADS; h += 2) {
            const vf4 sums = sum4(sum[h][0], sum[h][1], sum[h + 1][0], sum[h + 1][1]);
            std::memcpy(out + h * out_stride + first, &sums, 8);
            std::memcpy(out + (h + 1) * out_stride + first, (const float*)&sums + 2, 8);
        }
    } else {
        for (int h = 0; h < HEADS; ++h) {
            for (int t = 0; t < TOKENS; ++t) out[h * out_stride + first + t] = hsum(sum[h][t]);
        }
    }
}

// Tokens of a tile of scores: as many as the registers hold (32 with AVX-512, 16 else).
template <int HEADS>
constexpr int tile_tokens() {
    constexpr int SUMS = VF == 16 ? 16 : 8;
    return HEADS == 3 ? SUMS / 4 : SUMS / HEADS > 8 ? 8 : SUMS / HEADS;
}

template <class Element, int HEADS, class Rows>
void dot_rows(const Rows& rows, int count, int dim, const float* q, int64_t q_stride, float* out, int64_t out_stride,
              const uint8_t* next) {
    constexpr int TOKENS = tile_tokens<HEADS>();
    int t = 0;
    for (; t + TOKENS <= count; t += TOKENS) {
        dot_tile<Element, HEADS, TOKENS>(rows, t, dim, q, q_stride, out, out_stride, next + t * dim * Element::BYTES);
    }
    for (; t < count; ++t) {
        dot_tile<Element, HEADS, 1>(rows, t, dim, q, q_stride, out, out_stride, next + t * dim * Element::BYTES);
    }
}

// Adds to VECTORS vectors of each of HEADS sums the weighted rows of a tile; PART: the last `part` channels only.
template <class Element, int HEADS, int VECTORS, bool PART, class Rows>
KVA_INLINE void add_tile(const Rows& rows, int count, int channel, int part, const float* weights, int64_t weight_stride,
                         float* sums, int64_t sum_stride, const uint8_t* next, int64_t next_stride) {
    constexpr int64_t BYTES = Element::BYTES;
    vf sum[HEADS][VECTORS];
    for (int h = 0; h < HEADS; ++h) {
        for (int v = 0; v < VECTORS; ++v) sum[h][v] = load(sums + h * sum_stride + channel + v * VF);
    }
    const int64_t from = channel * BYTES, until = from + (PART ? part : VECTORS * VF) * BYTES;
    const bool fetches = from % 64 == 0 || until - from >= 64;
    for (int t = 0; t < count; ++t) {
        const uint8_t* row = rows(t) + from;
        if (fetches) prefetch_next(next + t * next_stride, from, VECTORS * VF * BYTES);
        vf value[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            value[v] = PART ? Element::load_part(row, part) : Element::load(row + v * VF * BYTES);
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h) {
            const vf weight = set1(weights[h * weight_stride + t]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[h][v] = fma(weight, value[v], sum[h][v]);
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        for (int v = 0; v < VECTORS; ++v) store(sums + h * sum_stride + channel + v * VF, sum[h][v]);
    }
}

template <class Element, int HEADS, class Rows>
void add_rows(const Rows& rows, int count, int dim, const float* weights, int64_t weight_stride, float* sums,
              int64_t sum_stride, const uint8_t* next, int64_t next_stride) {
    constexpr int VECTORS = VF == 16 ? 4 : 2;
    int c = 0;
    for (; c + VECTORS * VF <= dim; c += VECTORS * VF) {
        add_tile<Element, HEADS, VECTORS, false>(rows, count, c, 0, weights, weight_stride, sums, sum_stride, next,
                                                 next_stride);
    }
    for (; c + VF <= dim; c += VF) {
        add_tile<Element, HEADS, 1, false>(rows, count, c, 0, weights, weight_stride, sums, sum_stride, next,
                                           next_stride);
    }
    if (c < dim) {
        add_tile<Element, HEADS, 1, true>(rows, count, c, dim - c, weights, weight_stride, sums, sum_stride, next,
                                          next_stride);
    }
}

// Calls f<HEADS>(first head) for groups of up to four heads, the most whose sums fit into registers.
template <class F>
KVA_INLINE void by_heads(int group, const F& f) {
    int h = 0;
    for (; h + 4 <= group; h += 4) f(h, std::integral_constant<int, 4>{});
    switch (group - h) {
        case 3: f(h, std::integral_constant<int, 3>{}); break;
        case 2: f(h, std::integral_constant<int, 2>{}); break;
        case 1: f(h, std::integral_constant<int, 1>{}); break;
    }
}

template <class Element>
struct FloatReader {
    static constexpr bool SCATTERS = true;
    static int64_t scratch(const kva_pool&, const Shape&) { return 0; }

    const kva_pool& pool;
    const Shape& shape;
    const float* q;

    FloatReader(const kva_pool& pool, const Shape& shape, const float* q, void*) : pool(pool), shape(shape), q(q) {}

    void scores(const Tile& tile, float* out) const {
        const int64_t stride = pool.key_dim * Element::BYTES;
        if (tile.block) return scores_of(DenseRows{tile.block, stride}, tile, out);
        scores_of(ScatteredRows{tile.blocks, tile.offsets, 0, stride}, tile, out);
    }

    void add(const Tile& tile, const float* weights, float* sums) const {
        const int64_t stride = pool.value_dim * Element::BYTES;
        if (tile.block) return add_of(DenseRows{tile.block + pool.values_at, stride}, tile, weights, sums);
        add_of(ScatteredRows{tile.blocks, tile.offsets, pool.values_at, stride}, tile, weights, sums);
    }

   private:
    template <class Rows>
    void scores_of(const Rows& rows, const Tile& tile, float* out) const {
        by_heads(shape.group, [&](int h, auto heads) {
            dot_rows<Element, decltype(heads)::value>(rows, tile.count, pool.key_dim, q + h * shape.q_stride,
                                                      shape.q_stride, out + h * shape.score_stride, shape.score_stride,
                                                      tile.next);
        });
    }

    template <class Rows>
    void add_of(const Rows& rows, const Tile& tile, const float* weights, float* sums) const {
        by_heads(shape.group, [&](int h, auto heads) {
            add_rows<Element, decltype(heads)::value>(rows, tile.count, pool.value_dim, weights + h * shape.score_stride,
                                                      shape.score_stride, sums + h * shape.sum_stride, shape.sum_stride,
                                                      tile.next + pool.values_at, pool.value_dim * Element::BYTES);
        });
    }
};

}  // namespace KVA_ISA

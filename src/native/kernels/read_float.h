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

// What to prefetch while a tile is worked on, twice: what is needed a block later, and what half a block later. Memory
// drops what it has no room to fetch, and the second time gets that: reading blocks of 16 KiB in random order, Zen 4 comes
// to 15 GB/s without prefetching, to 20 with one and to 27 with both (34 in order).
struct Ahead {
    const uint8_t *far, *near;
    KVA_INLINE Ahead operator+(int64_t bytes) const { return {far + bytes, near + bytes}; }
    KVA_INLINE void prefetch(int64_t from, int64_t bytes) const {
        prefetch_next(far, from, bytes);
        prefetch_next(near, from, bytes);
    }
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

// Dot products of HEADS queries with TOKENS keys; PART: the last dim % VF channels are there. Every loop over heads and
// tokens is unrolled, for sums must be in registers.
template <class Element, int HEADS, int TOKENS, bool PART, class Rows>
KVA_INLINE void dot_tile(const Rows& rows, int first, int dim, const float* q, int64_t q_stride, float* out,
                         int64_t out_stride, Ahead ahead) {
    constexpr int64_t BYTES = Element::BYTES, STEP = VF * BYTES;
    const uint8_t* row[TOKENS];
    vf sum[HEADS][TOKENS];
    KVA_UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        row[t] = rows(first + t);
        KVA_UNROLL
        for (int h = 0; h < HEADS; ++h) sum[h][t] = vf{};
    }
    int c = 0;
    for (; c + VF <= dim; c += VF) {
        ahead.prefetch(c * BYTES * TOKENS, STEP * TOKENS);
        vf key[TOKENS];
        KVA_UNROLL
        for (int t = 0; t < TOKENS; ++t) key[t] = Element::load(row[t] + c * BYTES);
        KVA_UNROLL
        for (int h = 0; h < HEADS; ++h) {
            const vf query = load(q + h * q_stride + c);
            KVA_UNROLL
            for (int t = 0; t < TOKENS; ++t) sum[h][t] = fma(query, key[t], sum[h][t]);
        }
    }
    if constexpr (PART) {
        KVA_UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const vf key = Element::load_part(row[t] + c * BYTES, dim - c);
            KVA_UNROLL
            for (int h = 0; h < HEADS; ++h) sum[h][t] = fma(load(q + h * q_stride + c), key, sum[h][t]);
        }
    }
    if constexpr (TOKENS % 4 == 0) {
        KVA_UNROLL
        for (int h = 0; h < HEADS; ++h) {
            KVA_UNROLL
            for (int t = 0; t < TOKENS; t += 4) {
                const vf4 sums = sum4(sum[h][t], sum[h][t + 1], sum[h][t + 2], sum[h][t + 3]);
                std::memcpy(out + h * out_stride + first + t, &sums, sizeof sums);
            }
        }
    } else if constexpr (TOKENS == 2 && HEADS % 2 == 0) {
        KVA_UNROLL
        for (int h = 0; h < HEADS; h += 2) {
            const vf4 sums = sum4(sum[h][0], sum[h][1], sum[h + 1][0], sum[h + 1][1]);
            std::memcpy(out + h * out_stride + first, &sums, 8);
            std::memcpy(out + (h + 1) * out_stride + first, (const float*)&sums + 2, 8);
        }
    } else {
        KVA_UNROLL
        for (int h = 0; h < HEADS; ++h) {
            KVA_UNROLL
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

template <class Element, int HEADS, bool PART, class Rows>
void dot_rows(const Rows& rows, int count, int dim, const float* q, int64_t q_stride, float* out, int64_t out_stride,
              Ahead ahead) {
    constexpr int TOKENS = tile_tokens<HEADS>();
    const int64_t bytes = dim * Element::BYTES;
    int t = 0;
    for (; t + TOKENS <= count; t += TOKENS) {
        dot_tile<Element, HEADS, TOKENS, PART>(rows, t, dim, q, q_stride, out, out_stride, ahead + t * bytes);
    }
    for (; t < count; ++t) {
        dot_tile<Element, HEADS, 1, PART>(rows, t, dim, q, q_stride, out, out_stride, ahead + t * bytes);
    }
}

template <class Element, int HEADS, class Rows>
KVA_INLINE void dot_rows(const Rows& rows, int count, int dim, const float* q, int64_t q_stride, float* out,
                         int64_t out_stride, Ahead ahead) {
    if (dim % VF) {
        dot_rows<Element, HEADS, true>(rows, count, dim, q, q_stride, out, out_stride, ahead);
    } else {
        dot_rows<Element, HEADS, false>(rows, count, dim, q, q_stride, out, out_stride, ahead);
    }
}

// Adds to VECTORS vectors of each of HEADS sums the weighted rows of a tile; PART: the last `part` channels only.
template <class Element, int HEADS, int VECTORS, bool PART, class Rows>
KVA_INLINE void add_tile(const Rows& rows, int count, int channel, int part, const float* weights, int64_t weight_stride,
                         float* sums, int64_t sum_stride, Ahead ahead, int64_t ahead_stride) {
    constexpr int64_t BYTES = Element::BYTES;
    vf sum[HEADS][VECTORS];
    KVA_UNROLL
    for (int h = 0; h < HEADS; ++h) {
        KVA_UNROLL
        for (int v = 0; v < VECTORS; ++v) sum[h][v] = load(sums + h * sum_stride + channel + v * VF);
    }
    const int64_t from = channel * BYTES, until = from + (PART ? part : VECTORS * VF) * BYTES;
    const bool fetches = from % 64 == 0 || until - from >= 64;
    for (int t = 0; t < count; ++t) {
        const uint8_t* row = rows(t) + from;
        if (fetches) ahead.prefetch(t * ahead_stride + from, VECTORS * VF * BYTES);
        vf value[VECTORS];
        KVA_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            value[v] = PART ? Element::load_part(row, part) : Element::load(row + v * VF * BYTES);
        }
        KVA_UNROLL
        for (int h = 0; h < HEADS; ++h) {
            const vf weight = set1(weights[h * weight_stride + t]);
            KVA_UNROLL
            for (int v = 0; v < VECTORS; ++v) sum[h][v] = fma(weight, value[v], sum[h][v]);
        }
    }
    KVA_UNROLL
    for (int h = 0; h < HEADS; ++h) {
        KVA_UNROLL
        for (int v = 0; v < VECTORS; ++v) store(sums + h * sum_stride + channel + v * VF, sum[h][v]);
    }
}

template <class Element, int HEADS, class Rows>
void add_rows(const Rows& rows, int count, int dim, const float* weights, int64_t weight_stride, float* sums,
              int64_t sum_stride, Ahead ahead, int64_t ahead_stride) {
    constexpr int VECTORS = VF == 16 ? 4 : 2;
    int c = 0;
    for (; c + VECTORS * VF <= dim; c += VECTORS * VF) {
        add_tile<Element, HEADS, VECTORS, false>(rows, count, c, 0, weights, weight_stride, sums, sum_stride, ahead,
                                                 ahead_stride);
    }
    for (; c + VF <= dim; c += VF) {
        add_tile<Element, HEADS, 1, false>(rows, count, c, 0, weights, weight_stride, sums, sum_stride, ahead,
                                                 ahead_stride);
    }
    if (c < dim) {
        add_tile<Element, HEADS, 1, true>(rows, count, c, dim - c, weights, weight_stride, sums, sum_stride, ahead,
                                                 ahead_stride);
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
        if (tile.block) return add_of(DenseRows{tile.block + pool.values_at, stride}, tile, weights, sums, stride);
        add_of(ScatteredRows{tile.blocks, tile.offsets, pool.values_at, stride}, tile, weights, sums, stride);
    }

   private:
    const uint8_t* values_of(const Tile& tile) const { return tile.block ? tile.block + pool.values_at : tile.next; }

    template <class Rows>
    void scores_of(const Rows& rows, const Tile& tile, float* out) const {
        by_heads(shape.group, [&](int h, auto heads) {
            dot_rows<Element, decltype(heads)::value>(rows, tile.count, pool.key_dim, q + h * shape.q_stride,
                                                      shape.q_stride, out + h * shape.score_stride, shape.score_stride,
                                                      Ahead{tile.next, values_of(tile)});
        });
    }

    template <class Rows>
    void add_of(const Rows& rows, const Tile& tile, const float* weights, float* sums, int64_t stride) const {
        by_heads(shape.group, [&](int h, auto heads) {
            add_rows<Element, decltype(heads)::value>(rows, tile.count, pool.value_dim, weights + h * shape.score_stride,
                                                      shape.score_stride, sums + h * shape.sum_stride, shape.sum_stride,
                                                      Ahead{tile.next + pool.values_at, tile.next}, stride);
        });
    }
};

}  // namespace KVA_ISA

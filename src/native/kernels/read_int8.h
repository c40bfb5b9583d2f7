// Reader of int8 with a scale per token, by 16-bit integer dot products.
#pragma once
#include "integers.h"
#include "read_float.h"

namespace KVA_ISA {

struct Int8 {
    static constexpr int64_t BYTES = 1;
    static KVA_INLINE vf load(const uint8_t* p) { return from_int8(load_as<vb>(p)); }
    static KVA_INLINE vf load_part(const uint8_t* p, int n) { return from_int8(load_part_as<vb>(p, n)); }
};

// Queries and weights become 16-bit integers, the queries once and the weights tile by tile: their largest number is
// about 32767, so that sums of products with codes fit into 32 bits and nothing is lost that float32 would show.
struct Int8Reader {
    static constexpr bool SCATTERS = true;
    static int64_t scratch(const kva_pool& pool, const Shape& shape) { return Layout(pool, shape).bytes; }

    const kva_pool& pool;
    const Shape& shape;
    const int64_t query_stride;
    int16_t *queries, *weights;  // [group][query_stride], [group][score_stride]
    float *steps, *scales;       // of the queries [group]; of the tokens of a tile [score_stride]

    Int8Reader(const kva_pool& pool, const Shape& shape, const float* q, void* scratch)
        : pool(pool), shape(shape), query_stride(rounded(pool.key_dim, 32)) {
        const Layout layout(pool, shape);
        uint8_t* const at = (uint8_t*)scratch;
        queries = (int16_t*)at, weights = (int16_t*)(at + layout.weights);
        steps = (float*)(at + layout.steps), scales = (float*)(at + layout.scales);
        const float top = most_integer(pool.key_dim);
        for (int h = 0; h < shape.group; ++h, q += shape.q_stride) {
            vf most{};
            for (int64_t c = 0; c < shape.q_stride; c += VF) most = vmax(most, vabs(load(q + c)));
            const float peak = hmax(most), up = to_integers(peak, top);
            int16_t* const to = queries + h * query_stride;
            for (int64_t c = 0; c < query_stride; c += VF) {
                store_int16(to + c, c < shape.q_stride ? load(q + c) * up : vf{});
            }
            steps[h] = peak / top;
        }
    }

    void scores(const Tile& tile, float* out) const {
        const int64_t stride = pool.key_dim;
        load_scales(tile, pool.key_params_at);
        if (tile.block) {
            dot(DenseRows{tile.block, stride}, tile, out);
        } else {
            dot(ScatteredRows{tile.blocks, tile.offsets, 0, stride}, tile, out);
        }
        for (int h = 0; h < shape.group; ++h) {
            float* const scores = out + h * shape.score_stride;
            for (int t = 0; t < tile.count; t += VF) store(scores + t, load(scores + t) * load(scales + t) * steps[h]);
        }
    }

    void add(const Tile& tile, const float* weights, float* sums) const {
        const int64_t stride = pool.value_dim;
        load_scales(tile, pool.value_params_at);
        if (tile.block) {
            add_rows_of(DenseRows{tile.block + pool.values_at, stride}, tile, weights, sums);
        } else {
            add_rows_of(ScatteredRows{tile.blocks, tile.offsets, pool.values_at, stride}, tile, weights, sums);
        }
    }

   private:
    // Where what a reader holds lies in its scratch, bytes.
    struct Layout {
        int64_t weights, steps, scales, bytes;
        Layout(const kva_pool& pool, const Shape& shape) {
            weights = rounded(shape.group * rounded(pool.key_dim, 32) * 2, 64);
            steps = weights + rounded(shape.group * shape.score_stride * 2, 64);
            scales = steps + rounded(shape.group * 4, 64);
            bytes = scales + rounded(shape.score_stride * 4, 64);
        }
    };

    // The largest integer whose products with `count` codes, summed, fit into 32 bits.
    KVA_INLINE static float most_integer(int count) {
        return count <= 512 ? 32767.0f : (float)(32767 * 512 / count);
    }

    void load_scales(const Tile& tile, int64_t at) const {
        const int count = tile.count, whole = count / VF * VF;
        if (tile.block) {
            const uint8_t* from = tile.block + at;
            prefetch_next(tile.next, at, 2 * count);
            for (int t = 0; t < whole; t += VF) store(scales + t, from_fp16(load_as<vh>(from + 2 * t)));
            if (whole < count) store(scales + whole, from_fp16(load_part_as<vh>(from + 2 * whole, count - whole)));
            return;
        }
        for (int t = 0; t < count; t += VF) {
            vh some{};
            for (int i = 0; i < VF && t + i < count; ++i) {
                some[i] = load_as<uint16_t>(tile.blocks[t + i] + at + 2 * tile.offsets[t + i]);
            }
            store(scales + t, from_fp16(some));
        }
    }

    template <class Rows>
    void dot(const Rows& rows, const Tile& tile, float* out) const {
        by_heads(shape.group, [&](int h, auto heads) {
            constexpr int HEADS = decltype(heads)::value, TOKENS = VF == 16 || HEADS < 3 ? 4 : 2;
            int t = 0;
            for (; t + TOKENS <= tile.count; t += TOKENS) dot_tokens<HEADS, TOKENS>(rows, t, h, tile.next, out);
            for (; t < tile.count; ++t) dot_tokens<HEADS, 1>(rows, t, h, tile.next, out);
        });
    }

    // Products of HEADS queries with the codes of TOKENS keys.
    template <int HEADS, int TOKENS, class Rows>
    KVA_INLINE void dot_tokens(const Rows& rows, int first, int head, const uint8_t* next, float* out) const {
        const int dim = pool.key_dim;
        const uint8_t* row[TOKENS];
        for (int t = 0; t < TOKENS; ++t) row[t] = rows(first + t);
        vi sum[HEADS][TOKENS] = {};
        const int64_t bytes = (int64_t)TOKENS * dim;
        next += (int64_t)first * dim;
        for (int c = 0; c < dim; c += VW) {
            const int n = dim - c < VW ? dim - c : VW;
            if (c * TOKENS < bytes) prefetch_next(next, c * TOKENS, VW * TOKENS);
            vw key[TOKENS];
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) key[t] = n == VW ? widen(row[t] + c) : widen(row[t] + c, n);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; ++h) {
                const vw query = load_as<vw>(queries + (head + h) * query_stride + c);
#pragma GCC unroll 4
                for (int t = 0; t < TOKENS; ++t) sum[h][t] = madd(sum[h][t], query, key[t]);
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            const vf4 four = sum4(sum[h][0], sum[h][TOKENS > 1 ? 1 : 0], sum[h][TOKENS > 2 ? 2 : 0],
                                  sum[h][TOKENS > 3 ? 3 : 0]);
            std::memcpy(out + (head + h) * shape.score_stride + first, &four, TOKENS * sizeof(float));
        }
    }

    template <class Rows>
    void add_rows_of(const Rows& rows, const Tile& tile, const float* from, float* sums) const {
        const float top = most_integer(tile.count);
        by_heads(shape.group, [&](int h, auto heads) {
            constexpr int HEADS = decltype(heads)::value;
            vf most[HEADS] = {};
            for (int t = 0; t < tile.count; t += VF) {
                const vf scale = load(scales + t);
                for (int i = 0; i < HEADS; ++i) {
                    most[i] = vmax(most[i], load(from + (h + i) * shape.score_stride + t) * scale);
                }
            }
            const vf4 peak = maxima(most), up = to_integers(peak, top), step = peak / top;
            for (int t = 0; t < tile.count; t += VF) {
                const vf scale = load(scales + t);
                for (int i = 0; i < HEADS; ++i) {
                    const int64_t at = (h + i) * shape.score_stride + t;
                    store_int16(weights + at, load(from + at) * scale * up[i]);
                }
            }
            constexpr int WIDE = VF == 16 ? 2 : 1;
            float* const to = sums + h * shape.sum_stride;
            int c = 0;
            for (; c + WIDE * VW <= pool.value_dim; c += WIDE * VW) {
                add_some<HEADS, WIDE>(rows, tile, c, VW, h, step, to);
            }
            for (; c < pool.value_dim; c += VW) {
                const int n = pool.value_dim - c;
                add_some<HEADS, 1>(rows, tile, c, n < VW ? n : VW, h, step, to);
            }
        });
    }

    // Adds WIDE * VW channels from c on of all tokens, two tokens at a time; n of them are there if WIDE is 1.
    template <int HEADS, int WIDE, class Rows>
    KVA_INLINE void add_some(const Rows& rows, const Tile& tile, int c, int n, int head, vf4 step, float* sums) const {
        vi low[HEADS][WIDE] = {}, high[HEADS][WIDE] = {};
        const uint8_t* next = tile.next + pool.values_at + c;
        const bool fetches = WIDE * VW >= 64 || c % 64 == 0;
        for (int t = 0; t < tile.count; t += 2) {
            const bool two = t + 1 < tile.count;
            const uint8_t *a = rows(t) + c, *b = rows(two ? t + 1 : t) + c;  // a missing token has weight 0
            if (fetches) {
                prefetch(next + (int64_t)t * pool.value_dim);
                prefetch(next + (int64_t)(t + 1) * pool.value_dim);
            }
            vw pair_low[WIDE], pair_high[WIDE];
#pragma GCC unroll 2
            for (int v = 0; v < WIDE; ++v) {
                const vw x = n == VW ? widen(a + v * VW) : widen(a, n), y = n == VW ? widen(b + v * VW) : widen(b, n);
                interleave(x, y, pair_low[v], pair_high[v]);
            }
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; ++h) {
                const vw weight = set_pair(load_as<int32_t>(weights + (head + h) * shape.score_stride + t));
#pragma GCC unroll 2
                for (int v = 0; v < WIDE; ++v) {
                    low[h][v] = madd(low[h][v], pair_low[v], weight);
                    high[h][v] = madd(high[h][v], pair_high[v], weight);
                }
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            float* to = sums + h * shape.sum_stride + c;
            for (int v = 0; v < WIDE; ++v, to += VW) {
                in_order(low[h][v], high[h][v]);
                store(to, fma(__builtin_convertvector(low[h][v], vf), set1(step[h]), load(to)));
                store(to + VF, fma(__builtin_convertvector(high[h][v], vf), set1(step[h]), load(to + VF)));
            }
        }
    }
};

}  // namespace KVA_ISA

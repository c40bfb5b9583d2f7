// Readers of quantised formats: int8 with a scale per token, int4 and int2 packed for integer dot products.
//
// A packed block is 32 tokens in runs of 32 quads (core/layout.py); `dot_runs` multiplies each quad of a run with four
// bytes and sums over runs, for keys (quad: token, bytes: the query's 4 channels) and values (quad: channel, bytes: the
// weights of 4 tokens) alike. For that the query, times the scales of the block's channels, and the weights, times the
// scales of the tokens, become int8; minima take part in float.
#pragma once
#include "integers.h"
#include "read_float.h"

namespace KVA_ISA {

constexpr int QUADS = 32;           // of a run: tokens of keys, channels of values
constexpr int QUAD_VF = QUADS / VF;  // vectors of as many numbers
constexpr int PACKED_HEADS = VF == 16 ? 4 : 2;  // heads at a time: what their sums leave room for in registers

// sums[h][i] = sum over runs r and j < 4 of code j of quad i in run r, times factors[h][4 * r + j].
template <int BITS, int HEADS>
KVA_INLINE void dot_runs(const uint8_t* runs, int count, const int8_t* factors, int64_t factor_stride,
                         const uint8_t* next, vf (&sums)[HEADS][QUAD_VF]) {
    constexpr int RUN = 16 * BITS;  // bytes
#if defined(KVA_ISA_avx512)
    __m512i low[HEADS], high[HEADS];
    for (int h = 0; h < HEADS; ++h) low[h] = high[h] = _mm512_setzero_si512();
    const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
    // int2: a run's 32 bytes stand in both halves, and the upper half looks two bits further up.
    const __m512i shift_low = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
    const __m512i shift_high = _mm512_add_epi16(shift_low, _mm512_set1_epi16(4));
#pragma GCC unroll 2
    for (int r = 0; r < count; ++r) {
        if (BITS == 4 || r % 2 == 0) prefetch(next + r * RUN);
        __m512i a, b;
        if constexpr (BITS == 4) {
            const __m512i run = _mm512_loadu_si512(runs + r * RUN);
            a = _mm512_and_si512(run, mask);
            b = _mm512_and_si512(_mm512_srli_epi16(run, 4), mask);
        } else {
            const __m512i run = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(runs + r * RUN)));
            a = _mm512_and_si512(_mm512_srlv_epi16(run, shift_low), mask);
            b = _mm512_and_si512(_mm512_srlv_epi16(run, shift_high), mask);
        }
        for (int h = 0; h < HEADS; ++h) {
            const __m512i four = _mm512_set1_epi32(load_as<int32_t>(factors + h * factor_stride + 4 * r));
            low[h] = _mm512_dpbusd_epi32(low[h], a, four);
            high[h] = _mm512_dpbusd_epi32(high[h], b, four);
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        sums[h][0] = (vf)_mm512_cvtepi32_ps(low[h]);
        sums[h][1] = (vf)_mm512_cvtepi32_ps(high[h]);
    }
#elif defined(KVA_ISA_avx2)
    // Sums of 16 bits hold so many runs: each adds at most 2 * 127 * (2^BITS - 1).
    constexpr int AT_ONCE = BITS == 4 ? 8 : 32;
    const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1), ones = _mm256_set1_epi16(1);
    __m256i wide[HEADS][4];
    for (int h = 0; h < HEADS; ++h) {
        for (int k = 0; k < 4; ++k) wide[h][k] = _mm256_setzero_si256();
    }
    for (int first = 0; first < count; first += AT_ONCE) {
        __m256i part[HEADS][4];
        for (int h = 0; h < HEADS; ++h) {
            for (int k = 0; k < 4; ++k) part[h][k] = _mm256_setzero_si256();
        }
        const int until = first + AT_ONCE < count ? first + AT_ONCE : count;
        for (int r = first; r < until; ++r) {
            if (BITS == 4 || r % 2 == 0) prefetch(next + r * RUN);
            const __m256i* run = (const __m256i*)(runs + r * RUN);
            __m256i code[4];
            if constexpr (BITS == 4) {
                const __m256i x = _mm256_loadu_si256(run), y = _mm256_loadu_si256(run + 1);
                code[0] = _mm256_and_si256(x, mask);
                code[1] = _mm256_and_si256(y, mask);
                code[2] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
                code[3] = _mm256_and_si256(_mm256_srli_epi16(y, 4), mask);
            } else {
                const __m256i x = _mm256_loadu_si256(run);
                code[0] = _mm256_and_si256(x, mask);
                code[1] = _mm256_and_si256(_mm256_srli_epi16(x, 2), mask);
                code[2] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
                code[3] = _mm256_and_si256(_mm256_srli_epi16(x, 6), mask);
            }
            for (int h = 0; h < HEADS; ++h) {
                const __m256i four = _mm256_set1_epi32(load_as<int32_t>(factors + h * factor_stride + 4 * r));
                for (int k = 0; k < 4; ++k) {
                    part[h][k] = _mm256_add_epi16(part[h][k], _mm256_maddubs_epi16(code[k], four));
                }
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            for (int k = 0; k < 4; ++k) {
                wide[h][k] = _mm256_add_epi32(wide[h][k], _mm256_madd_epi16(part[h][k], ones));
            }
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        for (int k = 0; k < 4; ++k) sums[h][k] = (vf)_mm256_cvtepi32_ps(wide[h][k]);
    }
#else
    // Bytes 0 and 2 of a quad, and bytes 1 and 3, are pairs of 16-bit integers.
    constexpr int VECTORS = RUN / (4 * VF);
    const vuw mask = vuw{} + (uint16_t)((1 << BITS) - 1);
    vi sum[HEADS][QUAD_VF] = {};
    for (int r = 0; r < count; ++r) {
        if (BITS == 4 || r % 2 == 0) prefetch(next + r * RUN);
        vw even[QUAD_VF], odd[QUAD_VF];
        for (int k = 0; k < QUAD_VF; ++k) {
            const vuw run = load_as<vuw>(runs + r * RUN + k % VECTORS * 4 * VF) >> (k / VECTORS * BITS);
            even[k] = (vw)(run & mask);
            odd[k] = (vw)(run >> 8 & mask);
        }
        for (int h = 0; h < HEADS; ++h) {
            const int8_t* four = factors + h * factor_stride + 4 * r;
            const vw evens = set_pair((uint16_t)four[0] | (uint32_t)(uint16_t)four[2] << 16);
            const vw odds = set_pair((uint16_t)four[1] | (uint32_t)(uint16_t)four[3] << 16);
            for (int k = 0; k < QUAD_VF; ++k) sum[h][k] = madd(madd(sum[h][k], even[k], evens), odd[k], odds);
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        for (int k = 0; k < QUAD_VF; ++k) sums[h][k] = __builtin_convertvector(sum[h][k], vf);
    }
#endif
}

template <int BITS>
struct PackedReader {
    static constexpr bool SCATTERS = false;
    static int64_t scratch(const kva_pool& pool, const Shape&) { return PACKED_HEADS * rounded(pool.key_dim, 64); }

    const kva_pool& pool;
    const Shape& shape;
    const float* q;
    int8_t* factors;  // [PACKED_HEADS][key_dim, rounded up to 64]

    PackedReader(const kva_pool& pool, const Shape& shape, const float* q, void* scratch)
        : pool(pool), shape(shape), q(q), factors((int8_t*)scratch) {}

    void scores(const Tile& tile, float* out) const {
        by_heads(shape.group, [&](int h, auto heads) {
            scores_of<decltype(heads)::value>(tile, q + h * shape.q_stride, out + h * shape.score_stride);
        });
    }

    void add(const Tile& tile, const float* weights, float* sums) const {
        by_heads(shape.group, [&](int h, auto heads) {
            constexpr int HEADS = decltype(heads)::value;
            for (int64_t first = 0; first < pool.value_dim; first += QUADS) {
                add_of<HEADS>(tile, first / QUADS, weights + h * shape.score_stride, sums + h * shape.sum_stride + first);
            }
        });
    }

   private:
    template <class F>
    KVA_INLINE static void by_heads(int group, const F& f) {
        if constexpr (PACKED_HEADS == 4) {
            KVA_ISA::by_heads(group, f);
        } else {
            for (int h = 0; h + 2 <= group; h += 2) f(h, std::integral_constant<int, 2>{});
            if (group % 2) f(group - 1, std::integral_constant<int, 1>{});
        }
    }

    // Scales, or minima, of key channels c to c + VF; those past the last channel are 0.
    KVA_INLINE vf key_params(const uint8_t* params, int c) const {
        const uint8_t* from = params + 2 * c;
        return from_fp16(c + VF <= pool.key_dim ? load_as<vh>(from) : load_part_as<vh>(from, pool.key_dim - c));
    }

    // Of value parameters: 16 tokens may be hidden and hold anything, which no weight of 0 makes 0.
    KVA_INLINE static vf value_params(const uint8_t* params) {
        const vf x = from_fp16(load_as<vh>(params));
        return vabs(x) <= 65504.0f ? x : vf{};
    }

    template <int HEADS>
    void scores_of(const Tile& tile, const float* q, float* out) const {
        const int dim = pool.key_dim;
        const int64_t stride = rounded(dim, 64);
        const uint8_t *scales = tile.block + pool.key_params_at, *minima = scales + 2 * dim;
        vf most[HEADS] = {}, base[HEADS] = {};
        for (int c = 0; c < dim; c += VF) {
            const vf scale = key_params(scales, c), minimum = key_params(minima, c);
            for (int h = 0; h < HEADS; ++h) {
                const vf query = load(q + h * shape.q_stride + c);
                most[h] = vmax(most[h], vabs(query * scale));
                base[h] = fma(query, minimum, base[h]);
            }
        }
        const vf4 peak = maxima(most), offset = totals(base), up = to_integers(peak, 127.0f), down = peak / 127.0f;
        for (int c = 0; c < dim; c += VF) {
            const vf scale = key_params(scales, c);
            for (int h = 0; h < HEADS; ++h) {
                store_int8(factors + h * stride + c, load(q + h * shape.q_stride + c) * scale * up[h]);
            }
        }
        prefetch_next(tile.next, pool.key_params_at, 4 * dim);
        vf sums[HEADS][QUAD_VF];
        dot_runs<BITS, HEADS>(tile.block, (dim + 3) / 4, factors, stride, tile.next, sums);
        for (int h = 0; h < HEADS; ++h) {
            for (int v = 0; v < QUAD_VF; ++v) {
                const vf score = fma(sums[h][v], set1(down[h]), set1(offset[h]));
                store(out + h * shape.score_stride + v * VF, score);
            }
        }
    }

    template <int HEADS>
    KVA_INLINE void add_of(const Tile& tile, int64_t group, const float* weights, float* sums) const {
        const int64_t groups = (pool.value_dim + QUADS - 1) / QUADS;
        const int64_t scales_at = pool.value_params_at + group * 2 * QUADS, minima_at = scales_at + groups * 2 * QUADS;
        const int64_t codes_at = pool.values_at + group * QUADS * QUADS * BITS / 8;
        vf weight[HEADS][QUAD_VF], most[HEADS] = {}, base[HEADS] = {};
        prefetch(tile.next + scales_at);
        prefetch(tile.next + minima_at);
        for (int v = 0; v < QUAD_VF; ++v) {
            const vf scale = value_params(tile.block + scales_at + 2 * v * VF);
            const vf minimum = value_params(tile.block + minima_at + 2 * v * VF);
            for (int h = 0; h < HEADS; ++h) {
                const vf p = load(weights + h * shape.score_stride + v * VF);
                weight[h][v] = p * scale;
                most[h] = vmax(most[h], weight[h][v]);
                base[h] = fma(p, minimum, base[h]);
            }
        }
        const vf4 peak = maxima(most), offset = totals(base), up = to_integers(peak, 127.0f), down = peak / 127.0f;
        alignas(64) int8_t factors[HEADS][QUADS];
        for (int h = 0; h < HEADS; ++h) {
            for (int v = 0; v < QUAD_VF; ++v) store_int8(factors[h] + v * VF, weight[h][v] * up[h]);
        }
        vf products[HEADS][QUAD_VF];
        dot_runs<BITS, HEADS>(tile.block + codes_at, QUADS / 4, factors[0], QUADS, tile.next + codes_at, products);
        for (int h = 0; h < HEADS; ++h) {
            float* to = sums + h * shape.sum_stride;
            for (int v = 0; v < QUAD_VF; ++v) {
                store(to + v * VF, load(to + v * VF) + fma(products[h][v], set1(down[h]), set1(offset[h])));
            }
        }
    }
};

using Int4Reader = PackedReader<4>;
using Int2Reader = PackedReader<2>;

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
            for (int64_t c = 0; c < query_stride; c += VF) store_int16(to + c, c < shape.q_stride ? load(q + c) * up : vf{});
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
            for (; c + WIDE * VW <= pool.value_dim; c += WIDE * VW) add_some<HEADS, WIDE>(rows, tile, c, VW, h, step, to);
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

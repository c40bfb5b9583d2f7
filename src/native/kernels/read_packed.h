// Readers of int4 and int2, packed for integer dot products.
//
// A packed block is 32 tokens in runs of 32 quads (core/layout.py); `dot_runs` multiplies each quad of a run with four
// bytes and sums over runs, for keys (quad: token, bytes: the query's 4 channels) and values (quad: channel, bytes: the
// weights of 4 tokens) alike. For that the query, times the scales of the block's channels, and the weights, times the
// scales of the tokens, become int8; minima take part in float.
#pragma once
#include "integers.h"
#include "read_float.h"

namespace KVA_ISA {

constexpr int QUAD_VF = QUADS / VF;  // vectors of as many numbers as a run has quads
constexpr int PACKED_HEADS = 4;      // heads at a time at most; factors have room for so many

// The four bytes that head h multiplies with the quads of run r.
KVA_INLINE int32_t factor_of(const int8_t* factors, int r, int h) {
    return load_as<int32_t>(factors + 4 * (PACKED_HEADS * r + h));
}

// sums[h][i] = sum over runs r and j < 4 of code j of quad i in run r, times byte j of factors [run][PACKED_HEADS][4].
template <int BITS, int HEADS>
KVA_INLINE void dot_runs(const uint8_t* runs, int count, const int8_t* factors, const uint8_t* next,
                         vf (&sums)[HEADS][QUAD_VF]) {
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
            const __m512i four = _mm512_set1_epi32(factor_of(factors, r, h));
            low[h] = _mm512_dpbusd_epi32(low[h], a, four);
            high[h] = _mm512_dpbusd_epi32(high[h], b, four);
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        sums[h][0] = (vf)_mm512_cvtepi32_ps(low[h]);
        sums[h][1] = (vf)_mm512_cvtepi32_ps(high[h]);
    }
#elif defined(KVA_ISA_avx2)
    // Half the quads of a run at a time, so that the sums of four heads stay in registers. Sums of 16 bits hold so many
    // runs: each adds at most 2 * 127 * (2^BITS - 1).
    constexpr int AT_ONCE = BITS == 4 ? 8 : 32;
    const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const int first_at = BITS == 4 ? half : 2 * half, second_at = BITS == 4 ? 2 + half : 2 * half + 1;
        const int shift = BITS == 4 ? 0 : 4 * half;
        __m256i wide[HEADS][2];
        for (int h = 0; h < HEADS; ++h) wide[h][0] = wide[h][1] = _mm256_setzero_si256();
        for (int from = 0; from < count; from += AT_ONCE) {
            __m256i part[HEADS][2];
            for (int h = 0; h < HEADS; ++h) part[h][0] = part[h][1] = _mm256_setzero_si256();
            const int until = from + AT_ONCE < count ? from + AT_ONCE : count;
#pragma GCC unroll 2
            for (int r = from; r < until; ++r) {
                if (half == 0 && (BITS == 4 || r % 2 == 0)) prefetch(next + r * RUN);
                const __m256i x = _mm256_loadu_si256((const __m256i*)(runs + r * RUN + (BITS == 4 ? 32 * half : 0)));
                const __m256i a = _mm256_and_si256(_mm256_srli_epi16(x, shift), mask);
                const __m256i b = _mm256_and_si256(_mm256_srli_epi16(x, shift + BITS), mask);
                for (int h = 0; h < HEADS; ++h) {
                    const __m256i four = _mm256_set1_epi32(factor_of(factors, r, h));
                    part[h][0] = _mm256_add_epi16(part[h][0], _mm256_maddubs_epi16(a, four));
                    part[h][1] = _mm256_add_epi16(part[h][1], _mm256_maddubs_epi16(b, four));
                }
            }
            for (int h = 0; h < HEADS; ++h) {
                for (int k = 0; k < 2; ++k) {
                    wide[h][k] = _mm256_add_epi32(wide[h][k], _mm256_madd_epi16(part[h][k], ones));
                }
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            sums[h][first_at] = (vf)_mm256_cvtepi32_ps(wide[h][0]);
            sums[h][second_at] = (vf)_mm256_cvtepi32_ps(wide[h][1]);
        }
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
            const vw four = set_pair(factor_of(factors, r, h));
            const vw evens = (vw)((vuw)four << 8) >> 8, odds = four >> 8;
            for (int k = 0; k < QUAD_VF; ++k) sum[h][k] = madd(madd(sum[h][k], even[k], evens), odd[k], odds);
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        for (int k = 0; k < QUAD_VF; ++k) sums[h][k] = __builtin_convertvector(sum[h][k], vf);
    }
#endif
}

// The weights of a block's tokens for 32 channels of their values: weight * scale = factor * step; offset is the sum of
// weight * minimum.
struct RoundedWeights {
    alignas(64) int8_t factors[QUADS / 4][PACKED_HEADS][4];
    float step[4], offset[4];
};

template <int BITS>
struct PackedReader {
    static constexpr bool SCATTERS = false;
    static int64_t scratch(const kva_pool& pool, const Shape&) {
        return PACKED_HEADS * rounded(pool.key_dim, 64) + num_groups(pool) * sizeof(RoundedWeights);
    }

    const kva_pool& pool;
    const Shape& shape;
    const float* q;
    int8_t* factors;                  // [key_dim / 4, rounded up][PACKED_HEADS][4]
    RoundedWeights* rounded_weights;  // [groups of 32 channels]

    PackedReader(const kva_pool& pool, const Shape& shape, const float* q, void* scratch)
        : pool(pool), shape(shape), q(q), factors((int8_t*)scratch),
          rounded_weights((RoundedWeights*)(factors + PACKED_HEADS * rounded(pool.key_dim, 64))) {}

    void scores(const Tile& tile, float* out) const {
        by_heads(shape.group, [&](int h, auto heads) {
            scores_of<decltype(heads)::value>(tile, q + h * shape.q_stride, out + h * shape.score_stride);
        });
    }

    void add(const Tile& tile, const float* weights, float* sums) const {
        const int groups = num_groups(pool);
        by_heads(shape.group, [&](int h, auto heads) {
            constexpr int HEADS = decltype(heads)::value;
            // All factors first, then all products: the first are long chains of instructions that wait for each other.
            for (int g = 0; g < groups; ++g) {
                round_weights<HEADS>(tile, g, groups, weights + h * shape.score_stride, rounded_weights[g]);
            }
            for (int g = 0; g < groups; ++g) {
                add_group<HEADS>(tile, g, rounded_weights[g], sums + h * shape.sum_stride + g * QUADS);
            }
        });
    }

   private:
    KVA_INLINE static int num_groups(const kva_pool& pool) { return (pool.value_dim + QUADS - 1) / QUADS; }

    // Rounds VF numbers of each head to factors of as many elements.
    template <int HEADS>
    KVA_INLINE static void store_factors(int8_t* to, const vf (&x)[HEADS]) {
        store_quads(to, x[0], x[HEADS > 1 ? 1 : 0], x[HEADS > 2 ? 2 : 0], x[HEADS > 3 ? 3 : 0]);
    }

    // Scales, or minima, of key channels c to c + VF; those past the last channel are 0.
    KVA_INLINE vf key_params(const uint8_t* params, int c) const {
        const uint8_t* from = params + 2 * c;
        return from_fp16(c + VF <= pool.key_dim ? load_as<vh>(from) : load_part_as<vh>(from, pool.key_dim - c));
    }

    // Of value parameters, made finite: hidden tokens may hold anything, and a weight of 0 does not make NaN 0.
    KVA_INLINE static vf value_params(const uint8_t* params) {
        return vmax(vmin(from_fp16(load_as<vh>(params)), set1(65504.0f)), set1(-65504.0f));
    }

    template <int HEADS>
    void scores_of(const Tile& tile, const float* q, float* out) const {
        const int dim = pool.key_dim;
        const uint8_t *scales = tile.block + pool.key_params_at, *minima = scales + 2 * dim;
        vf most[HEADS] = {}, base[HEADS] = {};
        for (int c = 0; c < dim; c += VF) {
            const vf scale = key_params(scales, c), minimum = key_params(minima, c);
            for (int h = 0; h < HEADS; ++h) {
                const vf query = load(q + h * shape.q_stride + c);
                most[h] = max_size(most[h], query * scale);
                base[h] = fma(query, minimum, base[h]);
            }
        }
        const vf4 peak = maxima(most), offset = totals(base), up = to_integers(peak, 127.0f), down = peak / 127.0f;
        for (int c = 0; c < dim; c += VF) {
            const vf scale = key_params(scales, c);
            vf x[HEADS];
            for (int h = 0; h < HEADS; ++h) x[h] = load(q + h * shape.q_stride + c) * scale * up[h];
            store_factors(factors + PACKED_HEADS * c, x);
        }
        prefetch_next(tile.next, pool.key_params_at, 4 * dim);
        vf sums[HEADS][QUAD_VF];
        dot_runs<BITS, HEADS>(tile.block, (dim + 3) / 4, factors, tile.next, sums);
        for (int h = 0; h < HEADS; ++h) {
            for (int v = 0; v < QUAD_VF; ++v) {
                const vf score = fma(sums[h][v], set1(down[h]), set1(offset[h]));
                store(out + h * shape.score_stride + v * VF, score);
            }
        }
    }

    template <int HEADS>
    KVA_INLINE void round_weights(const Tile& tile, int group, int groups, const float* weights,
                                  RoundedWeights& to) const {
        const int64_t scales_at = pool.value_params_at + group * 2 * QUADS, minima_at = scales_at + groups * 2 * QUADS;
        vf weight[QUAD_VF][HEADS], most[HEADS] = {}, base[HEADS] = {};
        prefetch(tile.next + scales_at);
        prefetch(tile.next + minima_at);
        for (int v = 0; v < QUAD_VF; ++v) {
            const vf scale = value_params(tile.block + scales_at + 2 * v * VF);
            const vf minimum = value_params(tile.block + minima_at + 2 * v * VF);
            for (int h = 0; h < HEADS; ++h) {
                const vf p = load(weights + h * shape.score_stride + v * VF);
                weight[v][h] = p * scale;
                most[h] = vmax(most[h], weight[v][h]);
                base[h] = fma(p, minimum, base[h]);
            }
        }
        const vf4 peak = maxima(most), offset = totals(base), up = to_integers(peak, 127.0f), step = peak / 127.0f;
        for (int v = 0; v < QUAD_VF; ++v) {
            for (int h = 0; h < HEADS; ++h) weight[v][h] *= up[h];
            store_factors(to.factors[0][0] + v * PACKED_HEADS * VF, weight[v]);
        }
        std::memcpy(to.step, &step, sizeof step);
        std::memcpy(to.offset, &offset, sizeof offset);
    }

    template <int HEADS>
    KVA_INLINE void add_group(const Tile& tile, int group, const RoundedWeights& weights, float* sums) const {
        const int64_t codes_at = pool.values_at + group * QUADS * QUADS * BITS / 8;
        vf products[HEADS][QUAD_VF];
        dot_runs<BITS, HEADS>(tile.block + codes_at, QUADS / 4, weights.factors[0][0], tile.next + codes_at, products);
        for (int h = 0; h < HEADS; ++h) {
            float* to = sums + h * shape.sum_stride;
            const vf step = set1(weights.step[h]), offset = set1(weights.offset[h]);
            for (int v = 0; v < QUAD_VF; ++v, to += VF) store(to, load(to) + fma(products[h][v], step, offset));
        }
    }
};

using Int4Reader = PackedReader<4>;
using Int2Reader = PackedReader<2>;

}  // namespace KVA_ISA

// Encodes and decodes blocks of int4 and int2: numbers to codes, one per byte, to packed runs, and back.
#pragma once
#include "convert.h"

namespace KVA_ISA {

// The codes of a whole block [32 tokens][stride], where they are bytes.
template <int BITS>
struct Codes {
    static constexpr int N = 4 * BITS, PARTS = 8 / BITS, MASK = (1 << BITS) - 1, LEVELS = MASK;
    int64_t stride;
    uint8_t* code;

    KVA_INLINE void pack_run(const uint32_t (&word)[QUADS], uint8_t* run) const {
        uint32_t packed[N];
        for (int i = 0; i < N; ++i) {
            packed[i] = word[i];
            for (int k = 1; k < PARTS; ++k) packed[i] |= word[i + N * k] << (BITS * k);
        }
        std::memcpy(run, packed, sizeof packed);
    }

    KVA_INLINE void unpack_run(const uint8_t* run, uint32_t (&word)[QUADS]) const {
        uint32_t packed[N];
        std::memcpy(packed, run, sizeof packed);
        for (int k = 0; k < PARTS; ++k) {
            for (int i = 0; i < N; ++i) word[i + N * k] = packed[i] >> (BITS * k) & (MASK * 0x01010101u);
        }
    }

    void pack_keys(uint8_t* to, int dim) const {
        for (int c = 0; c < dim; c += 4, to += 4 * N) {
            uint32_t word[QUADS];
            for (int t = 0; t < QUADS; ++t) word[t] = load_as<uint32_t>(code + t * stride + c);
            pack_run(word, to);
        }
    }

    void unpack_keys(const uint8_t* from, int dim) const {
        for (int c = 0; c < dim; c += 4, from += 4 * N) {
            uint32_t word[QUADS];
            unpack_run(from, word);
            for (int t = 0; t < QUADS; ++t) std::memcpy(code + t * stride + c, &word[t], 4);
        }
    }

    void pack_values(uint8_t* to, int dim) const {
        for (int c = 0; c < dim; c += QUADS) {
            for (int t = 0; t < QUADS; t += 4, to += 4 * N) {
                const uint8_t* row = code + t * stride + c;
                uint32_t word[QUADS];
                for (int i = 0; i < QUADS; ++i) {
                    word[i] = row[i] | row[stride + i] << 8 | row[2 * stride + i] << 16 |
                              (uint32_t)row[3 * stride + i] << 24;
                }
                pack_run(word, to);
            }
        }
    }

    void unpack_values(const uint8_t* from, int dim) const {
        for (int c = 0; c < dim; c += QUADS) {
            for (int t = 0; t < QUADS; t += 4, from += 4 * N) {
                uint32_t word[QUADS];
                unpack_run(from, word);
                uint8_t* row = code + t * stride + c;
                for (int j = 0; j < 4; ++j) {
                    for (int i = 0; i < QUADS; ++i) row[j * stride + i] = (uint8_t)(word[i] >> (8 * j));
                }
            }
        }
    }

    // Codes of VF numbers; those with scale 0 are 0.
    static KVA_INLINE void quantise(vf x, vf minimum, vf scale, uint8_t* to, int n) {
        const vf level = vmax(vmin((x - minimum) / scale, set1((float)LEVELS)), vf{});
        int8_t part[VF];
        store_int8(part, scale > 0.0f ? level : vf{});
        std::memcpy(to, part, n);
    }

    // Rounds scales and minima to float16, as they are stored.
    static KVA_INLINE void round_params(vf least, vf greatest, vh& scale, vh& minimum) {
        scale = to_fp16(vmin((greatest - least) / (float)LEVELS, set1(HALF_MAX)));
        minimum = to_fp16(vmax(vmin(least, set1(HALF_MAX)), set1(-HALF_MAX)));
        minimum = minimum == 0x8000 ? vh{} : minimum;  // a zero has no sign, whichever zero was the least
    }

    template <class From>
    void encode_keys(const uint8_t* from, const kva_pool& pool, uint8_t* block) const {
        const int dim = pool.key_dim;
        uint8_t* params = block + pool.key_params_at;
        by_vectors(dim, [&](int c, int n) {
            const uint8_t* column = from + c * From::BYTES;
            vf least = set1(INF), greatest = set1(-INF);
            for (int t = 0; t < QUADS; ++t) {
                const vf x = load_element<From>(column + t * dim * From::BYTES, n);
                least = vmin(least, x);
                greatest = vmax(greatest, x);
            }
            vh scale, minimum;
            round_params(least, greatest, scale, minimum);
            store_as(params + 2 * c, scale, n);
            store_as(params + 2 * (dim + c), minimum, n);
            for (int t = 0; t < QUADS; ++t) {
                const vf x = load_element<From>(column + t * dim * From::BYTES, n);
                quantise(x, from_fp16(minimum), from_fp16(scale), code + t * stride + c, n);
            }
        });
        for (int t = 0; t < QUADS; ++t) std::memset(code + t * stride + dim, 0, -dim & 3);
        pack_keys(block, dim);
    }

    template <class From>
    void encode_values(const uint8_t* from, const kva_pool& pool, uint8_t* block) const {
        const int dim = pool.value_dim;
        const int groups = (dim + QUADS - 1) / QUADS;
        uint8_t* params = block + pool.value_params_at;
        for (int t = 0; t < QUADS; ++t) {
            for (int g = 0; g < groups; ++g) {
                const int width = dim - g * QUADS < QUADS ? dim - g * QUADS : QUADS;
                const uint8_t* row = from + ((int64_t)t * dim + g * QUADS) * From::BYTES;
                uint8_t* to = code + t * stride + g * QUADS;
                vf least = set1(INF), greatest = set1(-INF);
                by_vectors(width, [&](int c, int n) {
                    vf x = load_element<From>(row + c * From::BYTES, n);
                    if (n < VF) x = iota() < n ? x : set1(x[0]);  // what is not there moves no minimum
                    least = vmin(least, x);
                    greatest = vmax(greatest, x);
                });
                vh scale, minimum;
                round_params(set1(-hmax(-least)), set1(hmax(greatest)), scale, minimum);
                put16(params + 2 * (g * QUADS + t), scale[0]);
                put16(params + 2 * ((groups + g) * QUADS + t), minimum[0]);
                by_vectors(width, [&](int c, int n) {
                    const vf x = load_element<From>(row + c * From::BYTES, n);
                    quantise(x, from_fp16(minimum), from_fp16(scale), to + c, n);
                });
                std::memset(to + width, 0, QUADS - width);
            }
        }
        pack_values(block + pool.values_at, dim);
    }

    template <class To>
    void decode_keys(const kva_pool& pool, const uint8_t* block, uint8_t* to) const {
        const int dim = pool.key_dim;
        const uint8_t* params = block + pool.key_params_at;
        unpack_keys(block, dim);
        by_vectors(dim, [&](int c, int n) {
            const vf scale = load_element<Fp16>(params + 2 * c, n);
            const vf minimum = load_element<Fp16>(params + 2 * (dim + c), n);
            for (int t = 0; t < QUADS; ++t) {
                const vf level = load_element<Int8>(code + t * stride + c, n);
                store_element(To{}, to + ((int64_t)t * dim + c) * To::BYTES, fma(level, scale, minimum), n);
            }
        });
    }

    template <class To>
    void decode_values(const kva_pool& pool, const uint8_t* block, uint8_t* to) const {
        const int dim = pool.value_dim;
        const int groups = (dim + QUADS - 1) / QUADS;
        const uint8_t* params = block + pool.value_params_at;
        unpack_values(block + pool.values_at, dim);
        for (int t = 0; t < QUADS; ++t) {
            for (int g = 0; g < groups; ++g) {
                const vf scale = set1(float_of(get16(params + 2 * (g * QUADS + t))));
                const vf minimum = set1(float_of(get16(params + 2 * ((groups + g) * QUADS + t))));
                const int first = g * QUADS, width = dim - first < QUADS ? dim - first : QUADS;
                by_vectors(width, [&](int c, int n) {
                    const vf level = load_element<Int8>(code + t * stride + first + c, n);
                    uint8_t* at = to + ((int64_t)t * dim + first + c) * To::BYTES;
                    store_element(To{}, at, fma(level, scale, minimum), n);
                });
            }
        }
    }
};

}  // namespace KVA_ISA

// Keys of any format as column sums want them: decoded to float32, panel by panel, channel by channel.
#pragma once
#include "packed_codes.h"

namespace KVA_ISA {

constexpr int KEYS_AT_ONCE = 32;  // slots decoded at a time: a packed block
constexpr int WIDTH = 2 * VF;     // keys of a panel
constexpr int MAX_KEY_DIM = 256;
static_assert(KEYS_AT_ONCE % WIDTH == 0 && KEYS_AT_ONCE == QUADS);

// Room to decode in.
struct KeyRoom {
    alignas(64) float rows[KEYS_AT_ONCE * MAX_KEY_DIM];
    alignas(64) uint8_t narrow[KEYS_AT_ONCE * MAX_KEY_DIM * 2];  // of 16-bit queries
    alignas(64) uint8_t codes[KEYS_AT_ONCE * MAX_KEY_DIM];
};

KVA_INLINE const uint8_t* block_of(const kva_part& part, const int32_t* table, int64_t slot) {
    return part.pool->memory + (int64_t)table[slot / part.pool->block_size] * 64;
}

// One key of a format that has rows, in the type of the queries.
template <class To>
void read_key(const kva_pool& pool, const uint8_t* block, int64_t offset, uint8_t* to) {
    const int dim = pool.key_dim;
    if (pool.format == KVA_INT8) {
        const uint8_t* codes = block + offset * dim;
        const vf scale = set1(float_of(get16(block + pool.key_params_at + 2 * offset)));
        by_vectors(dim, [&](int c, int n) {
            store_element(To{}, to + c * To::BYTES, load_element<Int8>(codes + c, n) * scale, n);
        });
        return;
    }
    with_float(pool.format, [&](auto from) {
        using From = decltype(from);
        convert_row<From, To>(block + offset * dim * From::BYTES, to, dim);
    });
}

// Up to 32 keys from a slot on, in the type of the queries. In packed formats a block starts there, and is read whole.
template <class To>
void read_keys(const kva_part& part, const int32_t* table, int64_t first, int count, uint8_t* to, uint8_t* codes) {
    const kva_pool& pool = *part.pool;
    const int64_t stride = rounded(pool.key_dim, QUADS);
    if (pool.format == KVA_INT4) return Codes<4>{stride, codes}.decode_keys<To>(pool, block_of(part, table, first), to);
    if (pool.format == KVA_INT2) return Codes<2>{stride, codes}.decode_keys<To>(pool, block_of(part, table, first), to);
    for (int64_t slot = first; slot < first + count; ++slot, to += pool.key_dim * To::BYTES) {
        read_key<To>(pool, block_of(part, table, slot), slot % pool.block_size, to);
    }
}

// rows [32][dim], of which `count` are there, to panels [32 / WIDTH][dim][WIDTH]; the others become zeros.
inline void to_panels(float* rows, int count, int dim, float* panels) {
    std::memset(rows + (int64_t)count * dim, 0, (int64_t)(KEYS_AT_ONCE - count) * dim * sizeof(float));
    for (int at = 0; at < KEYS_AT_ONCE; at += 4) {
        const float *a = rows + at * dim, *b = a + dim, *c = b + dim, *d = c + dim;
        float* to = panels + (int64_t)at / WIDTH * WIDTH * dim + at % WIDTH;
        for (int i = 0; i < dim; ++i, to += WIDTH) {
            const vf4 four{a[i], b[i], c[i], d[i]};
            std::memcpy(to, &four, sizeof four);
        }
    }
}

}  // namespace KVA_ISA

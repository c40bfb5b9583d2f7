// Keys and values of any format, slot by slot, decoded to floats: what prompts read of the cache.
#pragma once
#include "packed_codes.h"

namespace KVA_ISA {

constexpr int KEYS_AT_ONCE = 32;  // slots decoded at a time: a packed block
constexpr int WIDTH = 2 * VF;     // keys of a panel
constexpr int MAX_DIM = 256;
static_assert(KEYS_AT_ONCE % WIDTH == 0 && KEYS_AT_ONCE == QUADS);

// Room to decode in.
struct RowRoom {
    alignas(64) float rows[KEYS_AT_ONCE * MAX_DIM];
    alignas(64) uint8_t narrow[KEYS_AT_ONCE * MAX_DIM * 2];  // of 16-bit queries
    alignas(64) uint8_t codes[KEYS_AT_ONCE * MAX_DIM];
};

KVA_INLINE const uint8_t* block_of(const kva_part& part, const int32_t* table, int64_t slot) {
    return part.pool->memory + (int64_t)table[slot / part.pool->block_size] * 64;
}

// The position of the token in a slot of a lane; NO_TOKEN if there is none.
KVA_INLINE int32_t position_in(const kva_part& part, const int32_t* table, int64_t slot, int32_t no_token) {
    if (part.dense_start >= 0) return (int32_t)(part.dense_start + slot);
    const kva_pool& pool = *part.pool;
    const int32_t found =
        load_as<int32_t>(block_of(part, table, slot) + pool.positions_at + 4 * (slot % pool.block_size));
    return found < 0 ? no_token : found;
}

// A key, or a value, of a format that has rows, in the type of the queries.
template <class To>
void read_row(const kva_pool& pool, bool values, const uint8_t* block, int64_t offset, uint8_t* to) {
    const int dim = values ? pool.value_dim : pool.key_dim;
    const uint8_t* const from = block + (values ? pool.values_at : 0);
    if (pool.format == KVA_INT8) {
        const uint8_t* const params = block + (values ? pool.value_params_at : pool.key_params_at);
        const vf scale = set1(float_of(get16(params + 2 * offset)));
        by_vectors(dim, [&](int c, int n) {
            store_element(To{}, to + c * To::BYTES, load_element<Int8>(from + offset * dim + c, n) * scale, n);
        });
        return;
    }
    with_float(pool.format, [&](auto element) {
        using From = decltype(element);
        convert_row<From, To>(from + offset * dim * From::BYTES, to, dim);
    });
}

template <int BITS, class To>
void read_packed(const kva_pool& pool, bool values, const uint8_t* block, uint8_t* to, uint8_t* room) {
    const Codes<BITS> codes{rounded(values ? pool.value_dim : pool.key_dim, QUADS), room};
    values ? codes.template decode_values<To>(pool, block, to) : codes.template decode_keys<To>(pool, block, to);
}

// Up to 32 keys, or values, from a slot on, in the type of the queries. In packed formats a block starts there, and is
// read whole.
template <class To>
void read_slots(const kva_part& part, bool values, const int32_t* table, int64_t first, int count, uint8_t* to,
                uint8_t* codes) {
    const kva_pool& pool = *part.pool;
    if (pool.format == KVA_INT4) return read_packed<4, To>(pool, values, block_of(part, table, first), to, codes);
    if (pool.format == KVA_INT2) return read_packed<2, To>(pool, values, block_of(part, table, first), to, codes);
    const int64_t step = (values ? pool.value_dim : pool.key_dim) * To::BYTES;
    for (int64_t slot = first; slot < first + count; ++slot, to += step) {
        read_row<To>(pool, values, block_of(part, table, slot), slot % pool.block_size, to);
    }
}

// Rows of numbers in one tensor: the chunk's own keys, or values.
struct OwnRows {
    const uint8_t* base;
    int64_t token, head;  // strides, elements
};

// Up to 32 rows of dim floats into room.rows: of a part's lane, from a slot on, or of a chunk, from a token on.
template <class Element>
void load_rows(const kva_part* part, const int32_t* table, bool values, const OwnRows& own, int head, int64_t first,
               int count, int dim, RowRoom& room) {
    constexpr bool WIDE = std::is_same_v<Element, Fp32>;
    uint8_t* const to = WIDE ? (uint8_t*)room.rows : room.narrow;
    if (part) {
        read_slots<Element>(*part, values, table, first, count, to, room.codes);
    } else {
        for (int t = 0; t < count; ++t) {
            const uint8_t* row = own.base + ((first + t) * own.token + head * own.head) * Element::BYTES;
            std::memcpy(to + t * dim * Element::BYTES, row, dim * Element::BYTES);
        }
    }
    if (!WIDE) convert_row<Element, Fp32>(to, (uint8_t*)room.rows, count * dim);
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

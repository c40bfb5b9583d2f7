// Encodes, decodes, writes and copies keys and values of blocks; the codes are those of kernels/blocks/reference.py.
//
// Codes are quotients rounded to nearest even: divided, never multiplied by a reciprocal, so that every form and every
// processor stores the same bytes.
#include <cstdlib>

#include "packed_codes.h"

namespace KVA_ISA {
namespace {

constexpr int64_t GRANULE = 64;
constexpr int MAX_DIM = 1024;

uint8_t* block_at(const kva_pool& pool, int64_t id) { return pool.memory + id * GRANULE; }

// One side of the blocks of a pool: the keys, or the values.
struct Side {
    int64_t codes_at, params_at;
    int dim;
};
Side keys_of(const kva_pool& pool) { return {0, pool.key_params_at, pool.key_dim}; }
Side values_of(const kva_pool& pool) { return {pool.values_at, pool.value_params_at, pool.value_dim}; }

template <class From>
void write_int8(const uint8_t* from, int8_t* codes, uint8_t* scale_to, int dim) {
    vf most{};
    by_vectors(dim, [&](int c, int n) { most = vmax(most, vabs(load_element<From>(from + c * From::BYTES, n))); });
    const float wanted = hmax(most) / 127.0f;
    const uint16_t stored = fp16_of(wanted < HALF_MAX ? wanted : HALF_MAX);
    put16(scale_to, stored);
    if (stored == 0) {
        std::memset(codes, 0, dim);
        return;
    }
    const vf scale = set1(float_of(stored)), top = set1(127.0f);
    by_vectors(dim, [&](int c, int n) {
        const vf code = vmax(vmin(load_element<From>(from + c * From::BYTES, n) / scale, top), -top);
        if (n == VF) return store_int8(codes + c, code);
        int8_t part[VF];
        store_int8(part, code);
        std::memcpy(codes + c, part, n);
    });
}

// Writes one token's key or value; false: the pool's format has no rows.
template <class From>
bool write_row(const kva_pool& pool, const Side& side, uint8_t* block, int64_t slot, const uint8_t* from) {
    uint8_t* codes = block + side.codes_at;
    if (pool.format == KVA_INT8) {
        write_int8<From>(from, (int8_t*)codes + slot * side.dim, block + side.params_at + 2 * slot, side.dim);
        return true;
    }
    return with_float(pool.format, [&](auto to) {
        using To = decltype(to);
        convert_row<From, To>(from, codes + slot * side.dim * To::BYTES, side.dim);
    });
}

template <int BITS, class From>
void encode_packed(const kva_pool& pool, uint8_t* block, const uint8_t* k, const uint8_t* v) {
    alignas(64) uint8_t room[QUADS * MAX_DIM];
    Codes<BITS>{rounded(pool.key_dim, QUADS), room}.template encode_keys<From>(k, pool, block);
    Codes<BITS>{rounded(pool.value_dim, QUADS), room}.template encode_values<From>(v, pool, block);
}

template <class From>
void encode_block(const kva_pool& pool, uint8_t* block, const uint8_t* k, const uint8_t* v) {
    if (pool.format == KVA_INT4) return encode_packed<4, From>(pool, block, k, v);
    if (pool.format == KVA_INT2) return encode_packed<2, From>(pool, block, k, v);
    for (int t = 0; t < pool.block_size; ++t) {
        write_row<From>(pool, keys_of(pool), block, t, k + (int64_t)t * pool.key_dim * From::BYTES);
        write_row<From>(pool, values_of(pool), block, t, v + (int64_t)t * pool.value_dim * From::BYTES);
    }
}

template <int BITS, class To>
void decode_packed(const kva_pool& pool, const uint8_t* block, bool values, uint8_t* to) {
    alignas(64) uint8_t room[QUADS * MAX_DIM];
    if (values) {
        Codes<BITS>{rounded(pool.value_dim, QUADS), room}.template decode_values<To>(pool, block, to);
    } else {
        Codes<BITS>{rounded(pool.key_dim, QUADS), room}.template decode_keys<To>(pool, block, to);
    }
}

template <class To>
void decode_block(const kva_pool& pool, const uint8_t* block, bool values, uint8_t* to) {
    if (pool.format == KVA_INT4) return decode_packed<4, To>(pool, block, values, to);
    if (pool.format == KVA_INT2) return decode_packed<2, To>(pool, block, values, to);
    const Side side = values ? values_of(pool) : keys_of(pool);
    const uint8_t* codes = block + side.codes_at;
    const int64_t step = side.dim * To::BYTES;
    if (pool.format == KVA_INT8) {
        for (int t = 0; t < pool.block_size; ++t, to += step, codes += side.dim) {
            const vf scale = set1(float_of(get16(block + side.params_at + 2 * t)));
            by_vectors(side.dim, [&](int c, int n) {
                store_element(To{}, to + c * To::BYTES, load_element<Int8>(codes + c, n) * scale, n);
            });
        }
        return;
    }
    with_float(pool.format, [&](auto from) {
        using From = decltype(from);
        convert_row<From, To>(codes, to, pool.block_size * side.dim);
    });
}

int check(const kva_pool& pool) {
    if (pool.format < KVA_FP32 || pool.format > KVA_INT2) return KVA_EFORMAT;
    const bool packed = pool.format >= KVA_INT4;
    if (packed && (pool.block_size != QUADS || pool.key_dim > MAX_DIM || pool.value_dim > MAX_DIM)) return KVA_ESHAPE;
    return KVA_OK;
}

// What a slot has in a block, in up to four spans: key, value, their scales.
struct Span {
    int64_t at, bytes;
};
int spans_of(const kva_pool& pool, Span (&spans)[4]) {
    const int64_t element = pool.format == KVA_FP32 ? 4 : pool.format == KVA_INT8 ? 1 : 2;
    spans[0] = {0, pool.key_dim * element};
    spans[1] = {pool.values_at, pool.value_dim * element};
    if (pool.format != KVA_INT8) return 2;
    spans[2] = {pool.key_params_at, 2};
    spans[3] = {pool.value_params_at, 2};
    return 4;
}

}  // namespace
}  // namespace KVA_ISA

using namespace KVA_ISA;

// Writes n whole blocks: k [n, block_size, key_dim], v [n, block_size, value_dim], floats of one format.
KVA_EXPORT(kva_encode_blocks)(const kva_pool* pool, const int64_t* ids, int64_t n, const uint8_t* k, const uint8_t* v,
                              int32_t format, int32_t threads) {
    if (const int error = check(*pool)) return error;
    const bool known = with_float(format, [&](auto from) {
        using From = decltype(from);
        const int64_t k_step = (int64_t)pool->block_size * pool->key_dim * From::BYTES;
        const int64_t v_step = (int64_t)pool->block_size * pool->value_dim * From::BYTES;
        for_each(n, threads, [&](int64_t i) {
            encode_block<From>(*pool, block_at(*pool, ids[i]), k + i * k_step, v + i * v_step);
        });
    });
    return known ? KVA_OK : KVA_EFORMAT;
}

// Reads the keys (the values, if `values`) of n blocks into out [n, block_size, dim], floats of one format.
KVA_EXPORT(kva_read_blocks)(const kva_pool* pool, const int32_t* ids, int64_t n, int32_t values, uint8_t* out,
                            int32_t format, int32_t threads) {
    if (const int error = check(*pool)) return error;
    const bool known = with_float(format, [&](auto to) {
        using To = decltype(to);
        const int64_t step = (int64_t)pool->block_size * (values ? pool->value_dim : pool->key_dim) * To::BYTES;
        for_each(n, threads, [&](int64_t i) {
            decode_block<To>(*pool, block_at(*pool, ids[i]), values, out + i * step);
        });
    });
    return known ? KVA_OK : KVA_EFORMAT;
}

// Writes n tokens into slots: k [n, key_dim], v [n, value_dim] or null, floats of one format. Blocks and offsets lie in
// rows of `width`, `stride` apart.
KVA_EXPORT(kva_write_slots)(const kva_pool* pool, const int64_t* blocks, const int64_t* offsets, int64_t n,
                            int64_t width, int64_t stride, const uint8_t* k, const uint8_t* v, int32_t format) {
    if (pool->format >= KVA_INT4) return KVA_EFORMAT;
    if (const int error = check(*pool)) return error;
    const bool known = with_float(format, [&](auto from) {
        using From = decltype(from);
        const int64_t k_step = pool->key_dim * From::BYTES, v_step = pool->value_dim * From::BYTES;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = i / width * stride + i % width;
            uint8_t* block = block_at(*pool, blocks[at]);
            write_row<From>(*pool, keys_of(*pool), block, offsets[at], k + i * k_step);
            if (v) write_row<From>(*pool, values_of(*pool), block, offsets[at], v + i * v_step);
        }
    });
    return known ? KVA_OK : KVA_EFORMAT;
}

// Copies n tokens between slots, each (blocks[i], offsets[i]); all are read before any is written.
KVA_EXPORT(kva_copy_slots)(const kva_pool* pool, const int64_t* from_blocks, const int64_t* from_offsets,
                           const int64_t* to_blocks, const int64_t* to_offsets, int64_t n) {
    if (pool->format >= KVA_INT4) return KVA_EFORMAT;
    if (const int error = check(*pool)) return error;
    Span spans[4];
    const int count = spans_of(*pool, spans);
    int64_t bytes = 0;
    for (int s = 0; s < count; ++s) bytes += spans[s].bytes;
    uint8_t* const room = (uint8_t*)std::malloc(bytes * n + 1);
    if (!room) return KVA_EMEMORY;
    uint8_t* at = room;
    for (int64_t i = 0; i < n; ++i) {
        for (int s = 0; s < count; at += spans[s++].bytes) {
            const uint8_t* slot = block_at(*pool, from_blocks[i]) + spans[s].at + from_offsets[i] * spans[s].bytes;
            std::memcpy(at, slot, spans[s].bytes);
        }
    }
    at = room;
    for (int64_t i = 0; i < n; ++i) {
        for (int s = 0; s < count; at += spans[s++].bytes) {
            uint8_t* slot = block_at(*pool, to_blocks[i]) + spans[s].at + to_offsets[i] * spans[s].bytes;
            std::memcpy(slot, at, spans[s].bytes);
        }
    }
    std::free(room);
    return KVA_OK;
}

// Scores blocks by the bounds of their keys: what a query's product with any of their tokens cannot exceed.
#include "convert.h"

namespace KVA_ISA {
namespace {

constexpr int64_t COLUMNS_AT_ONCE = 64;  // of a lane, a piece of work for a thread

// The largest bound of HEADS queries.
template <int HEADS>
float upper_bound(const uint8_t* bounds, int dim, const float* q) {
    vf sum[HEADS] = {};
    by_vectors(dim, [&](int c, int n) {
        const vf least = load_element<Fp32>(bounds + 4 * c, n);
        const vf greatest = load_element<Fp32>(bounds + 4 * (dim + c), n);
        for (int h = 0; h < HEADS; ++h) {
            const vf query = load_element<Fp32>((const uint8_t*)(q + h * dim + c), n);
            sum[h] += vmax(query * least, query * greatest);
        }
    });
    float most = -INF;
    for (int h = 0; h < HEADS; ++h) {
        const float bound = hsum(sum[h]);
        most = bound > most ? bound : most;
    }
    return most;
}

float score_of(const kva_pool& pool, const uint8_t* bounds, const float* q, int group) {
    const int dim = pool.key_dim;
    if (load_as<float>(bounds) > load_as<float>(bounds + 4 * dim)) return -INF;  // no token in this block
    float most = -INF;
    by_heads(group, [&](int h, auto heads) {
        const float bound = upper_bound<decltype(heads)::value>(bounds, dim, q + (int64_t)h * dim);
        most = bound > most ? bound : most;
    });
    return most;
}

}  // namespace
}  // namespace KVA_ISA

using namespace KVA_ISA;

// Minima, then maxima of the key channels lie `bounds_at` bytes from the start of a block, float32.
// q [rows, heads * group, key_dim] float32; out [rows, heads, columns]: -infinity past the length of a lane.
KVA_EXPORT(kva_score_bounds)(const kva_part* part, int32_t bounds_at, const float* q, int64_t rows, int64_t heads, int32_t group,
                             float* out, int32_t threads) {
    const kva_pool& pool = *part->pool;
    const int64_t columns = part->columns, pieces = (columns + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
    for_each(rows * heads * pieces, threads, [&](int64_t item) {
        const int64_t lane = item / pieces, row = lane / heads, head = lane % heads;
        const int64_t first = item % pieces * COLUMNS_AT_ONCE;
        const int64_t until = first + COLUMNS_AT_ONCE < columns ? first + COLUMNS_AT_ONCE : columns;
        const int64_t length = part->length[row * part->length_row + head * part->length_lane];
        const int64_t used = (length + pool.block_size - 1) / pool.block_size;
        const int32_t* table = part->table + row * part->table_row + head * part->table_lane;
        const float* queries = q + lane * group * pool.key_dim;
        for (int64_t c = first; c < until; ++c) {
            float* const score = out + lane * columns + c;
            if (c >= used) {
                *score = -INF;
                continue;
            }
            const uint8_t* bounds = pool.memory + (int64_t)table[c] * 64 + bounds_at;
            if (c + 1 < until && c + 1 < used) {
                prefetch_next(pool.memory + (int64_t)table[c + 1] * 64, bounds_at, 8 * pool.key_dim);
            }
            *score = score_of(pool, bounds, queries, group);
        }
    });
    return KVA_OK;
}

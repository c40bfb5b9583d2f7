// What the driver of decode attention asks a reader for, a tile of tokens at a time.
//
// A reader knows one format. The driver makes one per lane and part and calls, tile by tile, `scores`, then `add`:
//
//   struct Reader {
//       static constexpr bool SCATTERS;              // takes tiles whose tokens lie in any slots of any blocks
//       static int64_t scratch(const kva_pool& pool, const Shape& shape);  // bytes it wants for a lane, a multiple of 64
//       Reader(const kva_pool& pool, const Shape& shape, const float* q, void* scratch);
//       void scores(const Tile& tile, float* out);
//       void add(const Tile& tile, const float* weights, float* sums);
//   };
//
// `q` [group][q_stride] are the queries, already multiplied by the scale; zeros from key_dim to q_stride.
// `scores` writes the dot products of the first tile.count tokens to out [group][score_stride]; what lies behind them,
// up to score_stride, may be overwritten with anything. Tokens that are hidden are in dense tiles of readers that do
// not scatter: their score is ignored, and their memory may hold anything, NaN included.
// `add` adds to sums [group][sum_stride] each token's value times its weight [group][score_stride]. Weights are 0 from
// tile.count on. Where all heads' weights of a token are 0 the token may be hidden: a reader that does not scatter must
// keep what the token's memory holds (NaN) out of the sums. Sums behind value_dim may be overwritten with numbers.
// All buffers are aligned to 64 bytes and their strides are multiples of 16 floats (of 32: sums).
#pragma once
#include "../abi.h"
#include "../simd.h"

namespace KVA_ISA {

struct Shape {
    int group;                                  // query heads of a KV head
    int64_t q_stride, score_stride, sum_stride;  // floats
};

struct Tile {
    int count;             // tokens, at most score_stride
    const uint8_t* block;  // a dense tile: slots 0 to count - 1 of this block; null in a scattered one
    const uint8_t* next;   // a block to prefetch while this one is worked on; never null, maybe this one
    const uint8_t* const* blocks;  // a scattered tile: token i is slot offsets[i] of blocks[i]
    const int32_t* offsets;
};

// Prefetches what lies as far from the start of tile.next as [from, from + bytes) from the start of a block.
KVA_INLINE void prefetch_next(const uint8_t* next, int64_t from, int64_t bytes) {
    for (int64_t at = from; at < from + bytes; at += 64) prefetch(next + at);
}

}  // namespace KVA_ISA

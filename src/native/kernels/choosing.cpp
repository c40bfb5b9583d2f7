// What a selector chooses: the best of many scores, lane by lane, and the blocks that a choice leaves of a lane.
#include <algorithm>
#include <cstdlib>

#include "../abi.h"
#include "../simd.h"

// Mirrored in kernels/choosing/native.py.
struct kva_best {
    const float* score;    // [lanes, n], contiguous
    const int64_t* number;  // [lanes], how many to choose
    const int64_t* always;  // [lanes], one that is among them in any case; or null
    int64_t* index;        // [lanes, most], to be written: ascending, behind them the last of all n
    int64_t* count;        // [lanes], to be written
    int64_t lanes, n, most;
};

struct kva_cut {
    const int32_t* table;   // [R, H, C]
    int64_t table_row, table_lane;  // strides, elements
    const int64_t* length;  // [R, H], contiguous: slots in use
    const int64_t* index;   // [R, H, n], contiguous, ascending: chosen blocks
    const int64_t* count;   // [R, H], how many of these are meant
    int32_t* out;           // [R, H, n], to be written: the blocks that are the lane's, behind them its last
    int64_t* read;          // [R, H], to be written: slots in use of these
    int64_t rows, heads, columns, n;
    int64_t first;          // the number of the lane's first block
    int64_t size;           // slots of a block
};

namespace KVA_ISA {
namespace {

void best_of(const kva_best& args, int64_t lane, int64_t* order) {
    const float* const score = args.score + lane * args.n;
    const int64_t always = args.always ? args.always[lane] : -1;
    int64_t candidates = 0;
    for (int64_t i = 0; i < args.n; ++i) {
        if (i != always && score[i] > -INF) order[candidates++] = i;  // NaN is never chosen
    }
    int64_t wanted = args.number[lane] < args.most ? args.number[lane] : args.most;
    const bool holds = always >= 0 && always < args.n && wanted > 0;
    wanted -= holds;
    if (wanted < 0) wanted = 0;
    if (candidates > wanted) {
        // Of equal scores the earlier, so that no padding and nobody else in the batch decides.
        std::nth_element(order, order + wanted, order + candidates, [&](int64_t a, int64_t b) {
            return score[a] > score[b] || (score[a] == score[b] && a < b);
        });
        candidates = wanted;
    }
    if (holds) order[candidates++] = always;
    std::sort(order, order + candidates);
    int64_t* const to = args.index + lane * args.most;
    std::copy(order, order + candidates, to);
    std::fill(to + candidates, to + args.most, args.n - 1);
    args.count[lane] = candidates;
}

}  // namespace
}  // namespace KVA_ISA

KVA_EXPORT(kva_choose_best)(const kva_best* args) {
    if (args->n < 1 || args->most < 1 || args->lanes < 0) return KVA_ESHAPE;
    int64_t* const order = (int64_t*)std::malloc((args->n + 1) * sizeof(int64_t));
    if (!order) return KVA_EMEMORY;
    for (int64_t lane = 0; lane < args->lanes; ++lane) KVA_ISA::best_of(*args, lane, order);
    std::free(order);
    return KVA_OK;
}

KVA_EXPORT(kva_cut_blocks)(const kva_cut* args) {
    if (args->size < 1 || args->columns < 1 || args->n < 1) return KVA_ESHAPE;
    for (int64_t r = 0; r < args->rows; ++r) {
        for (int64_t h = 0; h < args->heads; ++h) {
            const int64_t lane = r * args->heads + h, length = args->length[lane];
            const int32_t* const table = args->table + r * args->table_row + h * args->table_lane;
            int32_t* const out = args->out + lane * args->n;
            int64_t kept = 0, read = 0;
            for (int64_t i = 0; i < args->count[lane] && i < args->n; ++i) {
                const int64_t block = args->index[lane * args->n + i] - args->first;
                if (block < 0 || block >= args->columns) continue;
                const int64_t used = length - block * args->size;
                if (used <= 0) continue;
                out[kept++] = table[block];
                read += used < args->size ? used : args->size;  // only the last block may be partly filled
            }
            args->read[lane] = read;
            std::fill(out + kept, out + args->n, table[args->columns - 1]);
        }
    }
    return KVA_OK;
}

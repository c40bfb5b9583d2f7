// Column sums: for each key, the sum over a chunk's queries and the heads of a group of exp(score - lse).
//
// Work is cut into items: a run of keys of one lane, or of the chunk itself. An item decodes its keys once, in panels
// two vectors wide, and goes through the queries a block at a time. Some rows of queries times a panel of keys are
// scores in registers, which become weights and are summed there: none is ever stored. Every sum belongs to one item
// and takes the queries in one order, whatever the number of threads. Scores are in units of log 2.
#ifdef _OPENMP
#include <omp.h>
#endif
#include <cstdlib>

#include "read_rows.h"
#include "sight.h"

// Mirrored in kernels/column_sums/native.py.
struct kva_columns {
    const uint8_t* q;            // [T, Hq, D], last dimension contiguous
    int64_t q_token, q_head;     // strides, elements
    const uint8_t* k;            // [T, H, D], the chunk's own keys, likewise
    int64_t k_token, k_head;
    const int32_t* positions;    // [T], not negative
    const float* lse;            // [Hq, T], natural logarithm; -infinity: the query saw nothing
    float* own;                  // [H, T], to be written
    int64_t window;              // visible are positions > query - window; -1: all
    int64_t sinks, recent;       // visible are positions < sinks or > query - recent; recent -1: all
    int32_t format;              // of q and k: KVA_FP32, KVA_BF16, KVA_FP16
    int32_t tokens, query_heads, kv_heads, dim;  // T, Hq, H, D
    int32_t num_parts;
    int32_t threads;
    float scale;
    float softcap;               // 0: none
};

namespace KVA_ISA {
namespace {

#if defined(KVA_ISA_avx512)
constexpr int ROWS = 12;  // 12 x 2 sums, 2 of keys and 1 of a query: 27 of 32 registers
#elif defined(KVA_ISA_avx2)
constexpr int ROWS = 6;   // 6 x 2 sums, 2 of keys and 1 of a query: 15 of 16 registers
#else
constexpr int ROWS = 4;   // products want a register too
#endif
constexpr int PANEL_VF = WIDTH / VF;
constexpr int BLOCK_ROWS = 96;                // rows of queries that stay in the L2 cache for all panels
constexpr int64_t ROW_FLOATS = MAX_DIM + 16;  // fixed, for offsets in instructions; no power of two, for the caches
constexpr int64_t KEY_FLOATS = 1 << 15;       // of an item's panels: they stay in the L2 cache for all queries
constexpr int64_t MAX_RUN = 1024;             // keys of an item
constexpr int64_t LEAST_RUN = 64;             // below that, converting queries for each item would show
constexpr int ITEMS_PER_THREAD = 4;           // that items may be unequal, and threads interrupted
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 20;  // waking a thread takes a good part of the time that these do
constexpr float LOG2_E = 1.44269504f;
static_assert(BLOCK_ROWS % ROWS == 0);

// Memory of one thread.
struct Scratch {
    alignas(64) float keys[KEY_FLOATS];
    alignas(64) float q[BLOCK_ROWS * ROW_FLOATS];
    alignas(64) float sums[MAX_RUN];
    alignas(64) int32_t position[MAX_RUN];
    Range panels[MAX_RUN / WIDTH];
    Range rows[BLOCK_ROWS / ROWS];
    float norm[BLOCK_ROWS];     // log-sum-exp; infinity where a row gives nothing
    int32_t now[BLOCK_ROWS], after[BLOCK_ROWS], near[BLOCK_ROWS];
    Eyes eyes() { return {now, after, near}; }
    RowRoom room;
};

// A run of keys.
struct Item {
    const kva_part* part;    // null: of the chunk
    const int32_t* table;
    int head;
    int64_t first;
    int64_t count, written;  // keys in use; sums to write, zeros behind
    float* sums;
};

struct Call {
    const kva_columns& args;
    const kva_part* parts;
    int group;
    int64_t run;  // keys of an item
    int32_t sinks;
    Sight sight;
    float factor, cap;  // of the queries; of the softcap's tanh

    Call(const kva_columns& args, const kva_part* parts) : args(args), parts(parts) {}

    int check() {
        if (args.tokens < 0 || args.kv_heads < 1 || args.query_heads % args.kv_heads) return KVA_ESHAPE;
        if (args.dim < 1 || args.dim > MAX_DIM) return KVA_ESHAPE;
        if (args.format < KVA_FP32 || args.format > KVA_FP16) return KVA_EFORMAT;
        for (int p = 0; p < args.num_parts; ++p) {
            const kva_pool& pool = *parts[p].pool;
            if (pool.format < KVA_FP32 || pool.format > KVA_INT2) return KVA_EFORMAT;
            if (pool.key_dim != args.dim || (parts[p].dense_start < 0 && pool.positions_at < 0)) return KVA_ESHAPE;
            if (pool.format >= KVA_INT4 && pool.block_size != QUADS) return KVA_ESHAPE;
        }
        group = args.query_heads / args.kv_heads;
        sight = {args.window, args.sinks, args.recent};
        sinks = args.sinks < INT32_MAX ? (int32_t)args.sinks : INT32_MAX;
        cap = args.softcap * LOG2_E;
        factor = args.softcap > 0 ? args.scale / args.softcap : args.scale * LOG2_E;
        return KVA_OK;
    }

    Seen seen(const Range& query, const Range& key) const { return sight.seen(query, key); }

    // What a panel of keys receives from ROWS rows of queries, from `row` on.
    template <bool HIDES, bool CAPPED>
    __attribute__((noinline)) void add_rows(Scratch& s, int row, int panel, vf (&sums)[PANEL_VF]) const {
        const float* q = s.q + row * ROW_FLOATS;
        const float* keys = s.keys + (int64_t)panel * WIDTH * args.dim;
        vf score[ROWS][PANEL_VF] = {};
        for (int64_t c = 0; c < args.dim; ++c, keys += WIDTH) {
            vf key[PANEL_VF];
            for (int n = 0; n < PANEL_VF; ++n) key[n] = load(keys + n * VF);
            KVA_UNROLL
            for (int m = 0; m < ROWS; ++m) {
                const vf query = set1(q[m * ROW_FLOATS + c]);
                for (int n = 0; n < PANEL_VF; ++n) score[m][n] = fma(query, key[n], score[m][n]);
            }
        }
        vf total[PANEL_VF] = {};
        KVA_UNROLL
        for (int m = 0; m < ROWS; ++m) {
            for (int n = 0; n < PANEL_VF; ++n) {
                vf x = score[m][n];
                if constexpr (CAPPED) x = cap * tanh(x);
                const vf weight = exp2(x - s.norm[row + m]);
                if constexpr (HIDES) {
                    const vi position = load_as<vi>(s.position + panel * WIDTH + n * VF);
                    const vi hidden = s.eyes().hidden(row + m, position, sinks);
                    total[n] += hidden ? vf{} : weight;
                } else {
                    total[n] += weight;
                }
            }
        }
        for (int n = 0; n < PANEL_VF; ++n) sums[n] += total[n];
    }

    // The same from a block of rows. The sum of a block is made apart, lest long sums lose what is small.
    template <bool CAPPED>
    void add_block(Scratch& s, int rows, const Range& block, int panel) const {
        if (seen(block, s.panels[panel]) == NONE) return;
        vf sums[PANEL_VF] = {};
        for (int row = 0; row < rows; row += ROWS) {
            switch (seen(s.rows[row / ROWS], s.panels[panel])) {
                case NONE: break;
                case SOME: add_rows<true, CAPPED>(s, row, panel, sums); break;
                case ALL: add_rows<false, CAPPED>(s, row, panel, sums); break;
            }
        }
        float* to = s.sums + panel * WIDTH;
        for (int n = 0; n < PANEL_VF; ++n) store(to + n * VF, load(to + n * VF) + sums[n]);
    }

    Range positions_of(int64_t first, int64_t end) const {
        Range range;
        for (int64_t t = first; t < end; ++t) range.add(args.positions[t]);
        return range;
    }

    // Reads rows [first, first + count) of a lane's queries, token by token, each with all heads; fills the last ROWS.
    template <class Element>
    void load_queries(Scratch& s, int head, int64_t first, int count) const {
        for (int i = 0; i < BLOCK_ROWS / ROWS; ++i) s.rows[i] = Range();
        for (int i = 0; i < count; ++i) {
            const int64_t t = (first + i) / group, h = (int64_t)head * group + (first + i) % group;
            const uint8_t* from = args.q + (t * args.q_token + h * args.q_head) * Element::BYTES;
            float* to = s.q + i * ROW_FLOATS;
            by_vectors(args.dim, [&](int c, int n) {
                const vf x = load_element<Element>(from + c * Element::BYTES, n) * factor;
                store_element(Fp32{}, (uint8_t*)(to + c), x, n);
            });
            const float lse = args.lse[h * args.tokens + t];
            const int64_t now = args.positions[t];
            s.norm[i] = lse == -INF ? INF : lse * LOG2_E;
            s.eyes().set(sight, i, now);
            s.rows[i / ROWS].add(now);
        }
        for (int i = count; i < rounded(count, ROWS); ++i) {
            std::memset(s.q + i * ROW_FLOATS, 0, ROW_FLOATS * sizeof(float));
            s.norm[i] = INF;
            s.eyes().close(i);
        }
    }

    // Notes where the keys of an item are in the sequence; returns the range of all.
    Range find(Scratch& s, const Item& item) const {
        Range all;
        const int64_t padded = rounded(item.count, KEYS_AT_ONCE);
        for (int64_t i = 0; i < padded; ++i) {
            s.position[i] = i < item.count ? position_of(item, item.first + i) : NO_TOKEN;
        }
        for (int64_t p = 0; p < padded / WIDTH; ++p) {
            Range& range = s.panels[p] = Range();
            for (int64_t i = p * WIDTH; i < (p + 1) * WIDTH; ++i) {
                range.add_key(s.position[i]);
            }
            all.add(range);
        }
        return all;
    }

    int32_t position_of(const Item& item, int64_t at) const {
        return item.part ? position_in(*item.part, item.table, at, NO_TOKEN) : args.positions[at];
    }

    // Decodes those keys of an item that some query sees.
    template <class Element>
    void decode(Scratch& s, const Item& item, const Range& queries) const {
        for (int64_t i = 0; i < item.count; i += KEYS_AT_ONCE) {
            Range range;
            for (int64_t p = i / WIDTH; p < (i + KEYS_AT_ONCE) / WIDTH; ++p) range.add(s.panels[p]);
            if (seen(queries, range) == NONE) continue;
            const int count = (int)(item.count - i < KEYS_AT_ONCE ? item.count - i : KEYS_AT_ONCE);
            const OwnRows own{args.k, args.k_token, args.k_head};
            load_rows<Element>(item.part, item.table, false, own, item.head, item.first + i, count, args.dim, s.room);
            to_panels(s.room.rows, count, args.dim, s.keys + i * args.dim);
        }
    }

    template <class Element>
    void sum_keys(Scratch& s, const Item& item) const {
        const Range keys = find(s, item);
        const int64_t rows = (int64_t)args.tokens * group, padded = rounded(item.count, KEYS_AT_ONCE);
        std::memset(s.sums, 0, padded * sizeof(float));
        decode<Element>(s, item, positions_of(0, args.tokens));
        for (int64_t first = 0; first < rows; first += BLOCK_ROWS) {
            const int count = (int)(rows - first < BLOCK_ROWS ? rows - first : BLOCK_ROWS);
            const Range block = positions_of(first / group, (first + count - 1) / group + 1);
            if (seen(block, keys) == NONE) continue;
            load_queries<Element>(s, item.head, first, count);
            for (int panel = 0; panel < padded / WIDTH; ++panel) {
                if (args.softcap > 0) {
                    add_block<true>(s, count, block, panel);
                } else {
                    add_block<false>(s, count, block, panel);
                }
            }
        }
    }

    void work(Scratch& s, const Item& item) const {
        if (item.count > 0) with_float(args.format, [&](auto element) { sum_keys<decltype(element)>(s, item); });
        const int64_t count = item.count > 0 ? item.count : 0;
        if (count) std::memcpy(item.sums, s.sums, count * sizeof(float));
        std::memset(item.sums + count, 0, (item.written - count) * sizeof(float));
    }

    // Keys of each lane, of part p or of the chunk itself, behind the parts.
    int64_t slots(int p) const {
        return p == args.num_parts ? args.tokens : (int64_t)parts[p].columns * parts[p].pool->block_size;
    }
    int64_t items(int p) const { return args.kv_heads * ((slots(p) + run - 1) / run); }

    Item item(int64_t index) const {
        int p = 0;
        for (; index >= items(p); ++p) index -= items(p);
        const int64_t runs = items(p) / args.kv_heads, first = index % runs * run, left = slots(p) - first;
        Item found{};
        found.head = (int)(index / runs);
        found.first = first;
        found.written = found.count = left < run ? left : run;
        if (p == args.num_parts) {
            found.sums = args.own + (int64_t)found.head * args.tokens + first;
            return found;
        }
        const kva_part& part = parts[p];
        const int64_t used = part.length[found.head * part.length_lane] - first;
        found.part = &part;
        found.table = part.table + found.head * part.table_lane;
        found.count = used < found.count ? used : found.count;
        found.sums = part.mass + found.head * part.mass_lane + first;
        return found;
    }

    int compute() {
        int64_t keys = 0, num_items = 0, threads = args.threads;
        for (int p = 0; p <= args.num_parts; ++p) keys += args.kv_heads * slots(p);
        const int64_t useful = 1 + keys * group * args.tokens * args.dim / PRODUCTS_PER_THREAD;
        threads = threads > useful ? useful : threads < 1 ? 1 : threads;
        const int64_t most = KEY_FLOATS / args.dim, share = threads == 1 ? most : keys / (threads * ITEMS_PER_THREAD);
        run = share < LEAST_RUN ? LEAST_RUN : share;
        run = run > most ? most : run;
        run = (run > MAX_RUN ? MAX_RUN : run) / KEYS_AT_ONCE * KEYS_AT_ONCE;
        for (int p = 0; p <= args.num_parts; ++p) num_items += items(p);
        threads = threads > num_items ? num_items : threads;
        if (!num_items) return KVA_OK;
        Scratch* const scratch = (Scratch*)std::aligned_alloc(64, threads * sizeof(Scratch));
        if (!scratch) return KVA_EMEMORY;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
        for (int64_t i = 0; i < num_items; ++i) work(scratch[omp_get_thread_num()], item(i));
#else
        for (int64_t i = 0; i < num_items; ++i) work(*scratch, item(i));
#endif
        std::free(scratch);
        return KVA_OK;
    }
};

}  // namespace
}  // namespace KVA_ISA

KVA_EXPORT(kva_column_sums)(const kva_columns* args, const kva_part* parts) {
    KVA_ISA::Call call(*args, parts);
    const int code = call.check();
    return code ? code : call.compute();
}

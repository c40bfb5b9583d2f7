// Chunk attention: the queries of prompt chunks, of several sequences at once, against each one's cached past and itself.
//
// Work is cut into items: some rows (a query and a head of the group) of one KV head of one sequence. An item goes
// through its keys a tile at a time with a running maximum (online softmax, arXiv:1805.02867): a tile's keys are decoded
// once, in panels two vectors wide, its values in rows, and both serve all rows of the item. Tiles that no row sees are
// neither decoded nor multiplied. Scores are in units of log 2. No result depends on the number of threads.
#ifdef _OPENMP
#include <omp.h>
#endif
#include <cmath>
#include <cstdlib>

#include "pieces.h"
#include "read_rows.h"
#include "sight.h"

// Mirrored in kernels/chunk_attention/native.py.
struct kva_chunk {
    const int32_t* positions;   // [tokens], not negative
    float* lse;                 // [Hq, tokens], natural logarithm, to be written; or null
    int64_t start, tokens;      // rows of q, k, v and out
    int64_t sinks, recent;      // visible are positions < sinks or > query - recent; recent -1: all
    int64_t first_part, num_parts;
};

struct kva_chunks {
    const uint8_t* q;            // [T, Hq, Dk], last dimension contiguous
    int64_t q_token, q_head;     // strides, elements
    const uint8_t* k;            // [T, H, Dk], the chunks' own keys, likewise
    int64_t k_token, k_head;
    const uint8_t* v;            // [T, H, Dv]
    int64_t v_token, v_head;
    uint8_t* out;                // [T, Hq, Dv], contiguous, to be written
    const float* sink_logits;    // [Hq], or null
    int64_t window;              // visible are positions > query - window; -1: all
    int32_t format;              // of q, k, v and out: KVA_FP32, KVA_BF16, KVA_FP16
    int32_t query_heads, kv_heads, key_dim, value_dim;  // Hq, H, Dk, Dv
    int32_t num_chunks;
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
constexpr int TILE = 2 * KEYS_AT_ONCE;        // keys
constexpr int PANELS = TILE / WIDTH;
constexpr int64_t CACHE_FLOATS = 3 << 14;     // of an item's queries and sums: they stay in the L2 cache for all keys
constexpr int MAX_ROWS = 384;
constexpr int LEAST_ROWS = 48;                // below that, decoding keys anew for each item would show
constexpr int ITEMS_PER_THREAD = 4;           // that items may be unequal, and threads interrupted
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 20;  // waking a thread takes a good part of the time that these do
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
static_assert(MAX_ROWS % ROWS == 0 && LEAST_ROWS % ROWS == 0);

struct Item {
    int chunk, head;
    int64_t first;  // row: token * group + head of the group
    int count;
};

// Memory of one thread, as large as these dimensions ask for.
struct Scratch {
    float *q, *sums;             // [rows][q_stride], [rows][sum_stride]
    float *highest, *total;      // [rows]
    float *keys, *values;        // [PANELS][key_dim][WIDTH], [TILE][sum_stride]
    float* weights;              // [ROWS][TILE]
    int32_t *position, *now, *after, *near;
    Range *rows, *panels;        // of ROWS rows, of WIDTH keys
    RowRoom* room;
    Eyes eyes() const { return {now, after, near}; }
};

// Where the keys of a tile are: of a part, or the chunk's own.
struct Source {
    const kva_part* part;  // null: the chunk's own
    const int32_t* table;
    int64_t count;         // keys
};

struct Call {
    const kva_chunks& args;
    const kva_chunk* chunks;
    const kva_part* parts;
    int group, rows;  // rows: of an item, at most
    int64_t q_stride, sum_stride;
    float factor, cap;  // of the queries; of the softcap's tanh

    Call(const kva_chunks& args, const kva_chunk* chunks, const kva_part* parts)
        : args(args), chunks(chunks), parts(parts) {}

    int check() {
        if (args.kv_heads < 1 || args.query_heads % args.kv_heads || args.num_chunks < 0) return KVA_ESHAPE;
        if (args.key_dim < 1 || args.key_dim > MAX_DIM || args.value_dim < 1 || args.value_dim > MAX_DIM) return KVA_ESHAPE;
        if (args.format < KVA_FP32 || args.format > KVA_FP16) return KVA_EFORMAT;
        for (int i = 0; i < args.num_chunks; ++i) {
            for (int64_t p = 0; p < chunks[i].num_parts; ++p) {
                const kva_part& part = parts[chunks[i].first_part + p];
                const kva_pool& pool = *part.pool;
                if (pool.format < KVA_FP32 || pool.format > KVA_INT2) return KVA_EFORMAT;
                if (pool.key_dim != args.key_dim || pool.value_dim != args.value_dim) return KVA_ESHAPE;
                if (part.dense_start < 0 && pool.positions_at < 0) return KVA_ESHAPE;
                if (pool.format >= KVA_INT4 && pool.block_size != QUADS) return KVA_ESHAPE;
            }
        }
        group = args.query_heads / args.kv_heads;
        q_stride = args.key_dim + 16;  // no power of two, for the caches
        sum_stride = rounded(args.value_dim, WIDTH);
        cap = args.softcap * LOG2_E;
        factor = args.softcap > 0 ? args.scale / args.softcap : args.scale * LOG2_E;
        return KVA_OK;
    }

    Scratch scratch(Pieces& pieces) const {
        Scratch s;
        s.q = pieces.take<float>(rows * q_stride);
        s.sums = pieces.take<float>(rows * sum_stride);
        s.highest = pieces.take<float>(rows);
        s.total = pieces.take<float>(rows);
        s.keys = pieces.take<float>((int64_t)TILE * args.key_dim);
        s.values = pieces.take<float>(TILE * sum_stride);
        s.weights = pieces.take<float>(ROWS * TILE);
        s.position = pieces.take<int32_t>(TILE);
        s.now = pieces.take<int32_t>(rows);
        s.after = pieces.take<int32_t>(rows);
        s.near = pieces.take<int32_t>(rows);
        s.rows = pieces.take<Range>(rows / ROWS);
        s.panels = pieces.take<Range>(PANELS);
        s.room = pieces.take<RowRoom>(1);
        return s;
    }

    // Reads an item's queries, and what they see; fills the last ROWS. Returns the range of all.
    template <class Element>
    Range begin(const Scratch& s, const Item& item, const Sight& sight) const {
        const kva_chunk& chunk = chunks[item.chunk];
        const int padded = (int)rounded(item.count, ROWS);
        Range all;
        for (int i = 0; i < padded / ROWS; ++i) s.rows[i] = Range();
        for (int i = 0; i < padded; ++i) {
            s.highest[i] = -INF;
            s.total[i] = 0;
            if (i >= item.count) {
                std::memset(s.q + i * q_stride, 0, args.key_dim * sizeof(float));
                s.eyes().close(i);
                continue;
            }
            const int64_t t = (item.first + i) / group, h = (int64_t)item.head * group + (item.first + i) % group;
            const uint8_t* from = args.q + ((chunk.start + t) * args.q_token + h * args.q_head) * Element::BYTES;
            uint8_t* to = (uint8_t*)(s.q + i * q_stride);
            by_vectors(args.key_dim, [&](int c, int n) {
                store_element(Fp32{}, to + 4 * c, load_element<Element>(from + c * Element::BYTES, n) * factor, n);
            });
            s.eyes().set(sight, i, chunk.positions[t]);
            s.rows[i / ROWS].add(chunk.positions[t]);
        }
        for (int i = 0; i < padded / ROWS; ++i) all.add(s.rows[i]);
        std::memset(s.sums, 0, padded * sum_stride * sizeof(float));
        return all;
    }

    // Notes where TILE keys are from `first` on; returns the range of all.
    Range find(const Scratch& s, const kva_chunk& chunk, const Source& source, int64_t first) const {
        Range all;
        for (int p = 0; p < PANELS; ++p) {
            Range& range = s.panels[p] = Range();
            for (int i = p * WIDTH; i < (p + 1) * WIDTH; ++i) {
                int32_t position = NO_TOKEN;
                if (first + i < source.count) {
                    position = source.part ? position_in(*source.part, source.table, first + i, NO_TOKEN)
                                           : chunk.positions[first + i];
                }
                s.position[i] = position;
                range.add_key(position);
            }
            all.add(range);
        }
        return all;
    }

    template <class Element>
    void decode(const Scratch& s, const Item& item, const Source& source, int64_t first) const {
        const int64_t start = chunks[item.chunk].start;
        const OwnRows k{args.k + start * args.k_token * Element::BYTES, args.k_token, args.k_head};
        const OwnRows v{args.v + start * args.v_token * Element::BYTES, args.v_token, args.v_head};
        for (int at = 0; at < TILE; at += KEYS_AT_ONCE) {
            const int64_t left = source.count - first - at;
            const int count = left < 0 ? 0 : left < KEYS_AT_ONCE ? (int)left : KEYS_AT_ONCE;
            float* const values = s.values + at * sum_stride;
            if (count) {
                load_rows<Element>(source.part, source.table, true, v, item.head, first + at, count, args.value_dim,
                                   *s.room);
            }
            for (int t = 0; t < KEYS_AT_ONCE; ++t) {
                float* const to = values + t * sum_stride;
                // What holds no token may hold NaN, which a weight of 0 does not hide.
                const bool there = t < count && s.position[at + t] != NO_TOKEN;
                if (there) std::memcpy(to, s.room->rows + t * args.value_dim, args.value_dim * sizeof(float));
                const int64_t used = there ? args.value_dim : 0;
                std::memset(to + used, 0, (sum_stride - used) * sizeof(float));
            }
            if (count) {
                load_rows<Element>(source.part, source.table, false, k, item.head, first + at, count, args.key_dim,
                                   *s.room);
            }
            to_panels(s.room->rows, count, args.key_dim, s.keys + (int64_t)at * args.key_dim);
        }
    }

    // The scores of ROWS rows, from `row` on, with a panel of keys.
    template <bool HIDES, bool CAPPED>
    KVA_INLINE void score(const Scratch& s, const Sight& sight, int row, int panel) const {
        const float* q = s.q + row * q_stride;
        const float* keys = s.keys + (int64_t)panel * WIDTH * args.key_dim;
        vf sum[ROWS][2] = {};
        for (int64_t c = 0; c < args.key_dim; ++c, keys += WIDTH) {
            const vf first = load(keys), second = load(keys + VF);
            KVA_UNROLL
            for (int m = 0; m < ROWS; ++m) {
                const vf query = set1(q[m * q_stride + c]);
                sum[m][0] = fma(query, first, sum[m][0]);
                sum[m][1] = fma(query, second, sum[m][1]);
            }
        }
        KVA_UNROLL
        for (int m = 0; m < ROWS; ++m) {
            for (int n = 0; n < 2; ++n) {
                vf x = sum[m][n];
                if constexpr (CAPPED) x = cap * tanh(x);
                if constexpr (HIDES) {
                    const vi position = load_as<vi>(s.position + panel * WIDTH + n * VF);
                    const int32_t sinks = sight.sinks < INT32_MAX ? (int32_t)sight.sinks : INT32_MAX;
                    x = s.eyes().hidden(row + m, position, sinks) ? set1(-INF) : x;
                }
                store(s.weights + m * TILE + panel * WIDTH + n * VF, x);
            }
        }
    }

    template <bool CAPPED>
    __attribute__((noinline)) void score(const Scratch& s, const Sight& sight, int row, int panel, Seen seen) const {
        if (seen == ALL) return score<false, CAPPED>(s, sight, row, panel);
        if (seen == SOME) return score<true, CAPPED>(s, sight, row, panel);
        for (int m = 0; m < ROWS; ++m) {
            for (int n = 0; n < 2; ++n) store(s.weights + m * TILE + panel * WIDTH + n * VF, set1(-INF));
        }
    }

    // Turns the scores of ROWS rows into weights, relative to the highest that each has seen.
    void weigh(const Scratch& s, int row) const {
        for (int m = 0; m < ROWS; ++m) {
            float* const weights = s.weights + m * TILE;
            vf top = load(weights);
            for (int i = VF; i < TILE; i += VF) top = vmax(top, load(weights + i));
            const float most = hmax(top), before = s.highest[row + m];
            if (most > before) {
                s.highest[row + m] = most;
                const vf shrink = exp2(set1(before - most));
                s.total[row + m] *= shrink[0];
                float* const sums = s.sums + (row + m) * sum_stride;
                for (int64_t c = 0; c < sum_stride; c += VF) store(sums + c, load(sums + c) * shrink);
            }
            const float highest = s.highest[row + m];
            if (highest == -INF) {  // it has seen nothing; a score of NaN stays one
                for (int i = 0; i < TILE; i += VF) {
                    const vf x = load(weights + i);
                    store(weights + i, x == x ? vf{} : x);
                }
                continue;
            }
            vf total{};
            for (int i = 0; i < TILE; i += VF) {
                const vf weight = exp2(load(weights + i) - highest);
                store(weights + i, weight);
                total += weight;
            }
            s.total[row + m] += hsum(total);
        }
    }

    // Adds the weighted values of the tile's first `count` keys to the sums of ROWS rows.
    __attribute__((noinline)) void add(const Scratch& s, int row, int count) const {
        for (int64_t c = 0; c < sum_stride; c += WIDTH) {
            float* const sums = s.sums + row * sum_stride + c;
            vf sum[ROWS][2];
            KVA_UNROLL
            for (int m = 0; m < ROWS; ++m) {
                sum[m][0] = load(sums + m * sum_stride);
                sum[m][1] = load(sums + m * sum_stride + VF);
            }
            const float* value = s.values + c;
            const float* weight = s.weights;
            for (int t = 0; t < count; ++t, value += sum_stride, ++weight) {
                const vf first = load(value), second = load(value + VF);
                KVA_UNROLL
                for (int m = 0; m < ROWS; ++m) {
                    const vf w = set1(weight[m * TILE]);
                    sum[m][0] = fma(w, first, sum[m][0]);
                    sum[m][1] = fma(w, second, sum[m][1]);
                }
            }
            KVA_UNROLL
            for (int m = 0; m < ROWS; ++m) {
                store(sums + m * sum_stride, sum[m][0]);
                store(sums + m * sum_stride + VF, sum[m][1]);
            }
        }
    }

    // Takes one tile into the state of all rows that see some of it.
    template <class Element>
    void attend(const Scratch& s, const Item& item, const Sight& sight, const Range& queries, const Source& source,
                int64_t first) const {
        const Range keys = find(s, chunks[item.chunk], source, first);
        if (sight.seen(queries, keys) == NONE) return;
        decode<Element>(s, item, source, first);
        const int count = (int)(source.count - first < TILE ? source.count - first : TILE);
        for (int row = 0; row < item.count; row += ROWS) {
            const Range& group_rows = s.rows[row / ROWS];
            if (sight.seen(group_rows, keys) == NONE) continue;
            for (int panel = 0; panel < PANELS; ++panel) {
                const Seen seen = sight.seen(group_rows, s.panels[panel]);
                args.softcap > 0 ? score<true>(s, sight, row, panel, seen) : score<false>(s, sight, row, panel, seen);
            }
            weigh(s, row);
            add(s, row, count);
        }
    }

    // Slots of a part in order of positions that no query of an item may see, at its front and behind `end`.
    void bounds(const Source& source, const Sight& sight, const Range& queries, int64_t& first, int64_t& end) const {
        first = 0, end = source.count;
        if (!source.part || source.part->dense_start < 0) return;
        const int64_t start = source.part->dense_start, ahead = queries.high - start + 1;
        end = ahead < end ? ahead : end;
        if (sight.window >= 0) {
            const int64_t passed = queries.low - sight.window + 1 - start;
            first = passed > 0 ? passed / TILE * TILE : 0;
        }
    }

    template <class Element>
    void run(const Scratch& s, const Item& item) const {
        const kva_chunk& chunk = chunks[item.chunk];
        const Sight sight{args.window, chunk.sinks, chunk.recent};
        const Range queries = begin<Element>(s, item, sight);
        for (int64_t p = 0; p <= chunk.num_parts; ++p) {
            Source source{nullptr, nullptr, chunk.tokens};
            if (p < chunk.num_parts) {
                const kva_part& part = parts[chunk.first_part + p];
                source = {&part, part.table + item.head * part.table_lane, part.length[item.head * part.length_lane]};
            }
            int64_t first, end;
            bounds(source, sight, queries, first, end);
            for (; first < end; first += TILE) attend<Element>(s, item, sight, queries, source, first);
        }
        finish<Element>(s, item);
    }

    template <class Element>
    void finish(const Scratch& s, const Item& item) const {
        const kva_chunk& chunk = chunks[item.chunk];
        for (int i = 0; i < item.count; ++i) {
            const int64_t t = (item.first + i) / group, h = (int64_t)item.head * group + (item.first + i) % group;
            float highest = s.highest[i], total = s.total[i], shrink = 1;
            if (args.sink_logits) {
                const float sink = args.sink_logits[h] * LOG2_E;
                if (sink > highest) {
                    shrink = exp2(set1(highest - sink))[0];
                    total *= shrink;
                    highest = sink;
                }
                if (highest > -INF) total += exp2(set1(sink - highest))[0];
            }
            if (chunk.lse) chunk.lse[h * chunk.tokens + t] = total == 0 ? -INF : (highest + std::log2(total)) * LN_2;
            const vf share = set1(total == 0 ? 0 : shrink / total);
            const float* sums = s.sums + i * sum_stride;
            uint8_t* to = args.out + ((chunk.start + t) * args.query_heads + h) * args.value_dim * Element::BYTES;
            by_vectors(args.value_dim, [&](int c, int n) {
                store_element(Element{}, to + c * Element::BYTES, load(sums + c) * share, n);
            });
        }
    }

    int64_t rows_of(int chunk) const { return chunks[chunk].tokens * group; }
    int64_t blocks_of(int chunk) const { return (rows_of(chunk) + rows - 1) / rows; }

    // Items of the chunk's last rows come first: they see most.
    Item item(int64_t index) const {
        int chunk = 0;
        for (; index >= blocks_of(chunk) * args.kv_heads; ++chunk) index -= blocks_of(chunk) * args.kv_heads;
        const int64_t block = blocks_of(chunk) - 1 - index / args.kv_heads, left = rows_of(chunk) - block * rows;
        return {chunk, (int)(index % args.kv_heads), block * rows, (int)(left < rows ? left : rows)};
    }

    int compute() {
        int64_t all_rows = 0, products = 0, num_items = 0, threads = args.threads;
        for (int i = 0; i < args.num_chunks; ++i) {
            int64_t slots = chunks[i].tokens;
            for (int64_t p = 0; p < chunks[i].num_parts; ++p) {
                const kva_part& part = parts[chunks[i].first_part + p];
                slots += (int64_t)part.columns * part.pool->block_size;
            }
            all_rows += rows_of(i) * args.kv_heads;
            products += rows_of(i) * args.kv_heads * slots * args.key_dim;
        }
        if (!all_rows) return KVA_OK;
        const int64_t useful = 1 + products / PRODUCTS_PER_THREAD;
        threads = threads > useful ? useful : threads < 1 ? 1 : threads;
        int64_t most = CACHE_FLOATS / (args.key_dim + args.value_dim), share = all_rows / (threads * ITEMS_PER_THREAD);
        most = most > MAX_ROWS ? MAX_ROWS : most < LEAST_ROWS ? LEAST_ROWS : most;
        share = threads == 1 || share > most ? most : share < LEAST_ROWS ? LEAST_ROWS : share;
        rows = (int)(share / ROWS * ROWS);
        for (int i = 0; i < args.num_chunks; ++i) num_items += blocks_of(i) * args.kv_heads;
        threads = threads > num_items ? num_items : threads;
        Pieces size{nullptr};
        scratch(size);
        uint8_t* const memory = (uint8_t*)std::aligned_alloc(64, threads * size.at);
        if (!memory) return KVA_EMEMORY;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            Pieces pieces{memory + omp_get_thread_num() * size.at};
#else
        {
            Pieces pieces{memory};
#endif
            const Scratch s = scratch(pieces);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < num_items; ++i) {
                with_float(args.format, [&](auto element) { run<decltype(element)>(s, item(i)); });
            }
        }
        std::free(memory);
        return KVA_OK;
    }
};

}  // namespace
}  // namespace KVA_ISA

KVA_EXPORT(kva_chunk_attention)(const kva_chunks* args, const kva_chunk* chunks, const kva_part* parts) {
    KVA_ISA::Call call(*args, chunks, parts);
    const int code = call.check();
    return code ? code : call.compute();
}

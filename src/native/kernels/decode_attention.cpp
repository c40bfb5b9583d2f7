// Decode attention over paged, ragged, head-granular lanes in any format.
//
// Work is cut into items: a run of tiles of one lane. Lanes are cut where they are longer than a fair share of a thread.
// An item goes through its tiles once with a running maximum (online softmax, arXiv:1805.02867): scores of a tile,
// weights, weighted values. Items of one lane merge by their maxima and sums. Where probabilities are asked for, scores
// are kept and normalised at the end. Scores are in units of log 2.
#ifdef _OPENMP
#include <omp.h>
#endif
#include <cstdlib>

#include "convert.h"
#include "pieces.h"
#include "read_float.h"
#include "read_quant.h"

namespace KVA_ISA {
namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr int SCATTERED = 32;        // tokens of a scattered tile
constexpr int ITEMS_PER_THREAD = 4;  // that items may be unequal, and threads interrupted
constexpr int64_t LEAST_TOKENS = 256;  // of an item: merging costs about as much as this many tokens do

// The tiles of one part of one lane.
struct Span {
    int64_t length;       // slots in use, or chosen
    int64_t first, end;   // tiles to walk
    int64_t tile;         // slots of a tile
    int64_t at;           // place of its first slot among the lane's kept scores
};

struct Item {
    int32_t lane;
    int32_t num_splits;
    int32_t partial;      // where its state is kept until the lane's items merge; -1: it has the lane to itself
    int64_t first, end;   // tiles, counted through all parts
};

// A growing buffer that calls of one thread share.
struct Memory {
    uint8_t* data = nullptr;
    int64_t size = 0;
    ~Memory() { std::free(data); }
    uint8_t* reserve(int64_t bytes) {
        if (bytes > size) {
            std::free(data);
            size = rounded(bytes + bytes / 4, 4096);
            data = (uint8_t*)std::aligned_alloc(64, size);
            if (!data) size = 0;
        }
        return data;
    }
};
thread_local Memory plan_memory, memory;

float load_float(const uint8_t* p, int64_t index, int format) {
    if (format == KVA_FP32) return ((const float*)p)[index];
    const uint16_t h = ((const uint16_t*)p)[index];
    vh v{};
    v[0] = h;
    return (format == KVA_BF16 ? from_bf16(v) : from_fp16(v))[0];
}

// Rounds to nearest, ties to even, as torch does.
uint16_t to_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if (x != x) return 0x7fc0;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

uint16_t to_fp16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
    if (size > 0x7f800000) return sign | 0x7e00;
    if (size >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
    if (size < 0x38800000) {                       // below 2^-14: multiples of 2^-24, by the rounding of an addition
        float f;
        std::memcpy(&f, &size, 4);
        f += 0.5f;
        std::memcpy(&u, &f, 4);
        return sign | (u - 0x3f000000);
    }
    return sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
}

void store_float(uint8_t* p, int64_t index, int format, float x) {
    if (format == KVA_FP32) {
        ((float*)p)[index] = x;
    } else {
        ((uint16_t*)p)[index] = format == KVA_BF16 ? to_bf16(x) : to_fp16(x);
    }
}

template <class F>
int with_reader(int format, const F& f) {
    switch (format) {
        case KVA_FP32: f((FloatReader<Fp32>*)nullptr); return KVA_OK;
        case KVA_BF16: f((FloatReader<Bf16>*)nullptr); return KVA_OK;
        case KVA_FP16: f((FloatReader<Fp16>*)nullptr); return KVA_OK;
        case KVA_INT8: f((Int8Reader*)nullptr); return KVA_OK;
        case KVA_INT4: f((Int4Reader*)nullptr); return KVA_OK;
        case KVA_INT2: f((Int2Reader*)nullptr); return KVA_OK;
    }
    return KVA_EFORMAT;
}

// What an item has seen so far: out = sums / total, both relative to 2^highest.
struct State {
    float* highest;  // [group]
    float* total;    // [group][MAX_VF], to be summed over the vector
    float* sums;     // [group][sum_stride]
};

// Memory of one thread.
struct Scratch {
    float *q, *scores, *kept;
    State state;
    const uint8_t** blocks;
    int32_t* offsets;
    int32_t* places;  // of the visible slots of a tile
    uint32_t* wanted;  // [columns] chosen slots of each block, a bit each
    uint8_t* reader;
};

struct Call {
    const kva_decode& args;
    const kva_part* parts;
    Shape shape;
    int64_t key_dim, value_dim, tile;  // tile: most slots of one
    int64_t kept_stride;               // floats of the kept scores of a head of a lane; 0: none are kept
    int64_t columns;                   // most columns of a packed part with slots
    int64_t reader_bytes;
    int num_lanes, num_items = 0, num_partials = 0;
    bool keeps;
    Span* spans;    // [lane][part]
    Item* items;
    int32_t* first_item;  // [lane]
    float* partials;      // [partial][highest, total, sums]
    float* kept;          // [lane] of those that are split

    Call(const kva_decode& args, const kva_part* parts) : args(args), parts(parts) {}

    int row(int lane) const { return lane / args.kv_heads; }
    int head(int lane) const { return lane % args.kv_heads; }
    int64_t oldest(int lane) const { return args.query_position[row(lane)] - args.window + 1; }
    const Span* spans_of(int lane) const { return spans + (int64_t)lane * args.num_parts; }
    bool has_window() const { return args.window >= 0; }
    static bool in_columns(const kva_part& part) { return part.slots && part.pool->format >= KVA_INT4; }

    int check() {
        const kva_pool& first = *parts[0].pool;
        key_dim = first.key_dim, value_dim = first.value_dim;
        tile = columns = reader_bytes = 0;
        keeps = parts[0].mass || parts[0].credit;
        if (args.kv_heads < 1 || args.query_heads % args.kv_heads || value_dim < 1 || key_dim < 1) return KVA_ESHAPE;
        if (args.q_format > KVA_FP16) return KVA_EFORMAT;
        for (int p = 0; p < args.num_parts; ++p) {
            const kva_pool& pool = *parts[p].pool;
            if (pool.key_dim != key_dim || pool.value_dim != value_dim) return KVA_ESHAPE;
            const bool needs = parts[p].dense_start < 0 && (parts[p].hide_empty || has_window());
            if (needs && pool.positions_at < 0) return KVA_ESHAPE;
            const int64_t slots = parts[p].slots ? SCATTERED : 0;
            tile = pool.block_size > tile ? pool.block_size : tile;
            tile = slots > tile ? slots : tile;
            if (in_columns(parts[p]) && parts[p].columns > columns) columns = parts[p].columns;
        }
        shape.group = args.query_heads / args.kv_heads;
        shape.q_stride = rounded(key_dim, MAX_VF);
        shape.score_stride = rounded(tile, MAX_VF);
        shape.sum_stride = rounded(value_dim, 2 * MAX_VF);
        for (int p = 0; p < args.num_parts; ++p) {
            const kva_pool& pool = *parts[p].pool;
            const int code = with_reader(pool.format, [&](auto* reader) {
                const int64_t bytes = std::remove_pointer_t<decltype(reader)>::scratch(pool, shape);
                reader_bytes = bytes > reader_bytes ? bytes : reader_bytes;
            });
            if (code) return code;
        }
        num_lanes = args.rows * args.kv_heads;
        return KVA_OK;
    }

    Span span_of(const kva_part& part, int lane) const {
        const int64_t size = part.pool->block_size;
        Span span;
        span.length = part.length[row(lane) * part.length_row + head(lane) * part.length_lane];
        if (in_columns(part)) {
            span.tile = size, span.first = 0, span.end = span.length ? part.columns : 0;
            return span;
        }
        span.tile = part.slots ? SCATTERED : size;
        span.end = (span.length + span.tile - 1) / span.tile;
        const int64_t skipped = has_window() && part.dense_start >= 0 && !part.slots ? oldest(lane) - part.dense_start : 0;
        span.first = skipped <= 0 ? 0 : skipped / span.tile < span.end ? skipped / span.tile : span.end;
        return span;
    }

    // Cuts the lanes into items; returns how many floats the kept scores of a lane take.
    void plan() {
        int64_t tokens = 0;
        kept_stride = 0;
        for (int lane = 0; lane < num_lanes; ++lane) {
            int64_t at = 0;
            for (int p = 0; p < args.num_parts; ++p) {
                Span& span = spans[(int64_t)lane * args.num_parts + p];
                span = span_of(parts[p], lane);
                span.at = at;
                at += rounded(span.end * span.tile, MAX_VF);
                tokens += (span.end - span.first) * span.tile;
            }
            if (keeps && at > kept_stride) kept_stride = at;
        }
        const int64_t share = tokens / ((int64_t)args.threads * ITEMS_PER_THREAD);
        const int64_t most = args.threads == 1 ? INT64_MAX : share > LEAST_TOKENS ? share : LEAST_TOKENS;
        num_items = num_partials = 0;
        for (int lane = 0; lane < num_lanes; ++lane) {
            int64_t tiles = 0, lane_tokens = 0;
            for (int p = 0; p < args.num_parts; ++p) {
                const Span& span = spans_of(lane)[p];
                tiles += span.end - span.first;
                lane_tokens += (span.end - span.first) * span.tile;
            }
            int64_t splits = args.threads == 1 ? 1 : (lane_tokens + most / 2) / most;
            if (splits > tiles) splits = tiles;
            if (splits < 1) splits = 1;
            if (splits > args.threads * ITEMS_PER_THREAD) splits = args.threads * ITEMS_PER_THREAD;
            first_item[lane] = num_items;
            for (int64_t s = 0; s < splits; ++s) {
                const int partial = splits > 1 ? num_partials++ : -1;
                items[num_items++] = {lane, (int32_t)splits, partial, tiles * s / splits, tiles * (s + 1) / splits};
            }
        }
    }

    int64_t partial_floats() const { return shape.group * (MAX_VF + MAX_VF + shape.sum_stride); }

    State partial(int index) const {
        float* at = partials + index * partial_floats();
        return {at, at + shape.group * MAX_VF, at + 2 * shape.group * MAX_VF};
    }

    Scratch scratch(Pieces& pieces) const {
        Scratch s;
        const int64_t group = shape.group;
        s.q = pieces.take<float>(group * shape.q_stride);
        s.scores = pieces.take<float>(group * shape.score_stride);
        s.state.highest = pieces.take<float>(group * MAX_VF);
        s.state.total = pieces.take<float>(group * MAX_VF);
        s.state.sums = pieces.take<float>(group * shape.sum_stride);
        s.kept = pieces.take<float>(group * kept_stride);
        s.blocks = pieces.take<const uint8_t*>(shape.score_stride);
        s.offsets = pieces.take<int32_t>(shape.score_stride);
        s.places = pieces.take<int32_t>(shape.score_stride);
        s.wanted = pieces.take<uint32_t>(columns);
        s.reader = pieces.take<uint8_t>(reader_bytes);
        return s;
    }

    void load_queries(int lane, float* q) const {
        const float factor = args.softcap > 0 ? args.scale : args.scale * LOG2_E;
        for (int g = 0; g < shape.group; ++g, q += shape.q_stride) {
            const int64_t from = row(lane) * args.q_row + ((int64_t)head(lane) * shape.group + g) * args.q_head;
            for (int64_t c = 0; c < key_dim; ++c) q[c] = load_float(args.q, from + c, args.q_format) * factor;
            for (int64_t c = key_dim; c < shape.q_stride; ++c) q[c] = 0;
        }
    }

    // Turns scores into weights and takes them into the state. `places`: the `count` tokens are only these of the tile.
    void weigh(float* scores, int64_t count, const State& state, float* kept, const int32_t* places) const {
        const int64_t padded = rounded(count, VF);
        for (int g = 0; g < shape.group; ++g) {
            float* s = scores + g * shape.score_stride;
            for (int64_t i = count; i < padded; ++i) s[i] = -INF;
            if (args.softcap > 0) {
                const vf inverse = set1(1 / args.softcap), cap = set1(args.softcap * LOG2_E);
                for (int64_t i = 0; i < padded; i += VF) {
                    const vf x = load(s + i);
                    store(s + i, x == -INF ? x : cap * tanh(x * inverse));
                }
            }
            if (kept) {
                float* to = kept + g * kept_stride;
                if (places) {
                    for (int64_t i = 0; i < count; ++i) to[places[i]] = s[i];
                } else {
                    std::memcpy(to, s, count * sizeof *s);
                }
            }
            vf top = load(s);
            for (int64_t i = VF; i < padded; i += VF) top = vmax(top, load(s + i));
            const float most = hmax(top);
            vf total = load(state.total + g * MAX_VF);
            if (most > state.highest[g]) {
                const float shrink = exp2(set1(state.highest[g] - most))[0];
                state.highest[g] = most;
                total *= shrink;
                float* sums = state.sums + g * shape.sum_stride;
                for (int64_t c = 0; c < shape.sum_stride; c += VF) store(sums + c, load(sums + c) * shrink);
            }
            const vf highest = set1(state.highest[g]);
            for (int64_t i = 0; i < padded; i += VF) {
                const vf w = exp2(load(s + i) - highest);
                store(s + i, w);
                total += w;
            }
            store(state.total + g * MAX_VF, total);
            for (int64_t i = padded; i < shape.score_stride; ++i) s[i] = 0;
        }
    }

    const uint8_t* block(const kva_part& part, const int32_t* table, int64_t column) const {
        return part.pool->memory + (int64_t)table[column] * 64;
    }

    // Whether a slot holds a token that the window admits.
    bool sees(const kva_part& part, const uint8_t* block, int64_t offset, int64_t slot, int64_t oldest) const {
        int64_t position = part.dense_start + slot;
        if (part.dense_start < 0) {
            position = ((const int32_t*)(block + part.pool->positions_at))[offset];
            if (part.hide_empty && position < 0) return false;
        }
        return !has_window() || position >= oldest;
    }

    template <class Reader>
    void run_tile(Reader& reader, const Tile& tile, const Scratch& s, float* kept, const int32_t* places) const {
        reader.scores(tile, s.scores);
        weigh(s.scores, tile.count, s.state, kept, places);
        reader.add(tile, s.scores, s.state.sums);
    }

    // One block of which only the `count` slots in s.places are visible.
    template <class Reader>
    void run_some(Reader& reader, const uint8_t* block, const uint8_t* next, int64_t count, const Scratch& s,
                  float* kept) const {
        if constexpr (Reader::SCATTERS) {
            for (int64_t i = 0; i < count; ++i) s.blocks[i] = block, s.offsets[i] = s.places[i];
            const Tile tile{(int)count, nullptr, next, s.blocks, s.offsets};
            run_tile(reader, tile, s, kept, s.places);
        } else {
            const int64_t until = s.places[count - 1] + 1;
            const Tile tile{(int)until, block, next, nullptr, nullptr};
            reader.scores(tile, s.scores);
            for (int g = 0; g < shape.group; ++g) {
                float* scores = s.scores + g * shape.score_stride;
                for (int64_t i = 0, at = 0; i < until; ++i) {
                    if (s.places[at] == i) {
                        ++at;
                    } else {
                        scores[i] = -INF;
                    }
                }
            }
            weigh(s.scores, until, s.state, kept, nullptr);
            reader.add(tile, s.scores, s.state.sums);
        }
    }

    void hide(float* kept, int64_t count) const {
        if (!kept) return;
        for (int g = 0; g < shape.group; ++g) {
            for (int64_t i = 0; i < count; ++i) kept[g * kept_stride + i] = -INF;
        }
    }

    // Tiles [first, end) of blocks in order.
    template <class Reader>
    void run_blocks(Reader& reader, const kva_part& part, const int32_t* table, int lane, const Span& span,
                    int64_t first, int64_t end, const Scratch& s, float* kept) const {
        const int64_t size = part.pool->block_size, old = has_window() ? oldest(lane) : 0;
        const bool looks = has_window() || (part.hide_empty && part.dense_start < 0);
        for (int64_t t = first; t < end; ++t) {
            const int64_t count = span.length - t * size < size ? span.length - t * size : size;
            const uint8_t* here = block(part, table, t);
            const uint8_t* next = t + 1 < end ? block(part, table, t + 1) : here;
            float* keep = kept ? kept + t * size : nullptr;
            int64_t seen = count;
            if (looks) {
                seen = 0;
                for (int64_t i = 0; i < count; ++i) {
                    if (sees(part, here, i, t * size + i, old)) s.places[seen++] = i;
                }
            }
            if (seen == count) {
                run_tile(reader, Tile{(int)count, here, next, nullptr, nullptr}, s, keep, nullptr);
            } else {
                hide(keep, count);
                if (seen) run_some(reader, here, next, seen, s, keep);
            }
        }
    }

    // Tiles [first, end) of 32 chosen slots each.
    template <class Reader>
    void run_slots(Reader& reader, const kva_part& part, const int32_t* table, const int32_t* slots, int lane,
                   const Span& span, int64_t first, int64_t end, const Scratch& s, float* kept) const {
        const int64_t size = part.pool->block_size, old = has_window() ? oldest(lane) : 0;
        const bool looks = has_window() || (part.hide_empty && part.dense_start < 0);
        for (int64_t t = first; t < end; ++t) {
            const int64_t from = t * SCATTERED;
            const int64_t count = span.length - from < SCATTERED ? span.length - from : SCATTERED;
            int64_t seen = 0;
            for (int64_t i = 0; i < count; ++i) {
                const int64_t slot = slots[from + i], offset = slot % size;
                const uint8_t* here = block(part, table, slot / size);
                if (looks && !sees(part, here, offset, slot, old)) continue;
                s.blocks[seen] = here, s.offsets[seen] = offset, s.places[seen] = i;
                ++seen;
            }
            float* keep = kept ? kept + from : nullptr;
            hide(keep, count);
            if (!seen) continue;
            const Tile tile{(int)seen, nullptr, s.blocks[0], s.blocks, s.offsets};
            run_tile(reader, tile, s, keep, s.places);
        }
    }

    // Blocks [first, end) of a packed part, each with those of its slots that were chosen.
    template <class Reader>
    void run_columns(Reader& reader, const kva_part& part, const int32_t* table, const int32_t* slots, int lane,
                     const Span& span, int64_t first, int64_t end, const Scratch& s, float* kept) const {
        const int64_t size = part.pool->block_size, old = has_window() ? oldest(lane) : 0;
        std::memset(s.wanted + first, 0, (end - first) * sizeof *s.wanted);
        for (int64_t i = 0; i < span.length; ++i) {
            const int64_t column = slots[i] / size;
            if (column >= first && column < end) s.wanted[column] |= 1u << slots[i] % size;
        }
        for (int64_t t = first; t < end; ++t) {
            float* keep = kept ? kept + t * size : nullptr;
            hide(keep, size);
            if (!s.wanted[t]) continue;
            const uint8_t* here = block(part, table, t);
            int64_t seen = 0;
            for (int64_t i = 0; i < size; ++i) {
                if (s.wanted[t] >> i & 1 && sees(part, here, i, t * size + i, old)) s.places[seen++] = i;
            }
            if (seen) run_some(reader, here, here, seen, s, keep);
        }
    }

    // Walks an item. Its state starts at nothing.
    void run_item(const Item& item, const Scratch& s, float* kept) const {
        const int64_t group = shape.group;
        for (int g = 0; g < group; ++g) s.state.highest[g] = -3e38f;  // finite: less it gives 0 of -infinity
        std::memset(s.state.total, 0, group * MAX_VF * sizeof(float));
        std::memset(s.state.sums, 0, group * shape.sum_stride * sizeof(float));
        load_queries(item.lane, s.q);
        int64_t before = 0;
        for (int p = 0; p < args.num_parts; ++p) {
            const kva_part& part = parts[p];
            const Span& span = spans_of(item.lane)[p];
            const int64_t tiles = span.end - span.first;
            const int64_t from = item.first > before ? item.first - before : 0;
            const int64_t until = item.end - before < tiles ? item.end - before : tiles;
            before += tiles;
            if (from >= until) continue;
            const int r = row(item.lane), h = head(item.lane);
            const int32_t* table = part.table + r * part.table_row + h * part.table_lane;
            const int32_t* slots = part.slots ? part.slots + r * part.slots_row + h * part.slots_lane : nullptr;
            float* keep = kept ? kept + span.at : nullptr;
            with_reader(part.pool->format, [&](auto* type) {
                typedef std::remove_pointer_t<decltype(type)> Reader;
                Reader reader(*part.pool, shape, s.q, s.reader);
                const int64_t first = span.first + from, end = span.first + until;
                if (!slots) {
                    run_blocks(reader, part, table, item.lane, span, first, end, s, keep);
                } else if constexpr (Reader::SCATTERS) {
                    run_slots(reader, part, table, slots, item.lane, span, first, end, s, keep);
                } else {
                    run_columns(reader, part, table, slots, item.lane, span, first, end, s, keep);
                }
            });
        }
    }

    // Adds another state of the same lane to `state`.
    void merge(const State& state, const State& other) const {
        for (int g = 0; g < shape.group; ++g) {
            const float a = state.highest[g], b = other.highest[g], most = a > b ? a : b;
            const float mine = exp2(set1(a - most))[0], its = exp2(set1(b - most))[0];
            state.highest[g] = most;
            float* total = state.total + g * MAX_VF;
            for (int i = 0; i < VF; ++i) total[i] = total[i] * mine + other.total[g * MAX_VF + i] * its;
            float* sums = state.sums + g * shape.sum_stride;
            const float* add = other.sums + g * shape.sum_stride;
            for (int64_t c = 0; c < value_dim; ++c) sums[c] = sums[c] * mine + add[c] * its;
        }
    }

    // Writes the output of a lane, and its mass from the kept scores.
    void finish(int lane, const State& state, const float* kept) const {
        for (int g = 0; g < shape.group; ++g) {
            const int64_t query_head = (int64_t)head(lane) * shape.group + g;
            float total = hsum(load(state.total + g * MAX_VF)), shrink = 1;
            if (args.sinks) {
                const float sink = args.sinks[query_head] * LOG2_E, a = state.highest[g], most = a > sink ? a : sink;
                shrink = exp2(set1(a - most))[0];
                total = total * shrink + exp2(set1(sink - most))[0];
                state.highest[g] = most;
            }
            const float share = total == 0 ? 0 : 1 / total;
            state.total[g * MAX_VF] = share;
            const int64_t to = (row(lane) * (int64_t)args.query_heads + query_head) * value_dim;
            const float* sums = state.sums + g * shape.sum_stride;
            for (int64_t c = 0; c < value_dim; ++c) store_float(args.out, to + c, args.q_format, sums[c] * shrink * share);
        }
        if (!kept) return;
        for (int p = 0; p < args.num_parts; ++p) {
            const Span& span = spans_of(lane)[p];
            if (parts[p].credit) {
                add_credit(parts[p], lane, span, state, kept + span.at);
                continue;
            }
            float* mass = parts[p].mass + lane * parts[p].mass_lane;
            if (in_columns(parts[p])) {
                const kva_part& part = parts[p];
                const int32_t* slots = part.slots + row(lane) * part.slots_row + head(lane) * part.slots_lane;
                for (int64_t i = 0; i < span.length; ++i) mass[i] = probability(state, kept + span.at + slots[i], 1)[0];
                continue;
            }
            int64_t i = span.first * span.tile;
            for (; i + VF <= span.length; i += VF) store(mass + i, probability(state, kept + span.at + i, VF));
            if (i < span.length) {
                const vf last = probability(state, kept + span.at + i, span.length - i);
                std::memcpy(mass + i, &last, (span.length - i) * sizeof(float));
            }
        }
    }

    // Adds the mass of a part's slots, none of which was chosen singly, to what these have beside them.
    void add_credit(const kva_part& part, int lane, const Span& span, const State& state, const float* kept) const {
        const int64_t size = part.pool->block_size;
        const int32_t* table = part.credit_table + row(lane) * part.credit_row + head(lane) * part.credit_lane;
        for (int64_t i = span.first * span.tile; i < span.length; i += size) {
            const int64_t count = span.length - i < size ? span.length - i : size;
            uint8_t* const to = part.credit + (int64_t)table[i / size] * 64 + part.credit_at;
            by_vectors((int)count, [&](int at, int n) {
                const vf had = n == VF ? load((const float*)to + at) : load_part((const float*)to + at, n);
                const vf sum = fma(probability(state, kept + i + at, n), set1(args.credit_factor), had);
                std::memcpy(to + 4 * at, &sum, 4 * n);
            });
        }
    }

    KVA_INLINE vf probability(const State& state, const float* kept, int count) const {
        vf sum{};
        for (int g = 0; g < shape.group; ++g) {
            const float* at = kept + g * kept_stride;
            const vf score = count == VF ? load(at) : load_part(at, count);
            sum += exp2(score - state.highest[g]) * state.total[g * MAX_VF];
        }
        return sum;
    }

    float* kept_of(int lane) const { return kept + lane * shape.group * kept_stride; }

    // One item: its output, or its state for the merge.
    void work(const Item& item, Scratch s) const {
        if (item.partial < 0) {
            float* keep = keeps ? s.kept : nullptr;
            run_item(item, s, keep);
            return finish(item.lane, s.state, keep);
        }
        s.state = partial(item.partial);
        run_item(item, s, keeps ? kept_of(item.lane) : nullptr);
    }

    // Merges the items of a lane that was split.
    void join(int lane) const {
        const Item& first = items[first_item[lane]];
        if (first.partial < 0) return;
        for (int i = 1; i < first.num_splits; ++i) merge(partial(first.partial), partial(first.partial + i));
        finish(lane, partial(first.partial), keeps ? kept_of(lane) : nullptr);
    }

    int run() {
        if (!num_lanes) return KVA_OK;
        const int64_t most_items = num_lanes + (int64_t)2 * args.threads * ITEMS_PER_THREAD;
        Pieces plan_size{nullptr};
        take_plan(plan_size, most_items);
        if (!(plan_memory.reserve(plan_size.at))) return KVA_EMEMORY;
        Pieces plan_pieces{plan_memory.data};
        take_plan(plan_pieces, most_items);
        plan();
        Pieces size{nullptr};
        take_shared(size);
        const int64_t shared = size.at;
        scratch(size);
        const int64_t each = size.at - shared;
        const int threads = args.threads < num_items ? args.threads : num_items;
        if (!memory.reserve(shared + threads * each)) return KVA_EMEMORY;
        Pieces pieces{memory.data};
        take_shared(pieces);
        uint8_t* base = memory.data + shared;
        if (threads == 1) {
            Pieces own{base};
            const Scratch s = scratch(own);
            for (int i = 0; i < num_items; ++i) work(items[i], s);
            for (int lane = 0; num_partials && lane < num_lanes; ++lane) join(lane);
            return KVA_OK;
        }
#pragma omp parallel num_threads(threads)
        {
#ifdef _OPENMP
            Pieces own{base + omp_get_thread_num() * each};
#else
            Pieces own{base};
#endif
            const Scratch s = scratch(own);
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < num_items; ++i) work(items[i], s);
            if (num_partials) {
#pragma omp for schedule(dynamic, 1)
                for (int lane = 0; lane < num_lanes; ++lane) join(lane);
            }
        }
        return KVA_OK;
    }

    void take_plan(Pieces& pieces, int64_t most_items) {
        spans = pieces.take<Span>((int64_t)num_lanes * args.num_parts);
        items = pieces.take<Item>(most_items);
        first_item = pieces.take<int32_t>(num_lanes);
    }

    void take_shared(Pieces& pieces) {
        partials = pieces.take<float>(num_partials * partial_floats());
        kept = pieces.take<float>(num_partials ? num_lanes * shape.group * kept_stride : 0);
    }
};

}  // namespace
}  // namespace KVA_ISA

KVA_EXPORT(kva_decode_attention)(const kva_decode* args, const kva_part* parts) {
    KVA_ISA::Call call(*args, parts);
    const int code = call.check();
    return code ? code : call.run();
}

// Which keys a query may see, decided on positions: causality, a sliding window, and sinks with the newest tokens.
#pragma once
#include <cstdint>

#include "../simd.h"

namespace KVA_ISA {

constexpr int32_t NO_TOKEN = INT32_MAX;  // later than any query

// Positions [low, high] of queries or keys; nothing if low > high.
struct Range {
    int64_t low = INT64_MAX, high = INT64_MIN;
    bool holes = false;  // slots without a token are among them
    void add(int64_t position) {
        low = position < low ? position : low;
        high = position > high ? position : high;
    }
    void add(const Range& other) {
        low = other.low < low ? other.low : low;
        high = other.high > high ? other.high : high;
        holes |= other.holes;
    }
    void add_key(int32_t position) {
        if (position == NO_TOKEN) {
            holes = true;
        } else {
            add(position);
        }
    }
};

enum Seen { NONE, SOME, ALL };

struct Sight {
    int64_t window;         // visible are positions > query - window; -1: all
    int64_t sinks, recent;  // visible are positions < sinks or > query - recent; recent -1: all

    // How much the queries see of the keys: NONE and ALL are certain.
    Seen seen(const Range& query, const Range& key) const {
        if (key.low > query.high) return NONE;
        bool all = !key.holes && key.high <= query.low;
        if (window >= 0) {
            if (key.high <= query.low - window) return NONE;
            all &= key.low > query.high - window;
        }
        if (recent >= 0) {
            if (key.low >= sinks && key.high <= query.low - recent) return NONE;
            all &= key.high < sinks || key.low > query.high - recent || sinks > query.high - recent;
        }
        return all ? ALL : SOME;
    }

    static int32_t before(int64_t position, int64_t distance) {
        return position - distance > INT32_MIN ? (int32_t)(position - distance) : INT32_MIN;
    }
};

// What of a vector of positions rows see, row by row.
struct Eyes {
    int32_t* now;    // a row sees positions up to this one,
    int32_t* after;  // later than this one,
    int32_t* near;   // and later than this one or among the sinks

    void set(const Sight& sight, int row, int64_t position) const {
        now[row] = (int32_t)position;
        after[row] = sight.window < 0 ? -1 : Sight::before(position, sight.window);
        near[row] = sight.recent < 0 ? -1 : Sight::before(position, sight.recent);
    }
    void close(int row) const { now[row] = after[row] = near[row] = -1; }

    KVA_INLINE vi hidden(int row, vi position, int32_t sinks) const {
        const vi far = (position >= sinks) & (position <= near[row]);
        return far | (position > now[row]) | (position <= after[row]);
    }
};

}  // namespace KVA_ISA

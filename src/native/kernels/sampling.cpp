// Draws tokens: each row's among its top-k and top-p tokens, by the inverse of the distribution function.
//
// Nothing is sorted. Weights are exp((logit - highest) / temperature), positive floats, whose order is that of their
// bits. What is kept is found digit by digit, from the highest: a pass counts tokens and weight per digit, and goes into
// the digit where the limit falls. Of equal weights at the limit the first tokens are kept.
#include <cstdlib>

#include "convert.h"

// Mirrored in kernels/sampling/native.py.
struct kva_draw {
    const float* logits;       // [rows, vocabulary], last dimension contiguous
    int64_t stride;            // of a row, elements
    const float* temperature;  // [rows], above 0
    const int64_t* top_k;      // [rows]; 0: all
    const double* top_p;       // [rows], in (0, 1]
    const double* uniform;     // [rows], in [0, 1)
    int64_t* token;            // [rows], to be written; -1: the row has no token to draw
    int64_t rows, vocabulary;
    int32_t threads;
};

namespace KVA_ISA {
namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr int SHIFTS[] = {20, 8, 0}, DIGITS[] = {1 << 10, 1 << 12, 1 << 8};  // no weight is above 1, 0x3f8 of the first
constexpr int RUN = 256;  // tokens whose weights are summed before they are looked at one by one

// Tokens that are kept: those of greater weight than `least`, and the first `ties` of those that weigh as much.
struct Kept {
    uint32_t least = 0;
    int64_t ties = INT64_MAX;
    double mass = 0;  // of all that are kept
    bool has(uint32_t weight, int64_t& left) const { return weight > least || (weight == least && left-- > 0); }
};

struct Digit {
    int64_t count;
    double mass;
};

uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

float float_of_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

// Memory of one thread.
struct Row {
    float *weights, *some;  // [vocabulary]
    Digit* digits;          // [2][the most digits]
};

// Keeps the heaviest tokens: `count` of them, or, of those that `among` keeps, as many as together reach `mass`.
Kept keep(const float* weights, int64_t n, const Kept& among, int64_t count, double mass, const Row& room) {
    Digit* const digits = room.digits;
    float* const some = room.some;
    uint32_t prefix = 0;
    int64_t before_count = 0, found = 0;
    double before_mass = 0;
    for (int level = 0; level < 3; ++level) {
        const int above = level ? SHIFTS[level - 1] : 32;
        Digit* const twice = digits + DIGITS[level];  // every other token's: the next one need not wait for the sum
        std::memset(digits, 0, 2 * DIGITS[level] * sizeof *digits);
        const float* const from = level < 2 ? weights : some;
        const int64_t number = level < 2 ? n : found;
        int64_t left = among.ties, kept = 0;
        for (int64_t i = 0; i < number; ++i) {
            const uint32_t weight = bits_of(from[i]);
            if (!weight || (level < 2 && !among.has(weight, left)) || (level && weight >> above != prefix)) continue;
            if (level == 1) some[kept++] = from[i];
            Digit& digit = (i & 1 ? twice : digits)[weight >> SHIFTS[level] & (DIGITS[level] - 1)];
            ++digit.count;
            digit.mass += from[i];
        }
        found = kept;
        for (int at = 0; at < DIGITS[level]; ++at) {
            digits[at].count += twice[at].count;
            digits[at].mass += twice[at].mass;
        }
        int at = DIGITS[level] - 1;
        for (; at > 0; --at) {  // to the digit in which the limit falls
            const Digit& digit = digits[at];
            if (before_count + digit.count >= count || before_mass + digit.mass >= mass) break;
            before_count += digit.count;
            before_mass += digit.mass;
        }
        prefix = (level ? prefix << (above - SHIFTS[level]) : 0) | (uint32_t)at;
    }
    Kept kept;
    kept.least = prefix;
    const double each = float_of_bits(prefix);
    const double needed = each > 0 ? (mass - before_mass) / each : 0;
    const int64_t by_mass = needed < (double)n ? (int64_t)needed + ((double)(int64_t)needed < needed) : n;
    const int64_t by_count = count - before_count;
    const int64_t there = digits[prefix & (DIGITS[2] - 1)].count;
    kept.ties = by_mass < by_count ? by_mass : by_count;
    kept.ties = kept.ties < 1 ? (before_count ? 0 : 1) : kept.ties > there ? there : kept.ties;
    kept.mass = before_mass + each * kept.ties;
    return kept;
}

// Turns logits into weights; returns their sum, NaN if some logit is NaN or none is finite.
double weigh(const float* logits, int64_t n, float temperature, float* weights) {
    vf top = set1(-INF);
    bool numbers = true;
    by_vectors((int)n, [&](int i, int m) {
        const vf x = m == VF ? load(logits + i) : load_part(logits + i, m);
        const vi odd = x != x;
        for (int lane = 0; lane < m; ++lane) numbers &= !odd[lane];
        top = vmax(top, m == VF ? x : (iota() < m ? x : set1(-INF)));
    });
    const float highest = hmax(top);
    if (!numbers || !(highest > -INF) || highest == INF) return __builtin_nan("");
    const float factor = LOG2_E / temperature;
    double total = 0;
    for (int64_t from = 0; from < n; from += RUN) {
        const int count = (int)(n - from < RUN ? n - from : RUN);
        vf sum{};
        by_vectors(count, [&](int i, int m) {
            const vf x = m == VF ? load(logits + from + i) : load_part(logits + from + i, m);
            vf weight = exp2(vmax((x - highest) * factor, set1(-200.0f)));
            if (m < VF) weight = iota() < m ? weight : vf{};
            store_element(Fp32{}, (uint8_t*)(weights + from + i), weight, m);
            sum += weight;
        });
        total += hsum(sum);
    }
    return total;
}

int64_t draw(const kva_draw& args, int64_t row, const Row& room) {
    const int64_t n = args.vocabulary;
    const float* weights = room.weights;
    Kept kept;
    kept.mass = weigh(args.logits + row * args.stride, n, args.temperature[row], room.weights);
    if (!(kept.mass > 0)) return -1;
    if (args.top_k[row] > 0 && args.top_k[row] < n) {
        kept = keep(weights, n, kept, args.top_k[row], 1e300, room);
    }
    if (args.top_p[row] < 1) {
        kept = keep(weights, n, kept, INT64_MAX, args.top_p[row] * kept.mass, room);
    }
    double target = args.uniform[row] * kept.mass, passed = 0;
    int64_t ties = kept.ties, last = -1;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t weight = bits_of(weights[i]);
        if (!weight || !kept.has(weight, ties)) continue;
        last = i;
        passed += weights[i];
        if (passed > target) break;
    }
    return last;  // rounding may leave the target behind all of them
}

}  // namespace
}  // namespace KVA_ISA

KVA_EXPORT(kva_draw)(const kva_draw* args) {
    using namespace KVA_ISA;
    if (args->rows < 0 || args->vocabulary < 1 || args->vocabulary > INT32_MAX) return KVA_ESHAPE;
    const int threads = args->threads < 1 ? 1 : args->threads > args->rows ? (int)args->rows : args->threads;
    bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* const weights = (float*)std::malloc(2 * args->vocabulary * sizeof(float));
        Digit* const digits = (Digit*)std::malloc(2 * DIGITS[1] * sizeof(Digit));
        const Row room{weights, weights + args->vocabulary, digits};
        const bool lacks = !weights || !digits;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < args->rows; ++row) {
            if (!lacks) args->token[row] = draw(*args, row, room);
        }
        if (lacks) {
#pragma omp atomic write
            failed = true;
        }
        std::free(weights);
        std::free(digits);
    }
    return failed ? KVA_EMEMORY : KVA_OK;
}

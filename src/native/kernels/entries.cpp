// Products of vectors with the entries of a stream: what selectors score pages or tokens by.
#include "convert.h"

// Mirrored in kernels/entries/native.py.
struct kva_entries {
    const uint8_t* memory;
    const int32_t* table;       // [R, H, C]
    int64_t table_row, table_lane;  // strides, elements
    const int64_t* count;       // [R, H], contiguous: entries in use
    const float* q;             // [R, H, G, q_stride], contiguous; zeros from the width on, to a multiple of 16
    float* out;                 // [R, H, G, C * entries], to be written; -infinity past the entries in use
    int64_t rows, heads, columns;
    int64_t at;                 // of the first entry, bytes from the start of a block
    int64_t q_stride;
    int32_t entries, width, group, format;  // of a block; numbers of an entry; G; KVA_FP32, KVA_BF16, KVA_FP16
    int32_t threads;
};

using namespace KVA_ISA;

KVA_EXPORT(kva_dot_entries)(const kva_entries* args) {
    const kva_entries& a = *args;
    if (a.width < 1 || a.entries < 1 || a.group < 1 || a.q_stride < rounded(a.width, MAX_VF)) return KVA_ESHAPE;
    const int64_t places = a.columns * a.entries;
    const bool known = with_float(a.format, [&](auto element) {
        using Element = decltype(element);
        const int64_t stride = a.width * Element::BYTES;
        for_each(a.rows * a.heads, a.threads, [&](int64_t lane) {
            const int32_t* const table = a.table + lane / a.heads * a.table_row + lane % a.heads * a.table_lane;
            const float* const q = a.q + lane * a.group * a.q_stride;
            float* const out = a.out + lane * a.group * places;
            const int64_t used = a.count[lane] < places ? a.count[lane] : places;
            for (int64_t first = 0; first < used; first += a.entries) {
                const uint8_t* const block = a.memory + (int64_t)table[first / a.entries] * 64 + a.at;
                const int64_t after = first + a.entries < used ? first / a.entries + 1 : first / a.entries;
                const uint8_t* const next = a.memory + (int64_t)table[after] * 64 + a.at;
                const int count = (int)(used - first < a.entries ? used - first : a.entries);
                by_heads(a.group, [&](int h, auto heads) {
                    dot_rows<Element, decltype(heads)::value>(DenseRows{block, stride}, count, a.width, q + h * a.q_stride,
                                                              a.q_stride, out + h * places + first, places,
                                                              Ahead{next, next});
                });
            }
            for (int g = 0; g < a.group; ++g) {
                for (int64_t p = used; p < places; ++p) out[g * places + p] = -INF;
            }
        });
    });
    return known ? KVA_OK : KVA_EFORMAT;
}

// Memory of a call, in aligned pieces.
#pragma once
#include "../simd.h"

namespace KVA_ISA {

// Hands out pieces of a buffer; without a buffer, only measures.
struct Pieces {
    uint8_t* base;
    int64_t at = 0;
    template <class T>
    T* take(int64_t count) {
        uint8_t* piece = base + at;
        at += rounded(count * (int64_t)sizeof(T), 64);
        return (T*)piece;
    }
};

}  // namespace KVA_ISA

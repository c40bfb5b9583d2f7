// Rows of numbers in and out of every element type, rounded to nearest even as torch does.
#pragma once
#include "read_int8.h"

namespace KVA_ISA {

KVA_INLINE uint16_t fp16_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and more round to infinity
    if (u < 0x38800000) {                                   // below 2^-14: a step is 2^-24, as it is of floats near 1/2
        float a;
        std::memcpy(&a, &u, 4);
        a += 0.5f;
        std::memcpy(&u, &a, 4);
        return (uint16_t)(sign | (u - 0x3f000000));
    }
    return (uint16_t)(sign | ((u + 0xc8000fff + (u >> 13 & 1)) >> 13));
}

KVA_INLINE vh to_fp16(vf x) {
#if defined(KVA_ISA_avx512)
    return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(KVA_ISA_avx2)
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vh h;
    for (int i = 0; i < VF; ++i) h[i] = fp16_of(x[i]);
    return h;
#endif
}

constexpr float HALF_MAX = 65504.0f;

KVA_INLINE void put16(uint8_t* p, uint16_t x) { std::memcpy(p, &x, 2); }
KVA_INLINE float float_of(uint16_t h) {
    vh wide{};
    wide[0] = h;
    return from_fp16(wide)[0];
}
KVA_INLINE uint16_t get16(const uint8_t* p) { return load_as<uint16_t>(p); }

KVA_INLINE vh to_bf16(vf x) {
    const vu u = (vu)x;
    const vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : vu{} + 0x7fc0, vh);
}

template <class V>
KVA_INLINE void store_as(void* p, V v, int n) {
    std::memcpy(p, &v, n * sizeof v[0]);
}

// n of VF numbers, at most VF.
KVA_INLINE void store_element(Fp32, uint8_t* p, vf x, int n) { n == VF ? store((float*)p, x) : store_as(p, x, n); }
KVA_INLINE void store_element(Bf16, uint8_t* p, vf x, int n) { store_as(p, to_bf16(x), n); }
KVA_INLINE void store_element(Fp16, uint8_t* p, vf x, int n) { store_as(p, to_fp16(x), n); }

template <class Element>
KVA_INLINE vf load_element(const uint8_t* p, int n) {
    return n == VF ? Element::load(p) : Element::load_part(p, n);
}

// Calls f(first, count) for each vector of a row: VF numbers, in the end fewer.
template <class F>
KVA_INLINE void by_vectors(int dim, const F& f) {
    int c = 0;
    for (; c + VF <= dim; c += VF) f(c, VF);
    if (c < dim) f(c, dim - c);
}

template <class From, class To>
KVA_INLINE void convert_row(const uint8_t* from, uint8_t* to, int dim) {
    if constexpr (std::is_same_v<From, To>) {
        if (dim > 0) std::memcpy(to, from, dim * From::BYTES);  // of no numbers there may be no address
    } else {
        by_vectors(dim, [&](int c, int n) {
            store_element(To{}, to + c * To::BYTES, load_element<From>(from + c * From::BYTES, n), n);
        });
    }
}

// Calls f with the element type of a float format; false: it is none.
template <class F>
KVA_INLINE bool with_float(int32_t format, const F& f) {
    switch (format) {
        case KVA_FP32: f(Fp32{}); return true;
        case KVA_BF16: f(Bf16{}); return true;
        case KVA_FP16: f(Fp16{}); return true;
        default: return false;
    }
}

// Calls f(i) for each i below n, in parallel if that is worth a parallel region.
template <class F>
KVA_INLINE void for_each(int64_t n, int threads, const F& f) {
    if (threads <= 1 || n <= 1) {
        for (int64_t i = 0; i < n; ++i) f(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace KVA_ISA

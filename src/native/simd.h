// Vectors of floats in the instruction set of this build, and what the kernels do with them.
//
// Everything is in namespace KVA_ISA, which is another one in each of the builds of a kernel. Written with the vector
// types of GCC and Clang; intrinsics only where these say too little. The baseline runs on any processor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(KVA_ISA_avx2) || defined(KVA_ISA_avx512)
#include <immintrin.h>
#endif

#define KVA_INLINE inline __attribute__((always_inline))
#define KVA_UNROLL _Pragma("GCC unroll 16")

namespace KVA_ISA {

#if defined(KVA_ISA_avx512)
constexpr int VF = 16;  // floats of a vector
#elif defined(KVA_ISA_avx2)
constexpr int VF = 8;
#else
constexpr int VF = 4;
#endif
constexpr int MAX_VF = 16;  // buffers are padded to this many floats in every build
constexpr float INF = __builtin_inff();

typedef float vf __attribute__((vector_size(4 * VF)));
typedef int32_t vi __attribute__((vector_size(4 * VF)));
typedef uint32_t vu __attribute__((vector_size(4 * VF)));
typedef float vf4 __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(2 * VF)));  // as many 16-bit numbers as a vector has floats
typedef int8_t vb __attribute__((vector_size(VF)));        // as many bytes

constexpr int64_t rounded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class V>
KVA_INLINE V load_as(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// The first n elements of a vector, zeros behind them; bytes behind them are not touched.
template <class V>
KVA_INLINE V load_part_as(const void* p, int n) {
    V v{};
    std::memcpy(&v, p, n * sizeof v[0]);
    return v;
}

KVA_INLINE vf set1(float x) { return x - vf{}; }  // a broadcast alone: x + 0 would turn -0 into 0
KVA_INLINE vf load(const float* p) { return load_as<vf>(p); }
KVA_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
KVA_INLINE vf bits(vu u) { return (vf)u; }
KVA_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted by -ffp-contract=fast

KVA_INLINE vi iota() {
#if defined(KVA_ISA_avx512)
    return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(KVA_ISA_avx2)
    return vi{0, 1, 2, 3, 4, 5, 6, 7};
#else
    return vi{0, 1, 2, 3};
#endif
}

KVA_INLINE vf load_part(const float* p, int n) {
#if defined(KVA_ISA_avx512)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(KVA_ISA_avx2)
    return (vf)_mm256_maskload_ps(p, (__m256i)(iota() < n));
#else
    return load_part_as<vf>(p, n);
#endif
}

KVA_INLINE vf from_bf16(vh h) {
#if defined(KVA_ISA_avx512)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(KVA_ISA_avx2)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    return bits(__builtin_convertvector(h, vu) << 16);
#endif
}

KVA_INLINE vf from_fp16(vh h) {
#if defined(KVA_ISA_avx512)
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(KVA_ISA_avx2)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    const vu wide = __builtin_convertvector(h, vu);
    const vf scaled = bits((wide & 0x7fff) << 13) * 0x1p112f;  // the exponent's bias is 15 there, 127 here
    const vu huge = (vu)(scaled >= 65536.0f) & 0x7f800000u;     // infinity and NaN
    return bits((vu)scaled | huge | (wide & 0x8000) << 16);
#endif
}

KVA_INLINE vf from_int8(vb b) {
#if defined(KVA_ISA_avx512)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b));
#elif defined(KVA_ISA_avx2)
    __m128i low;
    std::memcpy(&low, &b, sizeof b);
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
#else
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}

KVA_INLINE vf vmax(vf a, vf b) {
#if defined(KVA_ISA_avx512)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(KVA_ISA_avx2)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

KVA_INLINE vf vmin(vf a, vf b) {
#if defined(KVA_ISA_avx512)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(KVA_ISA_avx2)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// To the nearest integer, ties to even; |x| below 2^22.
KVA_INLINE vf nearest(vf x) {
#if defined(KVA_ISA_avx512)
    return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(KVA_ISA_avx2)
    return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const vf magic = set1(0x1.8p23f);
    return (x + magic) - magic;
#endif
}

// The four sums of a quarter of a vector each: lane i of the result is the sum of v's elements i, i + 4, i + 8 ..
KVA_INLINE vf4 fold(vf v) {
#if defined(KVA_ISA_avx512)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    return (vf4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(KVA_ISA_avx2)
    return (vf4)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    return v;
#endif
}

// The sums of four vectors.
KVA_INLINE vf4 sum4(vf a, vf b, vf c, vf d) {
#if defined(KVA_ISA_avx512)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    return fold((vf)_mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high)));
#elif defined(KVA_ISA_avx2)
    return fold((vf)_mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d)));
#else
    return vf4{a[0], b[0], c[0], d[0]} + vf4{a[1], b[1], c[1], d[1]} + vf4{a[2], b[2], c[2], d[2]} +
           vf4{a[3], b[3], c[3], d[3]};
#endif
}

KVA_INLINE float hsum(vf v) {
    const vf4 f = fold(v);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

KVA_INLINE float hmax(vf v) {
#if defined(KVA_ISA_avx512)
    return _mm512_reduce_max_ps((__m512)v);
#elif defined(KVA_ISA_avx2)
    __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
#else
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
#endif
}

// 2^x within 2 ulp for x <= 127; 0 below -126 and for -infinity. NaN stays NaN.
KVA_INLINE vf exp2(vf x) {
    const vf n = nearest(vmax(x, set1(-126.0f)));
    const vf f = x - n;  // in [-1/2, 1/2]; what smaller x give is discarded
    // A polynomial fitted to 2^f for the least relative error, 2e-9 before rounding.
    vf p = set1(1.5345811608e-4f);
    p = fma(p, f, set1(1.3399931216e-3f));
    p = fma(p, f, set1(9.6184889586e-3f));
    p = fma(p, f, set1(5.5503287770e-2f));
    p = fma(p, f, set1(2.4022646891e-1f));
    p = fma(p, f, set1(6.9314720574e-1f));
    p = fma(p, f, set1(1.0f));
    const vf power = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return x < -126.0f ? vf{} : p * power;
}

// tanh(x) from exp2, to 1e-7 absolute: for a softcap, which adds its result.
KVA_INLINE vf tanh(vf x) {
    const vf e = exp2(vmin(vmax(x, set1(-20.0f)), set1(20.0f)) * (2 * 1.44269504f));
    return 1.0f - 2.0f / (e + 1.0f);
}

// Into the second-level cache. Measured on Zen 4 out of memory: twice as fast as into the first, which has few slots for
// lines on their way; the processor fetches from the second in time by itself.
KVA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace KVA_ISA

// Vectors of 16-bit integers and their dot products, for the readers of quantised formats.
#pragma once
#include "../simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace KVA_ISA {

constexpr int QUADS = 32;   // of a run of packed codes: tokens of keys, channels of values
constexpr int VW = 2 * VF;  // 16-bit integers of a vector
typedef int16_t vw __attribute__((vector_size(4 * VF)));
typedef uint16_t vuw __attribute__((vector_size(4 * VF)));

KVA_INLINE vw set_pair(int32_t two) { return (vw)(vi{} + two); }

// The first n of VW int8, as 16-bit integers; zeros behind them.
KVA_INLINE vw widen(const uint8_t* p, int n = VW) {
    typedef int8_t bytes __attribute__((vector_size(VW)));
    const bytes b = n == VW ? load_as<bytes>(p) : load_part_as<bytes>(p, n);
#if defined(KVA_ISA_avx512)
    return (vw)_mm512_cvtepi8_epi16((__m256i)b);
#elif defined(KVA_ISA_avx2)
    return (vw)_mm256_cvtepi8_epi16((__m128i)b);
#elif defined(__SSE2__)
    __m128i low = _mm_setzero_si128();
    std::memcpy(&low, &b, sizeof b);
    return (vw)_mm_srai_epi16(_mm_unpacklo_epi8(low, low), 8);
#else
    return __builtin_convertvector(b, vw);
#endif
}

// sum[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
KVA_INLINE vi madd(vi sum, vw a, vw b) {
#if defined(KVA_ISA_avx512)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(KVA_ISA_avx2)
    return (vi)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#elif defined(__SSE2__)
    return (vi)_mm_add_epi32((__m128i)sum, _mm_madd_epi16((__m128i)a, (__m128i)b));
#else
    for (int i = 0; i < VF; ++i) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
#endif
}

// Pairs (a[i], b[i]), half of them in each result; `in_order` brings numbers, one per pair, into the order of i.
KVA_INLINE void interleave(vw a, vw b, vw& low, vw& high) {
#if defined(KVA_ISA_avx512)
    low = (vw)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
    high = (vw)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#elif defined(KVA_ISA_avx2)
    low = (vw)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
    high = (vw)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    low = (vw)_mm_unpacklo_epi16((__m128i)a, (__m128i)b);
    high = (vw)_mm_unpackhi_epi16((__m128i)a, (__m128i)b);
#else
    for (int i = 0; i < VF; ++i) {
        low[2 * i] = a[i], low[2 * i + 1] = b[i];
        high[2 * i] = a[VF + i], high[2 * i + 1] = b[VF + i];
    }
#endif
}

KVA_INLINE void in_order(vi& low, vi& high) {
#if defined(KVA_ISA_avx512)
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const __m512i a = (__m512i)low, b = (__m512i)high;
    low = (vi)_mm512_permutex2var_epi32(a, first, b);
    high = (vi)_mm512_permutex2var_epi32(a, second, b);
#elif defined(KVA_ISA_avx2)
    const __m256i a = (__m256i)low, b = (__m256i)high;
    low = (vi)_mm256_permute2x128_si256(a, b, 0x20);
    high = (vi)_mm256_permute2x128_si256(a, b, 0x31);
#else
    (void)low, (void)high;
#endif
}

// The sums of four vectors.
KVA_INLINE vf4 sum4(vi a, vi b, vi c, vi d) {
#if defined(KVA_ISA_avx512)
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)a, (__m512i)b),
                                        _mm512_unpackhi_epi32((__m512i)a, (__m512i)b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)c, (__m512i)d),
                                        _mm512_unpackhi_epi32((__m512i)c, (__m512i)d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return (vf4)_mm_cvtepi32_ps(sums);
#elif defined(KVA_ISA_avx2)
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)a, (__m256i)b),
                                          _mm256_hadd_epi32((__m256i)c, (__m256i)d));
    return (vf4)_mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
    return __builtin_convertvector((vi{a[0], b[0], c[0], d[0]} + vi{a[1], b[1], c[1], d[1]}) +
                                       (vi{a[2], b[2], c[2], d[2]} + vi{a[3], b[3], c[3], d[3]}),
                                   vf4);
#endif
}

// The greatest of each of four vectors.
KVA_INLINE vf4 max4(vf a, vf b, vf c, vf d) {
#if defined(KVA_ISA_avx512)
    const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_max_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return (vf4)_mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(KVA_ISA_avx2)
    const __m256 ab = _mm256_max_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
    const __m256 cd = _mm256_max_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
    const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256 all = _mm256_max_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
    return (vf4)_mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
    return vf4{hmax(a), hmax(b), hmax(c), hmax(d)};
#endif
}

// Rounds to the nearest integer, ties to even, and stores VF of them as int16; |x| <= 32767.
KVA_INLINE void store_int16(int16_t* out, vf x) {
#if defined(KVA_ISA_avx512)
    _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)x)));
#elif defined(KVA_ISA_avx2)
    const __m256i whole = _mm256_cvtps_epi32((__m256)x);
    _mm_storeu_si128((__m128i*)out,
                     _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
#else
    const vi whole = __builtin_convertvector(nearest(x), vi);
    for (int i = 0; i < VF; ++i) out[i] = (int16_t)whole[i];
#endif
}

// Likewise as int8; |x| <= 127.
KVA_INLINE void store_int8(int8_t* out, vf x) {
#if defined(KVA_ISA_avx512)
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x)));
#elif defined(KVA_ISA_avx2)
    const __m256i whole = _mm256_cvtps_epi32((__m256)x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i*)out, _mm_packs_epi16(words, words));
#else
    const vi whole = __builtin_convertvector(nearest(x), vi);
    for (int i = 0; i < VF; ++i) out[i] = (int8_t)whole[i];
#endif
}

// Likewise VF numbers of each of four heads, as quads: 4 numbers of a, the same 4 of b, of c, of d, the next 4 of a ..
KVA_INLINE void store_quads(int8_t* out, vf a, vf b, vf c, vf d) {
#if defined(KVA_ISA_avx512)
    const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32((__m512)a), _mm512_cvtps_epi32((__m512)b));
    const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32((__m512)c), _mm512_cvtps_epi32((__m512)d));
    _mm512_storeu_si512(out, _mm512_packs_epi16(ab, cd));
#elif defined(KVA_ISA_avx2)
    const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)a), _mm256_cvtps_epi32((__m256)b));
    const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)c), _mm256_cvtps_epi32((__m256)d));
    _mm256_storeu_si256((__m256i*)out, _mm256_packs_epi16(ab, cd));
#elif defined(__SSE2__)
    const __m128i ab = _mm_packs_epi32(_mm_cvtps_epi32((__m128)a), _mm_cvtps_epi32((__m128)b));
    const __m128i cd = _mm_packs_epi32(_mm_cvtps_epi32((__m128)c), _mm_cvtps_epi32((__m128)d));
    _mm_storeu_si128((__m128i*)out, _mm_packs_epi16(ab, cd));
#else
    store_int8(out, a), store_int8(out + 4, b), store_int8(out + 8, c), store_int8(out + 12, d);
#endif
}

KVA_INLINE vf vabs(vf x) { return bits((vu)x & 0x7fffffffu); }

// The greater of a, which is not negative, and the size of b.
KVA_INLINE vf max_size(vf a, vf b) {
#if defined(KVA_ISA_avx512)
    return (vf)_mm512_range_ps((__m512)b, (__m512)a, 0b1011);
#else
    return vmax(a, vabs(b));
#endif
}

// Of up to four vectors, each in its place: its greatest number; its sum. Places without a vector hold anything.
template <int N>
KVA_INLINE vf4 maxima(const vf (&v)[N]) {
    return max4(v[0], v[N > 1 ? 1 : 0], v[N > 2 ? 2 : 0], v[N > 3 ? 3 : 0]);
}
template <int N>
KVA_INLINE vf4 totals(const vf (&v)[N]) {
    return sum4(v[0], v[N > 1 ? 1 : 0], v[N > 2 ? 2 : 0], v[N > 3 ? 3 : 0]);
}

// Factors that make integers up to `top` of numbers up to `most`; numbers too small for that count as 0.
KVA_INLINE vf4 to_integers(vf4 most, float top) { return most > 1e-30f ? top / most : vf4{}; }
KVA_INLINE float to_integers(float most, float top) { return most > 1e-30f ? top / most : 0.0f; }

}  // namespace KVA_ISA

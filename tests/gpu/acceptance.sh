#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call: the tests marked gpu, then the main job in bfloat16.
# Usage: tests/gpu/acceptance.sh [FOLDER]   The log and the records go to FOLDER (results/runs/gpu by default).
# PYTHON names an interpreter with torch for CUDA and the project's dependencies.
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
folder=${1:-results/runs/gpu}
mkdir -p "$folder"
status=0

"$python" -c "import spath_eval.plugins" 2>/dev/null ||
    "$python" -m pip install --quiet --no-deps --no-build-isolation --editable . || exit 1

{
    "$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.version.cuda)" || exit 1
    TQDM_DISABLE=1 HF_HUB_OFFLINE=1 "$python" -m pytest -m gpu -ra || status=1
    "$python" -m spath_eval run --arch gemma --strategy negative --device cuda --dtype bfloat16 \
        -o "$folder/gemma-bfloat16.json" || status=1
    exit $status
} 2>&1 | tee "$folder/log.txt"
exit "${PIPESTATUS[0]}"

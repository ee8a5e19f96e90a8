#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call: the tests marked gpu, the main job in bfloat16, and speed at
# published shapes: FFNs, whole layers with CUDA graphs on both arms, and the kernels of token-level strategies.
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
    "$python" tests/benchmarks/ffn.py --seconds 10 || status=1
    for shape in gemma-2b Llama-3.1-8B; do
        "$python" -m spath_eval speed --shape "$shape" --layers 2 --sparsity 0.3,0.5 --batch 1,64 --context 128 --compile \
            --device cuda --dtype bfloat16 --seconds 10 -o "$folder/speed-$shape.json" || status=1
    done
    "$python" tests/gpu/token_kernels.py || status=1
    exit $status
} 2>&1 | tee "$folder/log.txt"
exit "${PIPESTATUS[0]}"

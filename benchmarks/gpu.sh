#!/usr/bin/env bash
# Everything that needs a GPU: build, GPU tests, compute-sanitizer, bench, overhead. A run ends within LIMIT seconds
# (default 530); what it then has not got to has failed, and can be asked for by name in a second run.
# Needs python3 with torch, triton, pytest and pytest-xdist on the PATH, and no package index. Writes RESULTS/<device>.json
# (default: benchmarks/results), prints a table last, and exits non-zero if any step failed or there is no GPU.
# With STEPs only those (and the build) are run; what earlier runs of the same sources found stays in the file.
# Peers that are installed take part: liger-kernel, trl, verl. The large logits take 78 GiB of GPU memory.
#
#   benchmarks/gpu.sh [RESULTS [STEP...]]
#   benchmarks/gpu.sh benchmarks/results logits-bf16 logits-fp32
set -uo pipefail

cd "$(dirname "$0")/.." || exit 2
RESULTS=$(realpath -m "${1:-benchmarks/results}")
ONLY=" ${*:2} "
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
LIMIT=${LIMIT:-530}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive

python3 - <<'PY' || { echo "gpu.sh: FAILED: torch sees no CUDA device; this script is for machines with a GPU" >&2; exit 2; }
import sys, torch
sys.exit(not torch.cuda.is_available())
PY

STEPS=() STATUS=() SECONDS_OF=()

# step NAME LIMIT COMMAND...: run it with its output in $LOGS/NAME.{out,err}, and note how it went.
step() {
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) began=$SECONDS status
    shift 2
    [[ $ONLY == "  " || $name == build || $ONLY == *" $name "* ]] || return 0
    ((limit > left)) && limit=$left
    echo "== $name (at most $limit s): $*"
    if ((limit < 5)); then
        status=124
    else
        timeout -k 5 "$limit" "$@" >"$LOGS/$name.out" 2>"$LOGS/$name.err"
        status=$?
    fi
    STEPS+=("$name") STATUS+=("$status") SECONDS_OF+=($((SECONDS - began)))
    if ((status != 0)); then
        echo "-- $name FAILED with status $status"
        tail -n 40 "$LOGS/$name.out" "$LOGS/$name.err" 2>/dev/null
    fi
}

# sanitize TOOL BACKEND
sanitize() {
    # Without PyTorch's caching allocator each tensor is an allocation of its own, whose ends memcheck sees.
    step "$1-$2" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 9 python3 benchmarks/sanitize.py "$2"
}

ARCHITECTURE=$(python3 -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
step build 200 env GAC_KERNELS_REQUIRE_EXT=1 GAC_KERNELS_CUDA=1 GAC_KERNELS_CUDA_ARCHITECTURES="$ARCHITECTURE" \
    python3 setup.py build_ext --inplace
step doctor 60 python3 -m gac_kernels doctor --json
# Side by side, for most of the time Triton compiles: some 130 kernels.
step tests 240 python3 -m pytest -q -n 6 -p no:cacheprovider tests/test_gpu.py tests/test_gpu_controller.py
# Compiles Triton's kernels: the sanitizers then spend their time running them.
for backend in triton cuda; do step "sanitize-$backend" 90 python3 benchmarks/sanitize.py $backend; done
sanitize memcheck cuda
sanitize synccheck cuda
LOGITS=(python3 -m gac_kernels bench --kernel logits --device cuda --backend triton,cuda --seconds 2 --json)
step logits-bf16 120 "${LOGITS[@]}" --dtype bf16 --shape 16384x151936 # 4.98 GB of logits, 9.96 GB to move
step bench 150 python3 -m gac_kernels bench --kernel token --device cuda --shape 64x2048 512x8192 --seconds 2 --json
step overhead-qwen2 60 python3 -m gac_kernels overhead --device cuda --model qwen2-0.5b-head --seconds 8 --json
sanitize racecheck cuda
sanitize initcheck cuda
step logits-small 60 "${LOGITS[@]}" --dtype bf16 --shape 1024x32000
step logits-fp32 120 "${LOGITS[@]}" --dtype fp32 --shape 8192x151936
HIDDEN=(python3 -m gac_kernels bench --kernel hidden --device cuda --backend triton,cuda --seconds 3 --json)
step hidden-bf16 120 "${HIDDEN[@]}" --dtype bf16 --shape 8192x151936

for tool in memcheck synccheck racecheck initcheck; do sanitize $tool triton; done

for i in "${!STEPS[@]}"; do
    printf '%s %s %s\n' "${STEPS[i]}" "${STATUS[i]}" "${SECONDS_OF[i]}"
done >"$LOGS/steps"
python3 benchmarks/collect.py "$LOGS" "$RESULTS"

#!/usr/bin/env bash
# On a machine with CUDA, in under nine minutes: the tests that need a GPU, then the benchmarks.
#
#   scripts/gpu_check.sh OUT_DIR        leaves tests.txt, bench.txt, results.jsonl, three pictures and summary.md there
#
# Uses $PYTHON (python3) as it is, with fcmae's dependencies installed, and no network. A step that fails or takes too
# long does not stop the others; the exit status is 1 if one did. FCMAE_CHECK_DEVICE=cpu runs the same on tiny networks,
# to try this script where there is no GPU.
set -uo pipefail

if (($# != 1)); then
    echo "usage: scripts/gpu_check.sh OUT_DIR" >&2
    exit 2
fi
if [[ ${FCMAE_CHECK_DEVICE:-cuda} == cuda ]] &&
    ! "${PYTHON:-python3}" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: torch finds no CUDA device here: run it on a machine that has one" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
device=${FCMAE_CHECK_DEVICE:-cuda}
deadline=${FCMAE_CHECK_SECONDS:-520}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
rm -f "$out"/{tests.txt,bench.txt,results.jsonl,summary.md,tiny.png,base.png,huge.png}

declare -A outcome
steps=()

# step NAME SECONDS LOG COMMAND...: runs it while there is time, and notes its exit status; the last of a name counts.
step() {
    local name=$1 seconds=$2 log=$3 left=$((deadline - SECONDS))
    shift 3
    [[ -v outcome[$name] ]] || steps+=("$name")
    outcome[$name]=124
    ((left > 10)) || return 124
    printf '\n$ %s\n' "${*@Q}" | tee -a "$log"
    timeout --signal=INT --kill-after=10 "$((seconds < left ? seconds : left))" "$@" 2>&1 | tee -a "$log"
    outcome[$name]=${PIPESTATUS[0]}
    return "${outcome[$name]}"
}

# bench NAME SECONDS OPTION...
bench() {
    local name=$1 seconds=$2
    shift 2
    local options=("$@" "device=$device" precision=bf16 optimizer=false warmup=3 repeats=15 "json=$out/results.jsonl")
    if [[ $name != *compiled ]] && "$python" -c 'import matplotlib' 2>/dev/null; then
        options+=("plot=$out/$name.png")
    fi
    if [[ $device == cpu ]]; then
        options+=('model.depths=[1,1,1,1]' 'model.dims=[8,16,32,64]' model.decoder_dim=16 model.image_size=96
            batch_size=4 warmup=0 repeats=2 engines=all compile=false 'baselines=[dense,same kernels]')
    fi
    step "$name" "$seconds" "$out/bench.txt" "$python" -m fcmae.bench "${options[@]}"
}

# if_time SECONDS NAME ...: the bench NAME, if so many seconds are left.
if_time() {
    if ((deadline - SECONDS > $1)); then
        bench "$2" "$1" "${@:3}"
    else
        steps+=("$2")
        outcome[$2]=none
    fi
}

# Other files of tests may import what this machine lacks.
mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
tests=(-m gpu "${files[@]}")
[[ $device == cpu ]] && tests=(tests/test_packing.py)
step tests 170 "$out/tests.txt" "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"

ours='engines=[triton,torch]'
bench tiny 130 +model=tiny batch_size=256 "$ours" 'baselines=[dense,dense compiled,same kernels]'
bench base 130 +model=base batch_size=128 "$ours" 'baselines=[dense,dense compiled,same kernels]'
# Where dense does not fit beside ours, ours is measured alone, with the batch that fits.
bench huge 100 +model=huge batch_size=64 "$ours" 'baselines=[dense,same kernels]' ||
    { tail -n 3 "$out/bench.txt" | grep -qi memory &&
        bench huge 100 +model=huge batch_size=64 "$ours" 'baselines=[same kernels]' halve=true; }
if_time 70 'tiny compiled' +model=tiny batch_size=256 engines=triton 'baselines=[dense compiled,same kernels]' compile=true
if_time 70 'base compiled' +model=base batch_size=128 engines=triton 'baselines=[dense compiled,same kernels]' compile=true

results=()
for name in "${steps[@]}"; do
    results+=("$name=${outcome[$name]}")
done
"$python" -m fcmae.benchmark.summary "$out" "${results[@]}"
status=$?
cat "$out/summary.md"
exit "$status"

#!/usr/bin/env bash
# Everything that waits for a GPU, in one command, without a network:
#
#     COMMIT=$(git describe --always --dirty) benchmarks/gpu.sh OUT [DATA [STEP...]]
#
# OUT   gets a JSON file for each step, written anew after every comparison, and log.txt.
# DATA  holds ptb/, the Penn Treebank (default: data). Without it no model is trained.
# STEP  of 1 2 3 4 (default: all). Where a command may run ten minutes only: "1 2", "3", "4".
#
#   1  at most  75 s  tests/library/test_cuda.py; beside it, the other cores fill the compiler's cache
#   2          150 s  which way to pool should be "auto": time, memory and error of each, eager, compiled, as a graph
#   3          580 s  `bradbury` on the Penn Treebank, both models at once; beside it, layers are compiled for Fig. 4 of
#                     the paper: 30 cells, inference and training, over cuDNN's LSTM, measured once the GPU is free
#   4           75 s  speed of training steps of `girrbach` and `small`, float32 and bf16
#
# That is 14 minutes and 40 seconds. A step that fails or takes too long stops no other. Variables:
#   PYTHON   the interpreter (python3)
#   COMMIT   for the record, where this is a copy of the project without its history
#
# Packages: all steps need PyTorch (2.6 or later; written for 2.11 on Python 3.12 and newer), step 1 also pytest.
# The steps 3 and 4 need accelerate, filelock, matplotlib, safetensors, tokenizers, tqdm, tyro, with what tyro needs
# (docstring_parser, typeguard, typing_extensions), and step 4 pandas with tabulate. What is missing goes along as
# wheels: `pip download` them, for that Python, where there is a network, `pip install --target` here, and set
# PYTHONPATH. All but matplotlib, pandas, safetensors and tokenizers are pure Python.
set -u

if [ $# -eq 0 ]; then
    echo "usage: benchmarks/gpu.sh OUT [DATA [STEP...]]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
data=$(realpath -m "${2:-data}")
shift $(($# < 2 ? $# : 2))
steps=${*:-1 2 3 4}
cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2

# Usage: step SECONDS NAME [ARGUMENT...]
step() {
    local limit=$1 name=$2 started=$SECONDS code
    shift 2
    timeout --kill-after=10 "$limit" "${PYTHON:-python3}" -m benchmarks.gpu "$name" "$out" "$@"
    code=$?
    echo "== $name: $((SECONDS - started)) s, exit code $code"
}

for number in $steps; do
    case $number in
    1)
        step 75 compile_methods &
        step 75 tests
        wait $!
        ;;
    2) step 150 methods ;;
    3)
        exec 9>"$out/gpu.lock"
        flock 9
        step 500 bradbury --data "$data" --seconds 470 &
        exec 9>&- # so the training alone holds the lock
        step 580 fig4
        wait $!
        rm -f "$out/gpu.lock"
        ;;
    4) step 75 training_steps ;;
    *) echo "no step $number: 1 to 4 expected" >&2 ;;
    esac
done 2>&1 | tee -a "$out/log.txt"

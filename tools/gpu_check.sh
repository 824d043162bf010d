#!/bin/bash
# One command on a machine with one NVIDIA GPU and no network: what is installed, the GPU tests, the memory's kernels
# against plain autograd and the bandwidth, training steps at every K, and short trainings of the demo and of the largest
# paper model that fits, with their tokens/s and MFU.
#
#   tools/gpu_check.sh [override ...]      overrides go to the trainings, e.g. memory=k4
#
# PYTHON   interpreter with the project's dependencies (default: python)
# WORK     folder for data and runs (default: a new one under ${TMPDIR:-/tmp}, removed at the end)
# STEPS    optimizer steps of each training (default: 20)
# TUNE     1 tunes the kernels' block sizes for this GPU first and writes them to the checkout (default: 0)
# BENCH    0 leaves the benchmarks out (default: 1)
# OUT      folder for the benchmarks' JSON and PNG (default: $WORK/bench)
# Exit status: 0 all passed, 1 something failed, 3 no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}"
STEPS="${STEPS:-20}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1

say() { printf '\n== %s\n' "$1"; }
failed=()

gpu="$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true)"
if [[ -z "$gpu" || "$gpu" == *failed* ]]; then
    echo "No NVIDIA GPU here (nvidia-smi finds none): run this on a machine with one." >&2
    exit 3
fi
if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "nvidia-smi finds '$gpu', but $PYTHON has no torch that can use it: install a CUDA build or set PYTHON." >&2
    exit 3
fi

say "machine"
echo "nvidia-smi: $gpu"
"$PYTHON" tools/gpu_facts.py

if [[ -z "${WORK:-}" ]]; then
    WORK="$(mktemp -d)"
    trap 'rm -rf "$WORK"' EXIT
fi
OUT="${OUT:-$WORK/bench}"
mkdir -p "$WORK/runs" "$OUT"

say "tests marked gpu"
if "$PYTHON" -m pytest --version >/dev/null 2>&1; then
    status=0
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider || status=$?
    case "$status" in
        0) ;;
        5) echo "no test is marked gpu" ;;
        *) failed+=("tests marked gpu") ;;
    esac
else
    echo "pytest is not installed for $PYTHON: GPU tests not run" >&2
    failed+=("tests marked gpu (no pytest)")
fi

# bench NAME TOOL OPTION...: a benchmark's tables here, its JSON and PNG in OUT.
bench() {
    local name="$1" tool="$2"
    shift 2
    say "benchmark $name"
    "$PYTHON" -W ignore "tools/$tool" device=cuda "out=$OUT/$name.json" "plot=$OUT/$name.png" "$@" ||
        failed+=("benchmark $name")
}

if [[ "${TUNE:-0}" == 1 ]]; then
    say "tuning the kernels"
    "$PYTHON" tools/tune_kernels.py || failed+=("tuning the kernels")
fi

if [[ "${BENCH:-1}" != 0 ]]; then
    # The mix of one layer of the 1b: 8 sequences of 2,048 tokens.
    bench mix bench_mix.py tokens=16384 width=2048 blocks=2,8,24 layers=1,8 dtype=bf16
    bench mix_one_type bench_mix.py tokens=16384 width=2048 blocks=8 layers=8 dtype=bf16 distribution=one
    # Those K of the 1b whose optimizer state fits, with either owner of the tables; then every K on the largest model
    # that takes them all.
    bench step_1b bench_step.py model=1b micro_batch=4 accumulation=8 precision=bf16
    bench step_1b_tensor bench_step.py model=1b micro_batch=4 accumulation=8 precision=bf16 \
        overrides=memory.owners=tensor
    bench step_all_k bench_step.py model=auto micro_batch=4 accumulation=8 precision=bf16
fi

say "data: the running Python's standard library"
"$PYTHON" tools/prepare_data.py "inputs=[stdlib]" tokenizer=bpe:8192 "out=$WORK/data" || failed+=("data preparation")

# train NAME OVERRIDE...: a short training, then its last throughput.
train() {
    local name="$1"
    shift
    say "training $name"
    if "$PYTHON" -m tide_mega.train "run.root=$WORK/runs" "run.name=$name" "data.path=$WORK/data" \
        trainer.max_tokens=null "trainer.max_steps=$STEPS" optim.warmup_steps=1 trainer.eval_every=0 \
        trainer.eval_sequences=16 checkpoint.every=0 checkpoint.at_end=false logging.every=5 logging.wandb=disabled "$@" &&
        "$PYTHON" tools/gpu_facts.py "metrics=$WORK/runs/$name/metrics.jsonl"; then
        return 0
    fi
    failed+=("training $name")
    return 1
}

export WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT="$((20000 + $$ % 12000))"
if [[ ${#failed[@]} -eq 0 || "${failed[*]}" != *"data preparation"* ]]; then
    train demo_base experiment=demo_base trainer.precision=bf16 "$@" || true
    train demo_tide experiment=demo_tide trainer.precision=bf16 "$@" || true
    # Tables keep the paper's vocabulary, of which the demo's token ids are the first rows.
    if experiment="$("$PYTHON" tools/gpu_facts.py fits=true)"; then
        train "$experiment" "experiment=$experiment" trainer.global_batch_size=16 trainer.micro_batch_size=2 \
            "$@" || true
    else
        failed+=("choice of a paper model")
    fi
fi

say "summary"
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all passed on $gpu"

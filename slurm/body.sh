# shellcheck shell=bash
# The shared body of every job script here. A script sets EXPERIMENT and sources this file with its arguments,
# which are overrides for the training entry point.
#
# Settings, from the environment of sbatch:
#   TIDE_HOME       checkout of the project; default: the folder sbatch was called in
#   TIDE_CONTAINER  image for `srun --container-image` (pyxis); TIDE_MOUNTS adds mounts as src:dst,src:dst
#   TIDE_VENV       virtual environment, if no container is given; default: $TIDE_HOME/.venv if it exists
#   TIDE_RUN_NAME   name of the run folder; default: <experiment>-<job id>, which a requeued job keeps
#   TIDE_IFNAME     network interface for NCCL's and gloo's sockets between nodes; default: gloo uses the one that
#                   routes to the first node, and NCCL chooses, preferring InfiniBand
#   TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR  caches of compiled kernels; default: on the node's local disk (task.sh)
#   TIDE_WAIT_SECONDS  how long the other processes may run after the first has ended; default 120
#   TIDE_HEALTH     0 skips the check of the nodes before the run
# and those of outcome.sh, which decides what follows when the processes have ended.
set -euo pipefail

fail() {
    printf '%s\n' "$1" >&2
    exit 2
}

[[ -n "${SLURM_JOB_ID:-}" ]] ||
    fail "This is a SLURM job script: submit it with sbatch, or run 'torchrun -m tide_mega.train experiment=$EXPERIMENT' on one machine."

# The project's folder: sbatch runs a copy of the script, so the script's own path does not help.
home="${TIDE_HOME:-$SLURM_SUBMIT_DIR}"
[[ -f "$home/tide_mega/train.py" && -f "$home/conf/config.yaml" ]] ||
    fail "No tide_mega checkout in $home: call sbatch in the checkout's folder or set TIDE_HOME."
cd "$home"
# shellcheck source-path=SCRIPTDIR source=outcome.sh
. "$home/slurm/outcome.sh"

# The Python to run. When one process ends, the others get time to end as well: rank 0 may still be writing its logs,
# and the status that all agreed on would be lost. After that, a dead process ends the job instead of hanging it.
# Each process binds itself to the cores of its GPU's NUMA node (tide_mega.parallel.affinity): it must see all of them.
launch=(srun --kill-on-bad-exit=0 "--wait=${TIDE_WAIT_SECONDS:-120}" --cpu-bind=none)
if [[ -n "${TIDE_CONTAINER:-}" ]]; then
    launch+=("--container-image=$TIDE_CONTAINER" "--container-workdir=$home")
    launch+=("--container-mounts=$home:$home${TIDE_MOUNTS:+,$TIDE_MOUNTS}")
    TIDE_PYTHON=python
elif [[ -x "${TIDE_VENV:-$home/.venv}/bin/python" ]]; then
    TIDE_PYTHON="${TIDE_VENV:-$home/.venv}/bin/python"
elif [[ -n "${TIDE_VENV:-}" ]]; then
    fail "TIDE_VENV=$TIDE_VENV has no bin/python: give a virtual environment in which tide_mega is installed."
else
    TIDE_PYTHON="$(command -v python3 || command -v python)" ||
        fail "No Python found: set TIDE_VENV to a virtual environment or TIDE_CONTAINER to an image."
fi
export TIDE_PYTHON

# The cluster profile by GPU; the demo without GPUs.
gpus=0
if command -v nvidia-smi >/dev/null && names="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null)"; then
    gpus="$(grep -c . <<<"$names" || true)"
fi
tasks_on_node="${SLURM_TASKS_PER_NODE%%[(,]*}"
if ((gpus > 0)); then
    ((tasks_on_node <= gpus)) ||
        fail "$tasks_on_node tasks on a node with $gpus GPU(s): submit with --ntasks-per-node=$gpus, one task a GPU."
    case "$names" in
        *GB300*) cluster=gb300 ;;
        *B300*) cluster=b300 ;;
        *GB200*) cluster=gb200 ;;
        *B200*) cluster=b200 ;;
        *GH200*) cluster=local ;; # 96 or 144 GB
        *H200*) cluster=h200 ;;
        *H100*) cluster=h100 ;;
        *) cluster=local ;;
    esac
else
    case "$EXPERIMENT" in
        base_*) demo=demo_base ;;
        *) demo=demo_tide ;;
    esac
    echo "No GPU on $(hostname): running experiment=$demo in place of $EXPERIMENT."
    EXPERIMENT="$demo"
    cluster=local
fi

# Rendezvous. SLURM knows a node's address even if its name does not resolve.
TIDE_NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" || # in rank order, one per line
    fail "scontrol does not name the nodes of $SLURM_JOB_NODELIST: ask whoever runs this cluster."
head_node="${TIDE_NODES%%$'\n'*}"
export TIDE_NODES="${TIDE_NODES//$'\n'/ }"
MASTER_ADDR="$(scontrol show node "$head_node" 2>/dev/null | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2 || true)"
MASTER_ADDR="${MASTER_ADDR:-$head_node}"
# Below the ephemeral range; a different port after a requeue, since the last one may linger.
MASTER_PORT="$((20000 + (SLURM_JOB_ID + 131 * ${SLURM_RESTART_COUNT:-0}) % 12000))"
if ((SLURM_JOB_NUM_NODES == 1)) || [[ "$MASTER_ADDR" == 127.* ]]; then
    MASTER_ADDR=127.0.0.1
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
elif [[ -n "${TIDE_IFNAME:-}" ]]; then
    export NCCL_SOCKET_IFNAME="$TIDE_IFNAME" GLOO_SOCKET_IFNAME="$TIDE_IFNAME"
fi
export MASTER_ADDR MASTER_PORT

# The end of the time limit, for the training; empty if there is none.
if [[ -z "${SLURM_JOB_END_TIME:-}" ]]; then
    # From an empty string `date` would make the last midnight.
    SLURM_JOB_END_TIME="$(end="$(job_field EndTime)" && date -d "${end:-unknown}" +%s 2>/dev/null || true)"
    export SLURM_JOB_END_TIME
fi

# Settings of libraries.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 # a dead peer ends the job instead of hanging it
export CUDA_DEVICE_MAX_CONNECTIONS=1     # Megatron's tensor parallelism overlaps only in this order
export PYTHONUNBUFFERED=1

export TIDE_RUN_NAME="${TIDE_RUN_NAME:-$EXPERIMENT-$SLURM_JOB_ID}"
[[ ! "$TIDE_RUN_NAME" =~ [[:cntrl:]] ]] ||
    fail "TIDE_RUN_NAME=$(printf %q "$TIDE_RUN_NAME") cannot be a folder's name: leave the control characters out."
export TIDE_SICK_LIST="$home/.sick-nodes-$SLURM_JOB_ID" # one per line, written by tide_mega.health
echo "Job $SLURM_JOB_ID (restart ${SLURM_RESTART_COUNT:-0}): $SLURM_NTASKS process(es) on $SLURM_JOB_NUM_NODES" \
    "node(s), rendezvous at $MASTER_ADDR:$MASTER_PORT, run folder name $TIDE_RUN_NAME."

# The user's overrides come last, so they take precedence.
words=("experiment=$EXPERIMENT" "cluster=$cluster" "run.name=$TIDE_RUN_NAME" "$@")
status=0
if [[ "${TIDE_HEALTH:-1}" != 0 ]]; then
    # A separate port: the training's must not linger when the training starts.
    health_port="$((20000 + (MASTER_PORT - 20000 + 6000) % 12000))"
    MASTER_PORT="$health_port" run_step "${launch[@]}" bash "$home/slurm/task.sh" tide_mega.health "${words[@]}"
fi
if ((status == 0)); then
    run_step "${launch[@]}" bash "$home/slurm/task.sh" tide_mega.train "${words[@]}"
fi
finish "$status"

#!/bin/bash
# Runs one process of a job, the module named first: maps SLURM's rank and world variables to those that
# torch.distributed reads, and chooses the caches of compiled kernels.
set -euo pipefail
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="${SLURM_STEP_TASKS_PER_NODE%%[(,]*}"

# Whether a folder is private to this user and on a local file system: on a shared one all processes of a job would
# compile into the same files at once. A cache's contents are executed, so nobody else may be able to write there.
is_own_and_local() {
    [[ -d "$1" && -O "$1" && -w "$1" && ! -L "$1" && -z "$(find "$1" -maxdepth 0 -perm /022)" ]] || return 1
    chmod 700 "$1" || return 1
    case "$(stat --file-system --format=%T "$1" 2>/dev/null)" in
        ext* | xfs | btrfs | zfs | f2fs | tmpfs | ramfs | overlayfs) return 0 ;;
        *) return 1 ;;
    esac
}

# The caches stay for the node's next job: their entries are keyed by their sources. Another user may have taken the
# folder's name in /tmp, or could replace the folder where anybody may rename (no sticky bit); in that case, and
# without a local disk, the caches are private to this process.
for temporary in "${TMPDIR:-/tmp}" /tmp /dev/shm; do
    cache=""
    [[ -z "$(find -H "$temporary" -maxdepth 0 -perm /022 ! -perm -1000 2>/dev/null)" ]] || continue
    cache="$temporary/tide-mega-$(id -u)"
    mkdir -m 700 "$cache" 2>/dev/null || true
    ! is_own_and_local "$cache" || break
    cache=""
done
[[ -n "$cache" ]] || cache="$(mktemp -d)"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}"
exec "$TIDE_PYTHON" -m "$@"

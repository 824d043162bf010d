#!/bin/bash
# One process of a job, of the module named first: SLURM's names for rank and world in those that torch.distributed
# reads, and the caches of compiled kernels.
set -euo pipefail
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="${SLURM_STEP_TASKS_PER_NODE%%[(,]*}"

# Whether a folder is this user's alone, and on a file system of this node alone: on a shared one all processes of a job
# would compile into the same files at once. What a cache holds is run, so that nobody else may have written there.
is_own_and_local() {
    [[ -d "$1" && -O "$1" && -w "$1" && ! -L "$1" && -z "$(find "$1" -maxdepth 0 -perm /022)" ]] || return 1
    chmod 700 "$1" || return 1
    case "$(stat --file-system --format=%T "$1" 2>/dev/null)" in
        ext* | xfs | btrfs | zfs | f2fs | tmpfs | ramfs | overlayfs) return 0 ;;
        *) return 1 ;;
    esac
}

# The caches stay for the node's next job: their entries are named by what they were compiled from. Another user may
# hold the folder's name in /tmp, or could put another folder in its place where anybody may rename (no sticky bit);
# then, and where no disk is local, they are this process's alone.
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

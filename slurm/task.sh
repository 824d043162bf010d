#!/bin/bash
# One process of a job, of the module named first: SLURM's names for rank and world in those that torch.distributed
# reads.
set -euo pipefail
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="${SLURM_STEP_TASKS_PER_NODE%%[(,]*}"
exec "$TIDE_PYTHON" -m "$@"

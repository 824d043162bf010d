#!/bin/bash
# A run longer than the queue's time limit, as a chain of jobs: each starts when the one before has ended, and continues
# from its last checkpoint.
#
#   slurm/chain.sh N [sbatch option ...] SCRIPT [override ...]
#   slurm/chain.sh 10 --time=24:00:00 slurm/tide_1b.sh optim.lr=2e-4
#
# The links share one run folder (TIDE_RUN_NAME; default: the script's name and the time) and one log, <run name>.log.
# A link that completes the run, or fails in a way that the next would too, cancels the rest.
set -euo pipefail

usage="Usage: $0 N [sbatch option ...] SCRIPT [override ...], options written as --name=value"
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || { echo "$usage" >&2 && exit 2; }
count="$1"
shift
options=()
while [[ "${1:-}" == -* ]]; do
    options+=("$1")
    shift
done
[[ -f "${1:-}" ]] || { echo "No job script ${1:-given}. $usage" >&2 && exit 2; }

TIDE_CHAIN="${TIDE_RUN_NAME:-$(basename "$1" .sh)-$(date +%Y%m%d-%H%M%S)}"
TIDE_RUN_NAME="$TIDE_CHAIN"
export TIDE_CHAIN TIDE_RUN_NAME
previous=""
for ((link = 1; link <= count; link++)); do
    job="$(sbatch --parsable --comment="tide-chain:$TIDE_CHAIN" --output="$TIDE_CHAIN.log" \
        ${previous:+--dependency=afterany:$previous} "${options[@]}" "$@")"
    previous="${job%%;*}"
    echo "link $link of $count: job $previous"
done
echo "run $TIDE_RUN_NAME, log $TIDE_CHAIN.log"

#!/bin/bash
# A run longer than the queue's time limit, as a chain of jobs: each starts when the one before has ended, and continues
# from its last checkpoint.
#
#   slurm/chain.sh N [sbatch option ...] SCRIPT [override ...]
#   slurm/chain.sh 10 --time=24:00:00 slurm/tide_1b.sh optim.lr=2e-4
#
# The links share one run folder (TIDE_RUN_NAME; default: the script's name and the time) and one log, <run name>.log.
# A link that completes the run, or fails in a way that the next would too, cancels the remaining links of this call,
# which are identified by a mark in the jobs' comment.
set -euo pipefail

usage="Usage: $0 N [sbatch option ...] SCRIPT [override ...], options written as --name=value"
fail() {
    printf '%s\n' "$1" >&2
    exit 2
}
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || fail "$usage"
count="$1"
shift
options=()
while [[ "${1:-}" == -* ]]; do
    [[ "$1" != --comment* ]] || fail "$1: the comment marks the links of a chain, leave it out."
    options+=("$1")
    shift
done
[[ -f "${1:-}" ]] || fail "No job script $(printf %q "${1:-given}"). $usage"

TIDE_RUN_NAME="${TIDE_RUN_NAME:-$(basename "$1" .sh)-$(date +%Y%m%d-%H%M%S)}"
# It becomes the name of a folder and of the log: checked here, not by the first link after days in the queue.
[[ "$TIDE_RUN_NAME" =~ [^[:space:]] && ! "$TIDE_RUN_NAME" =~ [/\\[:cntrl:]] && ! "$TIDE_RUN_NAME" =~ ^\.\.?$ ]] ||
    fail "TIDE_RUN_NAME=$(printf %q "$TIDE_RUN_NAME") cannot be a folder's name: no separators, no control characters."

# The name, for readers of the queue, plus a unique suffix: another chain of this user may have the same name.
TIDE_CHAIN="$TIDE_RUN_NAME-$(od -An -N4 -tx1 /dev/urandom | tr -d ' \n')"
export TIDE_CHAIN TIDE_RUN_NAME
previous=""
for ((link = 1; link <= count; link++)); do
    # sbatch expands % in a log's name.
    if ! job="$(sbatch --parsable --comment="tide-chain:$TIDE_CHAIN" --output="${TIDE_RUN_NAME//%/%%}.log" \
        ${previous:+--dependency=afterany:$previous} "${options[@]}" "$@")"; then
        echo "SLURM did not take link $link of $count; the links before it, if any, stay in the queue." >&2
        exit 1
    fi
    previous="${job%%;*}"
    echo "link $link of $count: job $previous"
done
echo "run $TIDE_RUN_NAME, log $TIDE_RUN_NAME.log"

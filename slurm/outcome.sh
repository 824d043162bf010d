# shellcheck shell=bash
# Runs a job's steps and decides what follows: the end, a restart of this job, or the next link of a chain.
#
# Exit statuses of the processes (tide_mega/errors.py):
#   0           the run is complete
#   2, 3, 4, 5  configuration, data, divergence, a sick node: a restart would end the same way
#   7, 8        another process uses the run folder, points of a sweep failed: likewise
#   75          stopped on request, checkpoint written: restart
#   others      no checkpoint could be written or read (6), hung (76), killed, or failed: restart, unless this start
#               failed within TIDE_CRASH_MINUTES, since the next would probably fail in the same place
#
# Settings, from the environment of sbatch:
#   TIDE_MAX_RESTARTS   how often SLURM may restart the job; default 100
#   TIDE_CRASH_MINUTES  default 10

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*"; }

# Prints a field of this job, as scontrol shows it; nothing if SLURM does not answer, which must not end the job.
job_field() {
    local shown
    shown="$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null)" || return 0
    [[ " $shown" =~ " $1="([^ ]*) ]] && printf '%s\n' "${BASH_REMATCH[1]}" || true
}

asked=0       # whether SIGUSR1 was received
interrupted=0 # whether a signal was received, which ends `wait` early
step=""       # process id of the running command

# Set here, so that a signal before the processes are started neither kills this shell nor is lost.
trap 'asked=1 interrupted=1; pass_on' USR1

pass_on() {
    if [[ -n "$step" ]]; then
        say "SIGUSR1 came: passed on to the processes"
        kill -USR1 "$step" 2>/dev/null || true
    else
        say "SIGUSR1 came while no process is running"
    fi
}

# Runs a command, forwards SIGUSR1 to it, and leaves its exit status in `status`; 138, as for a command killed by
# SIGUSR1, if the signal came before.
#
# SLURM sends SIGTERM to the tasks directly (cancelled, preempted, time limit): this shell only has to survive it.
run_step() {
    local code
    status=138
    ((asked == 0)) || return 0
    trap 'interrupted=1' TERM
    "$@" &
    step=$!
    ((asked == 0)) || pass_on # the signal came between the two lines
    status=""
    interrupted=1
    while ((interrupted)); do
        interrupted=0
        wait "$step" && code=0 || code=$?
        [[ "$code" == 127 && -n "$status" ]] || status="$code" # 127: the command had ended when the signal came
    done
    step=""
}

# Decides what follows the exit status $1; does not return.
finish() {
    local status="$1" state what
    case "$status" in
        0) what="the run is complete" ;;
        2) what="the configuration cannot run" ;;
        3) what="the data is missing or damaged" ;;
        4) what="the training diverged" ;;
        5) what="the check before the run found a node that should not take part" ;;
        6) what="a checkpoint could not be written, or none can be used" ;;
        7) what="another process is at work in the run folder" ;;
        8) what="some points of the sweep failed" ;;
        75) what="the run was stopped and is saved" ;;
        76) what="a process hung" ;;
        *) what="the run failed" ;;
    esac
    state="$(job_field JobState)"
    if [[ -n "$state" && "$state" != RUNNING ]]; then
        say "Exit status $status: $what. SLURM itself is ending the job (state $state)."
        exit "$status"
    fi
    case "$status" in
        0 | 2 | 3 | 4 | 7 | 8)
            ((status == 0)) || say "Exit status $status: $what; another start would end the same way."
            drop_links
            exit "$status"
            ;;
        5) name_sick_nodes "$what" ;;
        75) start_again "$what" ;;
        *)
            if ((asked)); then # SIGUSR1 came while the processes were starting
                start_again "stopped before it could save"
            elif ((SECONDS < 60 * ${TIDE_CRASH_MINUTES:-10})); then
                say "Exit status $status: $what after $SECONDS s, so soon that another start would probably fail in" \
                    "the same place: not requeued (TIDE_CRASH_MINUTES=${TIDE_CRASH_MINUTES:-10})."
                exit "$status"
            fi
            start_again "$what"
            ;;
    esac
}

# Requeues the job, with $1 as the reason; if the next link of a chain is waiting, leaves the rest to it.
start_again() {
    local count="${SLURM_RESTART_COUNT:-0}" most="${TIDE_MAX_RESTARTS:-100}" problem links
    if [[ -n "${TIDE_CHAIN:-}" && "$status" == 75 ]]; then
        if ! links="$(waiting_links)"; then
            say "Exit status $status: $1. The next link of chain $TIDE_CHAIN continues it if one waits, and else" \
                "TIDE_RUN_NAME=$TIDE_RUN_NAME with slurm/chain.sh: squeue did not say."
        elif [[ -n "$links" ]]; then
            say "Exit status $status: $1; the next link of chain $TIDE_CHAIN continues it."
        else
            say "Exit status $status: $1, and this was the last link of chain $TIDE_CHAIN:" \
                "TIDE_RUN_NAME=$TIDE_RUN_NAME with slurm/chain.sh continues it."
        fi
    elif ((count >= most)); then
        say "Exit status $status: $1, and the job has been started again $count times: not requeued" \
            "(TIDE_MAX_RESTARTS=$most). TIDE_RUN_NAME=$TIDE_RUN_NAME with the same sbatch continues it."
    elif problem="$(scontrol requeue "$SLURM_JOB_ID" 2>&1)"; then
        say "Exit status $status: $1; requeued (restart $((count + 1)) of at most $most)."
    else
        say "Exit status $status: $1, and SLURM does not requeue the job (${problem:-no reason given})." \
            "TIDE_RUN_NAME=$TIDE_RUN_NAME with the same sbatch continues it."
    fi
    exit "$status"
}

# Names the nodes that failed the check. SLURM does not let a running job change its excluded nodes, and kills this
# shell when it requeues the job, so excluding them is up to the user.
name_sick_nodes() {
    local nodes
    nodes="$(paste -sd, "$TIDE_SICK_LIST" 2>/dev/null || true)"
    rm -f "$TIDE_SICK_LIST"
    say "Exit status $status: $1; mend it or submit with --exclude=${nodes:-<node>}."
    exit "$status"
}

# Prints the jobs of this user and this chain that have not started, one per line; fails if squeue does. The chain's
# mark is the whole comment, spaces included.
waiting_links() {
    local queue job
    [[ -n "${TIDE_CHAIN:-}" ]] || return 0
    queue="$(squeue --me --noheader --states=PENDING --format='%i %k' 2>/dev/null)" || return 1
    while IFS= read -r job; do
        [[ "${job#* }" != "tide-chain:$TIDE_CHAIN" ]] || printf '%s\n' "${job%% *}"
    done <<<"$queue"
}

# Cancels the links that have nothing left to do. If SLURM refuses, this job's outcome is unaffected: such a link
# starts, finds the run complete (or fails as this job did), and ends.
drop_links() {
    local list links problem
    [[ -n "${TIDE_CHAIN:-}" ]] || return 0
    if ! list="$(waiting_links)"; then
        say "squeue did not say which links of chain $TIDE_CHAIN still wait: none is cancelled." \
            "List them with: squeue --me --states=PENDING --format='%i %k'"
        return 0
    fi
    [[ -n "$list" ]] || return 0
    mapfile -t links <<<"$list"
    if problem="$(scancel --me --state=PENDING "${links[@]}" 2>&1)"; then
        say "Links ${links[*]} of chain $TIDE_CHAIN have nothing to do: cancelled."
    else
        say "Links ${links[*]} of chain $TIDE_CHAIN have nothing to do, and SLURM does not cancel them all" \
            "(${problem:-no reason given}): they end by themselves, or by scancel --me ${links[*]}"
    fi
}

# shellcheck shell=bash
# Runs a job's steps and decides what follows: the end, another start of this job, or the next link of a chain.
#
# Exit statuses of the processes (tide_mega/training/exits.py):
#   0           the run is complete
#   2, 3, 4, 5  configuration, data, divergence, a sick node: another start would end the same way
#   75          stopped when asked to, checkpoint written: another start
#   the rest    hung (76), killed, or failed: another start, unless this one failed within TIDE_CRASH_MINUTES,
#               when the next would probably fail in the same place
#
# Settings, from the environment of sbatch:
#   TIDE_MAX_RESTARTS   how often SLURM may start the job again; default 100
#   TIDE_CRASH_MINUTES  default 10

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*"; }

# A field of this job, as scontrol shows it.
job_field() { scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o " $1=[^ ]*" | head -n 1 | cut -d= -f2; }

asked=0 # whether SIGUSR1 came

# Runs a command, passes SIGUSR1 on to it, and leaves its exit status in `status`.
#
# SIGTERM comes to the tasks straight from SLURM (cancelled, preempted, time limit): this shell only has to live on.
run_step() {
    local interrupted=1 step code
    status=""
    "$@" &
    step=$!
    trap 'interrupted=1 asked=1; say "SIGUSR1 came: passed on to the processes"; kill -USR1 "$step" 2>/dev/null || true' USR1
    trap 'interrupted=1' TERM
    while ((interrupted)); do # a signal ends `wait` early
        interrupted=0
        wait "$step" && code=0 || code=$?
        [[ "$code" == 127 && -n "$status" ]] || status="$code" # 127: it had ended when the signal came
    done
    trap '' USR1
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
        75) what="the run was stopped and is saved" ;;
        76) what="a process hung" ;;
        *) what="the run failed" ;;
    esac
    state="$(job_field JobState)"
    if [[ "$state" != RUNNING ]]; then
        say "Exit status $status: $what. SLURM itself is ending the job (state $state)."
        exit "$status"
    fi
    case "$status" in
        0 | 2 | 3 | 4)
            ((status == 0)) || say "Exit status $status: $what; another start would end the same way."
            drop_links
            exit "$status"
            ;;
        5) name_sick_nodes "$what" ;;
        75) start_again "$what" ;;
        *)
            if ((asked)); then # it came while the processes were starting
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

# Requeues the job, because of $1; with the next link of a chain waiting, leaves the rest to it.
start_again() {
    local count="${SLURM_RESTART_COUNT:-0}" most="${TIDE_MAX_RESTARTS:-100}" problem
    if [[ -n "${TIDE_CHAIN:-}" && "$status" == 75 ]]; then
        if [[ -n "$(waiting_links)" ]]; then
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

# Says which nodes the check called sick. SLURM does not let a running job change the nodes it excludes, and kills this
# shell when it requeues the job, so leaving them out is up to the user.
name_sick_nodes() {
    local nodes
    nodes="$(paste -sd, "$TIDE_SICK_LIST" 2>/dev/null || true)"
    rm -f "$TIDE_SICK_LIST"
    say "Exit status $status: $1; mend it or submit with --exclude=${nodes:-<node>}."
    exit "$status"
}

# Jobs of this chain that have not started.
waiting_links() {
    [[ -n "${TIDE_CHAIN:-}" ]] || return 0
    squeue --noheader --states=PENDING --format='%i %k' | awk -v mark="tide-chain:$TIDE_CHAIN" '$2 == mark { print $1 }'
}

# Cancels the links for which nothing is left to do.
drop_links() {
    local links
    links="$(waiting_links | paste -sd' ')"
    [[ -n "$links" ]] || return 0
    say "Links $links of chain $TIDE_CHAIN have nothing to do: cancelled."
    # shellcheck disable=SC2086 # several job ids
    scancel $links
}

# shellcheck shell=bash
# What the batch scripts beside this file have in common. They source it from the directory that the job was submitted
# in, because SLURM runs a copy of the batch script from a directory of its own.

# shellcheck source=/dev/null
[ ! -f .venv/bin/activate ] || source .venv/bin/activate
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Find the nodes of a job, the first of which the ranks meet at, and the tasks of each. Refuse a job that would leave GPUs
# idle, or put two ranks on one.
check_tasks() {
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    export MASTER_ADDR="${MASTER_ADDR:-${hosts%%$'\n'*}}"  # head would end before scontrol does, an error with pipefail
    # As sbatch was asked for them. Without --ntasks-per-node SLURM would spread tasks as it likes.
    tasks="${SLURM_NTASKS_PER_NODE:?give sbatch --ntasks-per-node, one task for each GPU of a node}"
    # shellcheck disable=SC2034  # for the scripts
    nodes="$SLURM_JOB_NUM_NODES"
    if [ "${SLURM_GPUS_ON_NODE:-$tasks}" != "$tasks" ]; then
        echo "error: --ntasks-per-node=$tasks, but $SLURM_GPUS_ON_NODE GPUs on a node: give sbatch as many of both" >&2
        exit 2
    fi
}

# Check the configuration for so many ranks, and find the run's directory. A mistake ends the job here.
# The run writes the marker when it has saved and stopped early. An old one must not send a job that fails round and
# round; put aside it tells the run how often it was started without a step.
look() {  # RANKS ARGUMENT...
    local ranks="$1" config run_dir
    shift
    config="$(WORLD_SIZE="$ranks" python launchers/pretrain.py "$@" --dry-run)" || exit
    run_dir="$(python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["train"]["run_dir"])' <<< "$config")"
    marker="$run_dir/requeue.json"
    [ ! -f "$marker" ] || mv -f "$marker" "$run_dir/requeued.json"
}

# The key that ends a run before the job's time is over, for launchers that pass no signal on in time. Nothing where the
# job has no end.
time_limit() {
    local end="${SLURM_JOB_END_TIME:-}"
    [ -n "$end" ] || end="$(date -d "$(squeue --noheader --job "$SLURM_JOB_ID" --format %e)" +%s 2> /dev/null)" || return 0
    awk -v end="$end" -v now="$(date +%s)" 'BEGIN { if (end > now) printf "train.max_hours=%.4f", (end - now) / 3600 }'
}

# A port that another job on the same node does not have.
job_port() {
    echo "${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
}

# Put the job back into the queue. A task of an array goes back alone, by its own name.
requeue() {
    local task="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
    scontrol requeue "${task:-$SLURM_JOB_ID}"
}

# End the job with the run's status; back into the queue if the run has left its marker, whatever the status is, since
# launchers change it.
finish() {  # STATUS
    [ ! -f "$marker" ] || requeue
    exit "$1"
}

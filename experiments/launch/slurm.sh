#!/usr/bin/env bash
@DIRECTIVES@
# One process on each node. Before the time limit Slurm sends USR1 to this shell, which tells the
# processes to save and end (SIGTERM) and queues the job again. A job that Slurm preempts is
# queued again by Slurm itself.
set -uo pipefail
cd @STAGE@
@DEVICES@
. ./env.sh
@BEFORE@
set -- @COMMAND@
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    set -- "$@" --resume
fi

noticed=0
notice() {
    noticed=$((noticed + 1))
    scancel --signal=TERM "$SLURM_JOB_ID" # the job's steps, not this shell
}
trap notice USR1

cd code
# Since Slurm 22.05 a step has one core unless it is told of the job's.
srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 \
    --open-mode=append --output=../logs/%t.log "$@" &
step=$!
seen=-1
while [ $seen -ne $noticed ]; do # the signal ends a wait, not the step
    seen=$noticed
    wait "$step"
    status=$?
done

if [ $noticed -gt 0 ] && [ $status -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt @RESTARTS@ ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
rm -f ../env.sh # it may hold secrets
echo "$status" > ../exit.part
mv ../exit.part ../exit
exit "$status"

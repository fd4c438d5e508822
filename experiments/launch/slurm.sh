#!/usr/bin/env bash
@DIRECTIVES@
# One process on each node. Before the time limit Slurm sends USR1 to this shell, which tells the
# processes to save and end (SIGTERM) and queues the job again. A job that Slurm preempts is
# queued again by Slurm itself.
set -uo pipefail
cd @STAGE@
. ./env.sh
@BEFORE@
set -- @COMMAND@
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    set -- "$@" --resume
fi

noticed=no
notice() {
    noticed=yes
    scancel --signal=TERM "$SLURM_JOB_ID" # the job's steps, not this shell
}
trap notice USR1

cd code
srun --kill-on-bad-exit=1 --open-mode=append --output=../logs/%t.log "$@" &
step=$!
status=138 # what wait gives when USR1 ends it: the step goes on
while [ $status -eq 138 ]; do
    wait "$step"
    status=$?
done

if [ $noticed = yes ] && [ $status -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt @RESTARTS@ ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
echo "$status" > ../exit.part
mv ../exit.part ../exit
exit "$status"

# a copy of the code and the job's file, on the shared file system
rm -rf runs/n.launch/code runs/n.launch/exit
mkdir -p runs/n.launch/code runs/n.launch/logs
git archive --format=tar.gz --output=runs/n.launch/code.tar.gz HEAD
tar -xzf runs/n.launch/code.tar.gz -C runs/n.launch/code
: > runs/n.launch/env.sh
cat > runs/n.launch/job.sh <<'END_OF_FILE'
#!/usr/bin/env bash
#SBATCH --job-name=n
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/n.launch/job.log
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
# One process on each node. Before the time limit Slurm sends USR1 to this shell, which tells the
# processes to save and end (SIGTERM) and queues the job again. A job that Slurm preempts is
# queued again by Slurm itself.
set -uo pipefail
cd runs/n.launch
export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7
. ./env.sh
module load cuda
set -- python -u -m experiments.reviews --preset full --out ../../n
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

if [ $noticed -gt 0 ] && [ $status -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
rm -f ../env.sh # it may hold secrets
echo "$status" > ../exit.part
mv ../exit.part ../exit
exit "$status"
END_OF_FILE

# submit it; this prints the job's number
sbatch --parsable runs/n.launch/job.sh

# every 15 s until the job has left the queue, with what is new in runs/n.launch/logs/0.log
squeue --jobs=NUMBER --noheader --format=%T

# if this launcher is interrupted
scancel NUMBER

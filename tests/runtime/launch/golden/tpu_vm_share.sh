# is the VM there?
gcloud compute tpus tpu-vm describe n --format=json --zone=us-west4-a --quiet

# if it is not there: create it
gcloud compute tpus tpu-vm create n --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --zone=us-west4-a --quiet

# every 15 s until it is READY, at most 3600 s
gcloud compute tpus tpu-vm describe n --format=json --zone=us-west4-a --quiet

# ship the code and install it, on all workers
mkdir -p runs/n.launch
cat > runs/n.launch/worker.sh <<'END_OF_FILE'
# all of experiments/launch/worker.sh
END_OF_FILE
: > runs/n.launch/env.sh
git archive --format=tar.gz --output=runs/n.launch/code.tar.gz HEAD
gcloud compute tpus tpu-vm ssh n --worker=all '--command=mkdir -p jmeta-n && chmod 700 jmeta-n' --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm scp runs/n.launch/code.tar.gz runs/n.launch/worker.sh runs/n.launch/env.sh n:jmeta-n/ --worker=all --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm ssh n --worker=all '--command=bash jmeta-n/worker.sh install' --zone=us-west4-a --quiet

# mount the storage on all workers; is a run there?
gcloud compute tpus tpu-vm ssh n --worker=all '--command=bash jmeta-n/worker.sh mount 10.0.0.2:/vol1/runs n' --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm ssh n --worker=0 '--command=bash jmeta-n/worker.sh look' --zone=us-west4-a --quiet

# if none is there, but one is here
tar -czf runs/n.launch/run.tar.gz -C runs/n .
gcloud compute tpus tpu-vm scp runs/n.launch/run.tar.gz n:jmeta-n/ --worker=0 --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm ssh n --worker=0 '--command=bash jmeta-n/worker.sh unpack' --zone=us-west4-a --quiet

# start the command on all workers, detached
gcloud compute tpus tpu-vm ssh n --worker=all '--command=bash jmeta-n/worker.sh start experiments.reviews --preset full --out ../run --resume' --zone=us-west4-a --quiet

# every 15 s until all workers have ended: the state, each worker, what is new in the log
gcloud compute tpus tpu-vm describe n --format=json --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm ssh n --worker=all '--command=bash jmeta-n/worker.sh status' --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm ssh n --worker=0 '--command=bash jmeta-n/worker.sh log 0' --zone=us-west4-a --quiet

# at the end: the run directory, through worker 0
gcloud compute tpus tpu-vm ssh n --worker=0 '--command=bash jmeta-n/worker.sh pack' --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm scp n:jmeta-n/run.tar.gz runs/n.launch/run.tar.gz.part --worker=0 --zone=us-west4-a --quiet
mv runs/n.launch/run.tar.gz.part runs/n.launch/run.tar.gz
rm -rf runs/n.new runs/n.old
mkdir -p runs/n.new runs/n
tar -xzf runs/n.launch/run.tar.gz -C runs/n.new
mv runs/n runs/n.old
mv runs/n.new runs/n
rm -rf runs/n.old

# at the end: each worker's log
mkdir -p runs/n.launch/logs
gcloud compute tpus tpu-vm ssh n --worker=all '--command=bash jmeta-n/worker.sh log 0' --output-directory=runs/n.launch/logs --zone=us-west4-a --quiet

# at the end, however it comes, unless the VM was there before
gcloud compute tpus tpu-vm delete n --zone=us-west4-a --quiet

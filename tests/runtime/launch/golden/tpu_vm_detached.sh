# is the VM there?
gcloud compute tpus tpu-vm describe n --format=json --zone=us-west4-a --quiet

# if it is not there: create it
gcloud compute tpus tpu-vm create n --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --zone=us-west4-a --quiet

# every 15 s until it is READY, at most 3600 s
gcloud compute tpus tpu-vm describe n --format=json --zone=us-west4-a --quiet

# ship the code and install it, on all workers
mkdir -p runs/n.launch
cat > runs/n.launch/worker.sh <<'END_OF_FILE'
# all of experiments/launch/worker.sh
END_OF_FILE
cat > runs/n.launch/env.sh <<'END_OF_FILE'
export A='b c'
export B=1
END_OF_FILE
git archive --format=tar.gz --output=runs/n.launch/code.tar.gz HEAD
gcloud compute tpus tpu-vm ssh n --worker=all '--command=mkdir -p jmeta-n && chmod 700 jmeta-n' --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm scp runs/n.launch/code.tar.gz runs/n.launch/worker.sh runs/n.launch/env.sh n:jmeta-n/ --worker=all --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm ssh n --worker=all '--command=bash jmeta-n/worker.sh install' --zone=us-west4-a --quiet

# start the command on all workers, detached
gcloud compute tpus tpu-vm ssh n --worker=all '--command=bash jmeta-n/worker.sh start experiments.reviews --preset full --out ../run' --zone=us-west4-a --quiet

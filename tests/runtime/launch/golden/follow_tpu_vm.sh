# every 15 s until all workers have ended
gcloud compute tpus tpu-vm describe n --format=json --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm ssh n --worker=all '--command=bash jmeta-n/worker.sh status' --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm ssh n --worker=0 '--command=bash jmeta-n/worker.sh log 0' --zone=us-west4-a --quiet

# the run directory of worker 0, and each worker's log
mkdir -p runs/n.launch/logs
gcloud compute tpus tpu-vm ssh n --worker=0 '--command=bash jmeta-n/worker.sh pack' --zone=us-west4-a --quiet
gcloud compute tpus tpu-vm scp n:jmeta-n/run.tar.gz runs/n.launch/run.tar.gz.part --worker=0 --zone=us-west4-a --quiet
mv runs/n.launch/run.tar.gz.part runs/n.launch/run.tar.gz
rm -rf runs/n.new runs/n.old
mkdir -p runs/n.new runs/n
tar -xzf runs/n.launch/run.tar.gz -C runs/n.new
mv runs/n runs/n.old
mv runs/n.new runs/n
rm -rf runs/n.old
gcloud compute tpus tpu-vm ssh n --worker=all '--command=bash jmeta-n/worker.sh log 0' --output-directory=runs/n.launch/logs --zone=us-west4-a --quiet

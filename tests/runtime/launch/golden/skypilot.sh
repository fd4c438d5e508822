# the task
mkdir -p runs/n.launch
cat > runs/n.launch/task.yaml <<'END_OF_FILE'
workdir: .
name: n
resources:
  accelerators: tpu-v5litepod-16
  use_spot: true
  job_recovery:
    strategy: EAGER_NEXT_REGION
    max_restarts_on_errors: 3
file_mounts:
  /runs:
    source: gs://mine
    mode: MOUNT
setup: 'bash experiments/launch/worker.sh venv ~/venv ''.[tpu]''

  '
run: "marker=/runs/n.task\nif [ \"$(cat \"$marker\" 2> /dev/null)\" != \"$SKYPILOT_TASK_ID\" ]; then\n    [ ! -e /runs/n ] || { echo '/runs/n holds a run already: choose another --name, or --resume it'; exit 1; }\n    echo \"$SKYPILOT_TASK_ID\" > \"$marker\"\nfi\nset -- -u -m experiments.reviews --preset full --out /runs/n --resume\nexec ~/venv/bin/python \"$@\"\n"
END_OF_FILE

# to start it, from here, with any secrets in the environment
sky jobs launch --name=n runs/n.launch/task.yaml

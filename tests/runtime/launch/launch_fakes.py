"""Fake gcloud, kubectl, sbatch, squeue, scancel, scontrol and srun, run as `fakes.py PROGRAM ...`.

They record each call as a line of JSON, keep what they created in files below $FAKE, and fail on
cue. The fake TPU VM is a folder for each worker, in which remote commands really run, in bash;
there gcsfuse, sudo and mountpoint are fakes too, and what is mounted is a link to a folder.
"""

# Started a dozen times in a test: nothing is imported that starts slowly, not even json.
import os
import sys
import time

HERE = os.environ["FAKE"]


def at(*parts):
    return os.path.join(HERE, *parts)


def text(name):
    with open(at(name)) as file:
        return file.read()


def load(name, default=None):
    return eval(text(name)) if os.path.exists(at(name)) else default


def save(name, value):
    part = at(f"{name}.{os.getpid()}")  # two workers may save at once
    with open(part, "w") as file:
        file.write(repr(value))
    os.replace(part, at(name))


def as_json(value):
    return repr(value).replace("'", '"')


def fail(text, status=1):
    sys.stderr.write(text + "\n")
    sys.exit(status)


def on_cue(argv):
    """The first cue whose words are all in the call, and whose turn it is."""
    cues = load("cues", [])
    for cue in cues:
        ready = "after" not in cue or os.path.exists(at(cue["after"]))
        if ready and all(word in " ".join(argv) for word in cue["on"].split()):
            cue["seen"] = cue.get("seen", 0) + 1
            save("cues", cues)
            if cue["seen"] < cue.get("from", 1) or cue["seen"] > cue.get("to", 10**9):
                continue
            if "state" in cue:
                take_away(cue["state"])
            if "usr1" in cue:
                kill("job.pid", 10)
            if "cut" in cue:  # a copy ends before its time
                *_, source, target = [word for word in argv if not word.startswith("--")]
                with open(copied(target, source), "w") as file:
                    file.write("cut")
            if "signal" in cue:
                os.kill(os.getppid(), {"SIGINT": 2, "SIGTERM": 15}[cue["signal"]])
                time.sleep(cue.get("sleep", 30))
            if "late" in cue:  # done, but its answer is lost
                try:
                    globals()[argv[0]](argv[1:])
                except SystemExit as ended:
                    if ended.code:
                        raise
            if "stderr" in cue:
                fail(cue["stderr"], cue.get("status", 1))
            return


def kill(name, number, group=False):
    """Send a signal to the process whose number is in a file, if it is there."""
    try:
        (os.killpg if group else os.kill)(int(text(name)), number)
    except (OSError, ValueError):
        return


def workers():
    return [name for name in os.listdir(HERE) if name in ("w0", "w1")]


def take_away(state):
    for worker in workers():
        for folder in os.listdir(at(worker)):
            kill(f"{worker}/{folder}/pid", 9, group=True)
    save("vm", dict(load("vm", {}), state=state))


def flag(argv, name):
    for word in argv:
        if word.startswith("--" + name + "="):
            return word.partition("=")[2]
    return None


def gcloud(argv):
    assert argv[:2] == ["compute", "tpus"], argv
    group, verb = argv[2:4]
    vm = load("vm")
    if verb == "create":
        if vm:
            fail("ERROR: (gcloud) ALREADY_EXISTS: it exists")
        kind = flag(argv, "accelerator-type")
        for worker in range(2 if kind.endswith("-16") else 1):
            os.makedirs(at(f"w{worker}"), exist_ok=True)
        save("vm", {"name": argv[4], "state": load("first_state", "READY")})
    elif verb == "describe":
        if vm is None:
            fail(f"ERROR: (gcloud.compute.tpus.{group}.describe) NOT_FOUND: no such resource.")
        queued = {"READY": "ACTIVE", "PREEMPTED": "SUSPENDED"}.get(vm["state"], vm["state"])
        print(as_json({"state": {"state": queued}} if group == "queued-resources" else vm))
    elif verb == "delete":
        if vm is None:
            fail("ERROR: (gcloud) NOT_FOUND: no such resource.")
        take_away("DELETED")
        os.remove(at("vm"))
        for worker in workers():
            os.rename(at(worker), at(f"gone-{time.monotonic_ns()}-{worker}"))
    elif verb == "ssh":
        which, out = flag(argv, "worker"), flag(argv, "output-directory")
        path, children = at("remote") + ":/usr/bin:/bin", []
        for worker in range(len(workers())) if which == "all" else [int(which)]:
            child = os.fork()
            if child == 0:
                os.setsid()  # another machine: signals of the launcher's do not reach it
                if out:
                    name = os.path.join(out, f"{worker}.log")
                    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
                os.chdir(at(f"w{worker}"))
                home = dict(os.environ, HOME=os.getcwd(), PATH=path)
                os.execve("/bin/bash", ["bash", "-c", flag(argv, "command")], home)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.exit(next(filter(None, statuses), 0))
    elif verb == "scp":
        *sources, target = [word for word in argv[4:] if not word.startswith("--")]
        which = flag(argv, "worker")
        for worker in range(len(workers())) if which == "all" else [int(which)]:
            for source in sources:
                with open(local(source, worker), "rb") as file:
                    content = file.read()
                with open(copied(local(target, worker), source), "wb") as file:
                    file.write(content)


def copied(target, source):
    """The file that a copy makes."""
    return os.path.join(target, os.path.basename(source)) if os.path.isdir(target) else target


def local(path, worker):
    _, colon, rest = path.partition(":")
    return at(f"w{worker}", rest) if colon else path


def gcsfuse(argv):
    if argv == ["--version"]:
        print(f"gcsfuse version {load('gcsfuse_version', '3.4.0')} (Go version go1.24.5)")
        return
    *_, bucket, folder = argv
    if not os.path.isdir(at("buckets", bucket)):
        fail(f"Error: daemonize.Run: bucket {bucket} doesn't exist")
    attach(at("buckets", bucket), folder)


def attach(source, folder):
    os.makedirs(source, exist_ok=True)
    os.rmdir(folder)
    os.symlink(source, folder)


def mountpoint(argv):
    sys.exit(not os.path.islink(argv[-1]))


def lsb_release(argv):
    print("jammy")


def curl(argv):
    print("a key")


def sudo(argv):
    while "=" in argv[0]:
        argv = argv[1:]
    name = argv[0]
    if name == "tee":
        with open(at("etc-" + os.path.basename(argv[1])), "w") as file:
            file.write(sys.stdin.read())
    elif name == "apt-get" and argv[-2:] == ["install", "gcsfuse"]:
        os.remove(at("gcsfuse_version"))
    elif name == "mount":
        *_, source, folder = argv
        attach(at("shares", source.replace("/", "_")), folder)
    elif name == "umount":
        if not os.path.islink(argv[-1]):
            fail("umount: not mounted", 32)
        os.remove(argv[-1])
    elif name != "apt-get":
        fail(f"sudo: {name}: a password is required")


def start_job(script, restarts):
    env = dict(os.environ, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    with open(script) as file:
        cores = [line for line in file if line.startswith("#SBATCH --cpus-per-task=")]
    if cores:
        env["SLURM_CPUS_PER_TASK"] = cores[0].strip().partition("=")[2]
    job = os.fork()
    if job == 0:
        os.setsid()
        stream = os.open(at("job.out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.execve("/bin/bash", ["bash", script], env)
    save("job", {"script": script, "restarts": restarts})
    with open(at("job.pid"), "w") as file:
        file.write(str(job))


def job_lives():
    try:
        with open(f"/proc/{text('job.pid')}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sbatch(argv):
    start_job(argv[-1], 0)
    on_cue(["submitted"])
    print("7;cluster" if "--parsable" in argv else "Submitted batch job 7", flush=True)


def squeue(argv):
    job = load("job")
    if job_lives():
        print("RUNNING")
    elif os.path.exists(at("requeue")):
        os.remove(at("requeue"))
        start_job(job["script"], job["restarts"] + 1)
        print("PENDING")
    else:
        fail("slurm_load_jobs error: Invalid job id specified")


def scancel(argv):
    if argv[0] == "--signal=TERM":
        kill("step.pid", 15)
    else:
        kill("job.pid", 9, group=True)


def scontrol(argv):
    assert argv == ["requeue", "7"], argv
    open(at("requeue"), "w").close()


def srun(argv):
    out = flag(argv, "output").replace("%t", "0")
    command = argv[[word.startswith("--") for word in argv].index(False) :]
    with open(at("step.pid"), "w") as file:
        file.write(str(os.getpid()))
    stream = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.execvp(command[0], command)


def kubectl(argv):
    verb = argv[0]
    cluster = load("cluster", {})
    if verb == "create" and argv[1] == "secret":
        with open(flag(argv, "from-env-file")) as file:
            save("secret", file.read())
    elif verb == "create":
        kind = "JobSet" if "jobset" in flag(argv, "filename") else "Pod"
        save("cluster", {**cluster, kind: 0})
    elif verb == "get" and argv[1] == "jobset":
        if "JobSet" not in cluster:
            fail('Error from server (NotFound): jobsets.jobset.x-k8s.io "n" not found')
        statuses = load("statuses", [{"conditions": [{"type": "Completed", "status": "True"}]}])
        seen = cluster["JobSet"]
        save("cluster", {**cluster, "JobSet": seen + 1})
        print(as_json({"status": statuses[min(seen, len(statuses) - 1)]}))
    elif verb == "get":
        running = [{"metadata": {"name": "n-workers-0-0-x"}, "status": {"phase": "Running"}}]
        print(as_json({"items": load("pods", running)}))
    elif verb == "exec":
        if os.path.exists(at("claim")):
            print("config.json")
    elif verb == "logs":
        print("2026-01-01T00:00:00.000000001Z step 1\n2026-01-01T00:00:00.000000002Z step 2")
    elif verb == "cp" and ":" in argv[1]:
        os.makedirs(argv[2], exist_ok=True)
        with open(os.path.join(argv[2], "ckpt"), "w") as file:
            file.write("from the claim")
    elif verb == "delete":
        kind = {"jobset": "JobSet", "pod": "Pod"}.get(argv[1])
        save("cluster", {k: v for k, v in cluster.items() if k != kind})
        if argv[1] == "secret" and os.path.exists(at("secret")):
            os.remove(at("secret"))


def main():
    name, argv = sys.argv[1], sys.argv[2:]
    with open(at("calls"), "a") as file:
        file.write(repr([name, *argv]) + "\n")
    on_cue([name, *argv])
    globals()[name](argv)


main()

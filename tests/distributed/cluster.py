"""Starting real processes of one program on this machine, for the tests."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port():
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def environment(devices):
    """For a process of ``devices`` CPU devices, outside of any cluster."""
    count = "--xla_force_host_platform_device_count="
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(count)]
    return os.environ | {
        "XLA_FLAGS": " ".join([f"{count}{devices}", *flags]),
        "JAX_PLATFORMS": "cpu",
        "JMETA_HEARTBEAT_SECONDS": "100",  # nothing here waits for it
        "PYTHONPATH": str(ROOT),
    }


@contextlib.contextmanager
def started(folder, processes, devices, runs):
    """The processes of one program, which do ``runs``; killed at the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / "spec.json"
    plan = {"port": free_port(), "processes": processes, "folder": str(folder), "runs": runs}
    spec.write_text(json.dumps(plan))
    program = [sys.executable, str(pathlib.Path(__file__).with_name("worker.py")), str(spec)]
    children = []
    try:
        for index in range(processes):
            with open(folder / f"log.{index}", "wb") as log:
                children.append(
                    subprocess.Popen(
                        [*program, str(index)],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=folder,
                        env=environment(devices),
                    )
                )
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait(10)


def ended(children, seconds=150):
    """Wait for all; their statuses."""
    end = time.monotonic() + seconds
    return [child.wait(max(end - time.monotonic(), 0.1)) for child in children]


def log(folder, index):
    """What a process printed."""
    return (folder / f"log.{index}").read_text()


def launch(folder, processes, devices, runs, seconds=150):
    """Do ``runs`` with several processes; the reports of each run, by process."""
    with started(folder, processes, devices, runs) as children:
        codes = ended(children, seconds)
    assert codes == [0] * processes, "\n".join(log(folder, i)[-3000:] for i in range(processes))
    return [
        [json.loads((folder / f"{number}.{index}.json").read_text()) for index in range(processes)]
        for number in range(len(runs))
    ]

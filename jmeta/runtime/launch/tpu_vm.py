"""TPU VMs: the configuration, and every command line that `gcloud` gets.

Flags as in the reference of `gcloud compute tpus tpu-vm` and `queued-resources`.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jmeta.runtime.launch import code
from jmeta.runtime.launch.inputs import (
    check_command,
    check_name,
    check_path,
    check_word,
    environment,
    exports,
)
from jmeta.runtime.launch.steps import LaunchError, Step, Write
from jmeta.runtime.launch.storage import Storage, require_shared, storage

# cloud.google.com/tpu/docs/runtimes: the software version for JAX of each generation.
_VERSIONS = (
    (r"v6e-\d+", "v2-alpha-tpuv6e"),
    (r"v5p-\d+", "v2-alpha-tpuv5"),
    (r"v5litepod-\d+", "v2-alpha-tpuv5-lite"),
    (r"v[234]-\d+", "tpu-ubuntu2204-base"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmPlace:
    """A TPU VM that is there: enough to follow, fetch or delete a run."""

    name: str
    """Of the TPU VM; the run's files are in ~/jmeta-NAME on it."""
    zone: str
    """Zone, such as us-west4-a."""
    project: str | None = None
    """Google Cloud project; by default that of gcloud."""
    out: Path | None = None
    """Where the run directory comes back to; by default runs/NAME."""
    queued: bool = False
    """Whether the VM belongs to a queued resource (of the same name)."""
    internal_ip: bool = False
    """Connect to internal addresses, from a machine in the same network."""
    env_file: Path | None = None
    """File of NAME=VALUE lines for secrets; shipped, never shown."""
    poll: float = 15.0
    """Seconds between two looks at the VM and the run."""
    attempts: int = 5
    """How often a connection, or a question to gcloud, is tried before it counts as refused."""
    dry_run: bool = False
    """Print every command, run none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVm(TpuVmPlace):
    """Run an experiment on a TPU VM, which is created if it is not there."""

    type: str
    """Accelerator type, such as v5litepod-16."""
    version: str | None = None
    """TPU software version; by default the one for JAX on this type."""
    spot: bool = False
    """A spot VM: cheaper, and preempted when someone else needs it."""
    storage: str | None = None
    """What several workers share, and the run directory is on: gs://BUCKET/FOLDER, a bucket with
    a hierarchical namespace, or nfs://HOST/SHARE."""
    wait: float = 3600.0
    """Seconds until the VM must be ready; a queued one may need days."""
    restarts: int = 10
    """How often the run is taken up again after a preemption."""
    delete: Literal["always", "success", "never"] = "always"
    """When to delete a VM that this launch created: at the end, only after success, never."""
    sync: float = 300.0
    """Seconds between two copies of the run directory, which --storage makes needless; what a
    preemption can cost."""
    detach: bool = False
    """Leave as soon as the run has begun; `follow` comes back to it."""
    resume: bool = False
    """Go on from the run directory on --storage or, if there is none, in --out."""
    revision: str | None = None
    """Commit whose files are shipped; by default HEAD, if nothing differs from it."""
    env: tuple[str, ...] = ()
    """NAME=VALUE variables of the run; no secrets."""


class Commands(NamedTuple):
    """Every step of a TPU VM's life.

    Attributes:
      describe: the VM.
      create, delete: the VM, or the queued resource that brings it; no create for a `TpuVmPlace`.
      queue: describes the queued resource; None without one.
      stage: what is made here before anything is shipped.
      prepare, ship, install: files and packages on all workers.
      mount: makes the run directory one on shared storage, on all workers; None without it.
      look: the first file of that run directory, if there is any; None without it.
      restore: ships the run directory, on all workers or to the storage.
      start, resume: the command, detached, on all workers.
      status: one line for each worker.
      pack, bring, place: the run directory of worker 0, to here.
      logs: each worker's whole log.
      stop: ends the command on all workers.
    """

    describe: Step
    queue: Step | None
    create: Step | None
    delete: Step
    stage: tuple[Step | Write, ...]
    prepare: Step
    ship: Step
    install: Step
    mount: Step | None
    look: Step | None
    restore: tuple[Step, ...]
    start: Step
    resume: Step
    status: Step
    pack: Step
    bring: Step
    place: tuple[Step, ...]
    logs: Step
    stop: Step


def out_of(config: TpuVmPlace) -> Path:
    """Where the run directory comes back to."""
    return config.out or Path("runs") / config.name


def place_of(config: TpuVmPlace) -> TpuVm:
    """A place as the configuration of a launch, for the commands that need no more."""
    return TpuVm(type="", version="", **dataclasses.asdict(config))


def log(config: TpuVmPlace, offset: int) -> Step:
    """The step that shows worker 0's log from a byte on."""
    return _ssh(config, "0", f"log {offset}")


def commands(
    config: TpuVm, command: Sequence[str], template: str
) -> tuple[Commands, dict[str, str]]:
    """Check a configuration and write out its commands.

    Args:
      config: the launch.
      command: module and arguments; empty for a place whose run has begun already.
      template: the script that runs on each worker.

    Returns:
      The commands, and the secrets that nothing may show.

    Raises:
      LaunchError: a value cannot be used.
    """
    check_name(config.name)
    check_word(config.zone, "--zone", "a-z0-9-")
    if config.project is not None:
        check_word(config.project, "--project", "a-z0-9.:-")
    given = environment(config.env, config.env_file)
    shared = shared_of(config)
    if config.type:
        command = check_command(command, given.secrets)
        require_shared(config.type, shared)
    stage, remote = code.staging(check_path(out_of(config))), folder(config)
    run = "run.tar.gz"
    part = (stage / f"{run}.part").as_posix()
    arguments = shlex.join([*command, "--out", "../run"])
    first = "all" if shared is None else "0"
    variables = exports({**given.public, **given.private})
    files = [stage / "code.tar.gz", stage / "worker.sh", stage / "env.sh"]
    found = Commands(
        describe=_gcloud(config, "tpu-vm", "describe", config.name, "--format=json"),
        queue=_gcloud(config, "queued-resources", "describe", config.name, "--format=json")
        if config.queued
        else None,
        create=_create(config) if config.type else None,
        delete=_delete(config),
        stage=(
            Step(("mkdir", "-p", stage.as_posix())),
            Write(stage / "worker.sh", template),
            Write(stage / "env.sh", variables, tuple(given.private)),
            code.archive(config.revision, stage / "code.tar.gz"),
        ),
        # The folder is private: the file of variables arrives before its mode is set.
        prepare=_gcloud(
            config, "tpu-vm", "ssh", config.name, "--worker=all",
            f"--command=mkdir -p {remote} && chmod 700 {remote}", *_route(config),
        ),
        ship=_scp(config, "all", [*map(Path.as_posix, files)], f"{config.name}:{remote}/"),
        install=_ssh(config, "all", "install", timeout=3600.0),
        mount=None if shared is None else _ssh(
            config, "all", f"mount {shlex.join([shared.source, shared.folder])}", timeout=1800.0
        ),
        look=None if shared is None else _ssh(config, "0", "look"),
        restore=(
            _scp(config, first, [(stage / run).as_posix()], f"{config.name}:{remote}/"),
            _ssh(config, first, "unpack"),
        ),
        start=_ssh(config, "all", f"start {arguments}"),
        resume=_ssh(config, "all", f"start {arguments} --resume"),
        status=_ssh(config, "all", "status", timeout=120.0),
        pack=_ssh(config, "0", "pack"),
        # A copy that a preemption cuts off must not take the place of the one before.
        bring=_scp(config, "0", [f"{config.name}:{remote}/{run}"], part),
        place=(
            Step(("mv", part, (stage / run).as_posix())),
            *code.unpack(stage / run, out_of(config)),
        ),
        logs=_gcloud(
            config, "tpu-vm", "ssh", config.name, "--worker=all",
            f"--command=bash {remote}/worker.sh log 0",
            f"--output-directory={(stage / 'logs').as_posix()}", *_route(config),
        ),
        stop=_ssh(config, "all", "stop", timeout=120.0),
    )  # fmt: skip
    return found, given.secrets


def shared_of(config: TpuVm) -> Storage | None:
    """Where the run directory lies that all workers see, if they share one.

    Raises:
      LaunchError: --storage is none.
    """
    return None if config.storage is None else storage(config.storage, config.name)


def folder(config: TpuVmPlace) -> str:
    """The run's folder on each worker, below the home directory."""
    return f"jmeta-{config.name}"


def _create(config: TpuVm) -> Step:
    kind = check_word(config.type, "--type", "a-z0-9-")
    version = config.version or _version(kind)
    check_word(version, "--version", "A-Za-z0-9._-")
    spot = ("--spot",) if config.spot else ()
    if config.queued:
        return _gcloud(
            config, "queued-resources", "create", config.name, f"--node-id={config.name}",
            f"--accelerator-type={kind}", f"--runtime-version={version}", *spot,
        )  # fmt: skip
    return _gcloud(
        config, "tpu-vm", "create", config.name, f"--accelerator-type={kind}",
        f"--version={version}", *spot, timeout=max(config.wait, 600.0),
    )  # fmt: skip


def _version(kind: str) -> str:
    for pattern, version in _VERSIONS:
        if re.fullmatch(pattern, kind):
            return version
    raise LaunchError(
        f"--type {kind} is none whose software version is known here (v2 to v4, v5litepod, v5p, "
        "v6e, each with -N): name it with --version"
    )


def _delete(config: TpuVmPlace) -> Step:
    if config.queued:
        return _gcloud(config, "queued-resources", "delete", config.name, "--force", timeout=1800.0)
    return _gcloud(config, "tpu-vm", "delete", config.name, timeout=1800.0)


def _route(config: TpuVmPlace) -> tuple[str, ...]:
    return ("--internal-ip",) if config.internal_ip else ()


def _ssh(config: TpuVmPlace, worker: str, task: str, timeout: float = 600.0) -> Step:
    line = f"bash {folder(config)}/worker.sh {task}"
    return _gcloud(
        config, "tpu-vm", "ssh", config.name, f"--worker={worker}", f"--command={line}",
        *_route(config), timeout=timeout,
    )  # fmt: skip


def _scp(config: TpuVmPlace, worker: str, files: Sequence[str], target: str) -> Step:
    return _gcloud(
        config, "tpu-vm", "scp", *files, target, f"--worker={worker}", *_route(config),
        timeout=3600.0,
    )  # fmt: skip


def _gcloud(
    config: TpuVmPlace, group: str, verb: str, *arguments: str, timeout: float = 600.0
) -> Step:
    project = () if config.project is None else (f"--project={config.project}",)
    return Step(
        ("gcloud", "compute", "tpus", group, verb, *arguments, f"--zone={config.zone}", *project,
         "--quiet"),
        timeout,
    )  # fmt: skip

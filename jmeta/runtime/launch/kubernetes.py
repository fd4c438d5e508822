"""Kubernetes: the configuration, a JobSet for it, and every command line that `kubectl` gets.

Fields as in jobset.x-k8s.io/v1alpha2; a persistent volume claim holds code and run directories.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jmeta.runtime.launch import code
from jmeta.runtime.launch.inputs import (
    check_command,
    check_name,
    check_path,
    check_word,
    environment,
    parse_env,
)
from jmeta.runtime.launch.steps import LaunchError, Section, Step, Write

_RUNS = "/runs"  # where the claim is mounted
_ATTEMPT = "JMETA_RESTART_ATTEMPT"
_BEGIN = (
    "mkdir -p /tmp/code && tar -xzf {code} -C /tmp/code && cd /tmp/code || exit 1; "
    'if [ "${{JMETA_RESTART_ATTEMPT:-0}}" -gt 0 ]; then set -- "$@" --resume; fi; exec "$@"'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KubernetesPlace:
    """A run that is on a cluster."""

    name: str
    """Of the JobSet; the run's files are in NAME on the claim."""
    claim: str
    """PersistentVolumeClaim (ReadWriteMany) for code and run directories."""
    image: str
    """Image with Python 3.11 and jmeta's dependencies, as experiments/launch/Dockerfile makes."""
    namespace: str | None = None
    """Namespace; by default that of kubectl's context."""
    context: str | None = None
    """Context of kubectl; by default the current one."""
    out: Path | None = None
    """Where the run directory comes back to; by default runs/NAME."""
    poll: float = 15.0
    """Seconds between two looks at the run."""
    wait: float = 3600.0
    """Seconds until the first process must be running."""
    dry_run: bool = False
    """Print every command and file, run none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kubernetes(KubernetesPlace):
    """Run an experiment as a JobSet, one process on each node."""

    nodes: int = 1
    """Number of nodes; with --topology they follow from it."""
    tpu: str | None = None
    """GKE's name of the TPU, such as tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice."""
    topology: str | None = None
    """Of the TPU slice, such as 4x4."""
    chips: int = 4
    """TPU chips on each node."""
    gpus: int = 0
    """GPUs on each node."""
    selector: tuple[str, ...] = ()
    """LABEL=VALUE of the nodes, such as cloud.google.com/gke-accelerator=nvidia-h100-80gb."""
    spot: bool = False
    """GKE's spot nodes."""
    restarts: int = 10
    """How often all processes may be started again."""
    delete: Literal["always", "success", "never"] = "always"
    """When to delete the JobSet: at the end, only after success, never."""
    detach: bool = False
    """Leave as soon as the JobSet is created."""
    resume: bool = False
    """Go on from the run directory on the claim."""
    revision: str | None = None
    """Commit whose files are shipped; by default HEAD, if nothing differs from it."""
    env: tuple[str, ...] = ()
    """NAME=VALUE variables of the run; no secrets."""
    env_file: Path | None = None
    """File of NAME=VALUE lines for secrets; they become a Secret, never shown."""


class Commands(NamedTuple):
    """Every step of a run on a cluster.

    Attributes:
      stage: what is made here.
      helper_file: the manifest of a pod through which files are copied.
      ship: puts the code on the claim, through a helper pod.
      secret: makes the Secret; None without secrets.
      create, status, pods: the JobSet and its processes.
      delete: the JobSet, the Secret and the helper, whichever there are.
      place: brings the run directory back, through a helper pod.
      drop_helper: deletes the helper pod.
    """

    stage: tuple[Step | Write, ...]
    helper_file: Write
    ship: tuple[Step, ...]
    secret: Step | None
    create: Step
    status: Step
    pods: Step
    delete: tuple[Step, ...]
    place: tuple[Step, ...]
    drop_helper: Step


def out_of(config: KubernetesPlace) -> Path:
    """Where the run directory comes back to."""
    return config.out or Path("runs") / config.name


def place_of(config: KubernetesPlace) -> Kubernetes:
    """A place as the configuration of a launch, for the commands that need no more."""
    return Kubernetes(**dataclasses.asdict(config))


def jobset(
    config: Kubernetes, command: Sequence[str], secret: bool, template: Mapping[str, Any]
) -> dict[str, Any]:
    """The JobSet of a run.

    Args:
      config: the launch.
      command: module and arguments, checked.
      secret: whether there is a Secret to take variables from.
      template: what is the same for every run.

    Returns:
      The manifest as plain dicts and lists.

    Raises:
      LaunchError: nodes, chips and topology do not fit.
    """
    nodes = _nodes(config)
    resume = ["--resume"] if config.resume else []
    arguments = [
        "python", "-m", *command, "--out", f"{_RUNS}/{config.name}", *resume
    ]  # fmt: skip
    begin = _BEGIN.format(code=_code(config))
    fields: dict[str, Any] = {
        "image": check_word(config.image, "--image"),
        # The cluster expands $(NAME) in commands, and $$ to $: no argument may be changed by that.
        "command": [part.replace("$", "$$") for part in ["sh", "-c", begin, "run", *arguments]],
        "env": [
            {"name": _ATTEMPT, "valueFrom": {"fieldRef": {"fieldPath":
                "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"}}},
            *({"name": n, "value": v.replace("$", "$$")} for n, v in parse_env(config.env).items()),
        ],
        "resources": {"limits": _resources(config)},
        "volumeMounts": [{"name": "runs", "mountPath": _RUNS}],
    }  # fmt: skip
    if secret:
        fields["envFrom"] = [{"secretRef": {"name": f"{config.name}-env"}}]
    pod: dict[str, Any] = {"nodeSelector": _selector(config), "volumes": [_volume(config)]}
    if config.spot:
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
             "effect": "NoSchedule"}
        ]  # fmt: skip
    metadata: dict[str, Any] = {"name": config.name}
    if config.tpu:  # one slice is one node pool
        exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        metadata["annotations"] = exclusive
    job = {"completions": nodes, "parallelism": nodes}
    return _filled(template, metadata, config.restarts, job, pod, fields)


def _filled(
    template: Mapping[str, Any],
    metadata: Mapping[str, Any],
    restarts: int,
    job: Mapping[str, Any],
    pod: Mapping[str, Any],
    container: Mapping[str, Any],
) -> dict[str, Any]:
    spec = template["spec"]
    (replicated,) = spec["replicatedJobs"]
    job_spec = replicated["template"]["spec"]
    pod_spec = job_spec["template"]["spec"]
    (box,) = pod_spec["containers"]
    filled_pod = {**pod_spec, **pod, "containers": [{**box, **container}]}
    filled_job = {**job_spec, **job, "template": {"spec": filled_pod}}
    return {
        **template,
        "metadata": {**template["metadata"], **metadata},
        "spec": {
            **spec,
            "failurePolicy": {"maxRestarts": restarts},
            "replicatedJobs": [{**replicated, "template": {"spec": filled_job}}],
        },
    }


def _nodes(config: Kubernetes) -> int:
    if min(config.nodes, config.chips) < 1 or min(config.gpus, config.restarts) < 0:
        raise LaunchError("--nodes and --chips are at least 1, --gpus and --restarts at least 0")
    if (config.tpu is None) != (config.topology is None):
        raise LaunchError("--tpu and --topology belong together: name both or neither")
    if config.topology is None:
        return config.nodes
    if config.gpus:
        raise LaunchError("a node has TPUs or GPUs: give --tpu or --gpus, not both")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", config.topology):
        raise LaunchError(f"--topology {config.topology!r} must look like 4x4 or 2x2x4")
    chips = math.prod(map(int, config.topology.split("x")))
    if chips % config.chips or config.nodes not in (1, chips // config.chips):
        raise LaunchError(
            f"--topology {config.topology} has {chips} chips: with --chips {config.chips} on each "
            f"node that is {chips / config.chips:g} nodes, not {config.nodes}"
        )
    return chips // config.chips


def _resources(config: Kubernetes) -> dict[str, int]:
    if config.tpu:
        return {"google.com/tpu": config.chips}
    return {"nvidia.com/gpu": config.gpus} if config.gpus else {}


def _selector(config: Kubernetes) -> dict[str, str]:
    selector = {}
    if config.tpu and config.topology:
        selector["cloud.google.com/gke-tpu-accelerator"] = check_word(config.tpu, "--tpu")
        selector["cloud.google.com/gke-tpu-topology"] = config.topology
    if config.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    for pair in config.selector:
        label, equals, value = check_word(pair, "--selector").partition("=")
        if not equals:
            raise LaunchError(f"--selector {pair!r} is not LABEL=VALUE")
        selector[label] = value
    return selector


def _volume(config: KubernetesPlace) -> dict[str, Any]:
    return {"name": "runs", "persistentVolumeClaim": {"claimName": config.claim}}


def helper(config: KubernetesPlace) -> dict[str, Any]:
    """A pod that mounts the claim and waits, so that files can be copied to and from it."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{config.name}-files"},
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": 3600,  # should the launcher be killed
            "containers": [
                {
                    "name": "files",
                    "image": config.image,
                    "command": ["sleep", "3600"],
                    "volumeMounts": [{"name": "runs", "mountPath": _RUNS}],
                }
            ],
            "volumes": [_volume(config)],
        },
    }


def _code(config: KubernetesPlace) -> str:
    return f"{_RUNS}/{config.name}.code.tar.gz"


def commands(
    config: Kubernetes, command: Sequence[str], template: str
) -> tuple[Commands, dict[str, str]]:
    """Check a configuration and write out its files and commands.

    Args:
      config: the launch.
      command: module and arguments; empty for a place whose run has begun already.
      template: YAML of a JobSet.

    Returns:
      The commands, and the secrets that nothing may show.

    Raises:
      LaunchError: a value cannot be used.
    """
    check_name(config.name)
    check_word(config.claim, "--claim", "a-z0-9.-")
    check_word(config.image, "--image")
    for value, flag in ((config.namespace, "--namespace"), (config.context, "--context")):
        if value is not None:
            check_word(value, flag)
    given = environment(config.env, config.env_file)
    stage = code.staging(check_path(out_of(config)))
    text = ""
    if command:
        command = check_command(command, given.secrets)
        text = _yaml(jobset(config, command, bool(given.private), _load(template)))
    manifest, pod, env = stage / "jobset.yaml", stage / "files.yaml", stage / "secret.env"
    pod_name = f"{config.name}-files"
    drop = _kubectl(config, "delete", "pod", pod_name, "--ignore-not-found", "--grace-period=1")
    raise_helper = (
        _kubectl(config, "create", f"--filename={pod.as_posix()}"),
        _kubectl(config, "wait", "--for=condition=Ready", f"pod/{pod_name}", "--timeout=300s"),
    )
    packed, helper_file = stage / "code.tar.gz", Write(pod, _yaml(helper(config)))
    lines = "".join(f"{name}={value}\n" for name, value in given.private.items())
    return Commands(
        stage=(
            Step(("mkdir", "-p", stage.as_posix())),
            Write(manifest, text),
            helper_file,
            *([Write(env, lines, tuple(given.private))] if given.private else []),
            code.archive(config.revision, packed),
        ),
        helper_file=helper_file,
        ship=(
            *raise_helper,
            _kubectl(config, "cp", packed.as_posix(), f"{pod_name}:{_code(config)}",
                     timeout=3600.0),
            drop,
        ),
        secret=_kubectl(
            config, "create", "secret", "generic", f"{config.name}-env",
            f"--from-env-file={env.as_posix()}",
        ) if given.private else None,
        create=_kubectl(config, "create", f"--filename={manifest.as_posix()}"),
        status=_kubectl(config, "get", "jobset", config.name, "--output=json", timeout=60.0),
        pods=_kubectl(
            config, "get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={config.name}",
            "--output=json", timeout=60.0,
        ),
        delete=(
            _kubectl(config, "delete", "jobset", config.name, "--ignore-not-found"),
            _kubectl(config, "delete", "secret", f"{config.name}-env", "--ignore-not-found"),
            drop,
        ),
        place=(
            *raise_helper,
            *code.replace(out_of(config), lambda new: _kubectl(
                config, "cp", f"{pod_name}:{_RUNS}/{config.name}", new, timeout=3600.0)),
            drop,
        ),
        drop_helper=drop,
    ), given.secrets  # fmt: skip


def log(config: KubernetesPlace, since: str | None) -> Step:
    """The step that shows the first process's log from a moment on (RFC 3339)."""
    selector = (
        f"--selector=jobset.sigs.k8s.io/jobset-name={config.name},"
        "batch.kubernetes.io/job-completion-index=0"
    )
    moment = () if since is None else (f"--since-time={since}",)
    return _kubectl(config, "logs", selector, "--tail=-1", "--timestamps", *moment, timeout=60.0)


def plan(config: Kubernetes, command: Sequence[str], template: str) -> list[Section]:
    """The whole life of a launch, in order, for `--dry-run`."""
    c, _ = commands(config, command, template)
    secret = () if c.secret is None else (c.secret,)
    sections = [
        Section("manifests and code", c.stage),
        Section("the code onto the claim", c.ship),
        Section("create it", (*secret, c.create)),
    ]
    if config.detach:
        return sections
    sections += [
        Section(
            f"every {config.poll:g} s until it is Completed or Failed; the cluster restarts it at "
            f"most {config.restarts} times",
            (c.status, c.pods, log(config, None)),
        ),
        Section("at the end: the run directory", c.place),
    ]
    when = {"always": "at the end, however it comes", "success": "after success", "never": ""}
    if when[config.delete]:
        sections.append(Section(when[config.delete], c.delete))
    return sections


def plan_verb(verb: str, place: Kubernetes, template: str) -> list[Section]:
    """What follow, fetch and delete do, in order, for `--dry-run`."""
    c, _ = commands(place, (), template)
    watch = Section(
        f"every {place.poll:g} s until it is Completed or Failed",
        (c.status, c.pods, log(place, None)),
    )
    bring = Section("the run directory", (*c.stage[:1], c.helper_file, *c.place))
    return {
        "follow": [watch, bring],
        "fetch": [bring],
        "delete": [Section("delete it; the claim keeps the run directory", c.delete)],
    }[verb]


def _load(template: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(template)


def _yaml(manifest: Mapping[str, Any]) -> str:
    import yaml

    # Plain ASCII with no folded lines: PyYAML reads some Unicode line breaks otherwise.
    return yaml.safe_dump(dict(manifest), sort_keys=False, width=10**6)


def _kubectl(config: KubernetesPlace, *arguments: str, timeout: float = 600.0) -> Step:
    where = (
        *(() if config.context is None else (f"--context={config.context}",)),
        *(() if config.namespace is None else (f"--namespace={config.namespace}",)),
    )
    return Step(("kubectl", *arguments, *where), timeout)

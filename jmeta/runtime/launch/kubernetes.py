"""Kubernetes: the configuration of a run, and the manifests that follow from it.

Fields as in jobset.x-k8s.io/v1alpha2; a persistent volume claim holds code and run directories.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jmeta.runtime.launch.inputs import check_word, parse_env
from jmeta.runtime.launch.steps import LaunchError

RUNS = "/runs"  # where the claim is mounted
_ATTEMPT = "JMETA_RESTART_ATTEMPT"
_BEGIN = (
    'cd "$(mktemp -d)" && tar -xzf {code} || exit 1; '
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
    env_file: Path | None = None
    """File of NAME=VALUE lines for secrets; they become a Secret, never shown."""
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
        "python", "-u", "-m", *command, "--out", f"{RUNS}/{config.name}", *resume
    ]  # fmt: skip
    begin = _BEGIN.format(code=code_path(config))
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
        "volumeMounts": [{"name": "runs", "mountPath": RUNS}],
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
    made = _pod_of(template)
    (box,) = made["spec"]["containers"]
    inside = {**_merged(made["spec"], pod), "containers": [_merged(box, container)]}
    (jobs,) = template["spec"]["replicatedJobs"]
    job_spec = {**_merged(jobs["template"]["spec"], job), "template": {**made, "spec": inside}}
    added = {
        "failurePolicy": {"maxRestarts": restarts},
        "replicatedJobs": [{**jobs, "template": {**jobs["template"], "spec": job_spec}}],
    }
    return {
        **template,
        "metadata": _merged(template["metadata"], metadata),
        "spec": {**template["spec"], **added},
    }


def _pod_of(template: Mapping[str, Any]) -> Mapping[str, Any]:
    (replicated,) = template["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]


def _merged(base: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """Both: lists one after the other, dicts key by key; what the template's user wrote stays."""
    found = dict(base)
    for key, value in added.items():
        there = found.get(key)
        if isinstance(there, Mapping) and isinstance(value, Mapping):
            found[key] = _merged(there, value)
        else:
            found[key] = [*there, *value] if isinstance(there, list) else value
    return found


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


def helper(config: KubernetesPlace, template: Mapping[str, Any]) -> dict[str, Any]:
    """A pod that mounts the claim and waits, so that files can be copied to and from it.

    Args:
      config: the launch.
      template: of the JobSet, whose annotations and service account a claim may ask for.
    """
    pod = _pod_of(template)
    asked = ("serviceAccountName", "imagePullSecrets", "tolerations")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**pod.get("metadata", {}), "name": f"{config.name}-files"},
        "spec": {
            **{key: pod["spec"][key] for key in asked if key in pod["spec"]},
            "restartPolicy": "Never",
            "activeDeadlineSeconds": 3600,  # should the launcher be killed
            "containers": [
                {
                    "name": "files",
                    "image": config.image,
                    "command": ["sleep", "3600"],
                    "volumeMounts": [{"name": "runs", "mountPath": RUNS}],
                }
            ],
            "volumes": [_volume(config)],
        },
    }


def code_path(config: KubernetesPlace) -> str:
    """Where the code lies on the claim."""
    return f"{RUNS}/{config.name}.code.tar.gz"

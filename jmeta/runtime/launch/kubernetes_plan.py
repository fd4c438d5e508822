"""Kubernetes: every file and command line of a run's life, from code to clean-up.

`kubernetes_run` carries them out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jmeta.runtime.launch import code
from jmeta.runtime.launch.inputs import (
    check_command,
    check_name,
    check_path,
    check_word,
    environment,
)
from jmeta.runtime.launch.kubernetes import (
    RUNS,
    Kubernetes,
    KubernetesPlace,
    code_path,
    helper,
    jobset,
    out_of,
)
from jmeta.runtime.launch.steps import Section, Step, Write


class Commands(NamedTuple):
    """Every step of a run on a cluster.

    Attributes:
      stage: what is made here.
      helper_file: the manifest of a pod through which files are copied.
      look: the first file of the run directory on the claim, if there is any; a part of `ship`.
      ship: puts the code on the claim, through a helper pod.
      secret: makes the Secret; None without secrets.
      create, status, pods: the JobSet and its processes.
      delete: the JobSet, the Secret and the helper, whichever there are.
      place: brings the run directory back, through a helper pod.
      drop_helper: deletes the helper pod.
    """

    stage: tuple[Step | Write, ...]
    helper_file: Write
    look: Step
    ship: tuple[Step, ...]
    secret: Step | None
    create: Step
    status: Step
    pods: Step
    delete: tuple[Step, ...]
    place: tuple[Step, ...]
    drop_helper: Step


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
        drop,  # of a launcher that was killed
        _kubectl(config, "create", f"--filename={pod.as_posix()}"),
        _kubectl(config, "wait", "--for=condition=Ready", f"pod/{pod_name}", "--timeout=300s"),
    )
    look = _kubectl(
        config, "exec", pod_name, "--", "sh", "-c", f"ls -A {RUNS}/{config.name} | head -n 1"
    )
    packed, helper_file = stage / "code.tar.gz", Write(pod, _yaml(helper(config, _load(template))))
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
        look=look,
        ship=(
            *raise_helper,
            look,
            _kubectl(config, "cp", packed.as_posix(), f"{pod_name}:{code_path(config)}",
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
                config, "cp", f"{pod_name}:{RUNS}/{config.name}", new, timeout=3600.0)),
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
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return Step(("kubectl", *arguments[:end], *where, *arguments[end:]), timeout)

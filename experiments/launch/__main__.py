"""Start an experiment elsewhere, and look after it: `python -m experiments.launch --help`.

`tpu-vm`, `slurm`, `kubernetes` or `skypilot`, its options, `--`, and what to run.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jmeta.runtime.launch import (
    kubernetes,
    kubernetes_plan,
    kubernetes_run,
    skypilot,
    slurm,
    slurm_run,
    steps,
    tpu_vm,
    tpu_vm_plan,
)
from jmeta.runtime.launch import tpu_vm_host as tpu_host
from jmeta.runtime.launch import tpu_vm_run as tpu_run
from jmeta.runtime.launch.signals import Interrupted
from jmeta.runtime.launch.steps import LaunchError

TEMPLATES = Path(__file__).parent
USAGE = """\
python -m experiments.launch BACKEND OPTIONS -- experiments.NAME ARGUMENTS
python -m experiments.launch follow|fetch|delete BACKEND OPTIONS

  tpu-vm      a TPU VM, created if it is not there: follow, fetch, delete
  slurm       a job of a Slurm cluster: follow, delete
  kubernetes  a JobSet on a Kubernetes cluster: follow, fetch, delete
  skypilot    a task file for SkyPilot

Each has --help and --dry-run, which prints every command and runs none.
"""

LAUNCHES = {
    "tpu-vm": tpu_vm.TpuVm,
    "slurm": slurm.Slurm,
    "kubernetes": kubernetes.Kubernetes,
    "skypilot": skypilot.SkyPilot,
}
PLACES = {
    "tpu-vm": tpu_vm.TpuVmPlace,
    "slurm": slurm.SlurmPlace,
    "kubernetes": kubernetes.KubernetesPlace,
}
VERBS = {
    "follow": ("tpu-vm", "slurm", "kubernetes"),
    "fetch": ("tpu-vm", "kubernetes"),
    "delete": ("tpu-vm", "slurm", "kubernetes"),
}


def template(name: str) -> str:
    """The text of a template in this folder."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def say(text: str) -> None:
    """Tell the user what is being done."""
    print(f"[launch] {text}", flush=True)


def show(text: str) -> None:
    """Print what a run printed."""
    print(text, end="", flush=True)


def parse(argv: Sequence[str]) -> tuple[str, Any, list[str]]:
    """Read a command line.

    Args:
      argv: words after `python -m experiments.launch`.

    Returns:
      The verb (`launch` if there is none), the backend's configuration, and what follows `--`.
    """
    import tyro

    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    words, command = words[:cut], words[cut + 1 :]
    verb = words.pop(0) if words and words[0] in VERBS else "launch"
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        raise SystemExit(0 if words else 2)
    backend, known = words.pop(0), VERBS.get(verb, tuple(LAUNCHES))
    if backend not in known:
        raise LaunchError(f"{verb} knows {', '.join(known)}, not {backend!r}")
    if verb != "launch" and command:
        raise LaunchError(f"{verb} takes no command: leave out what follows --")
    prefix = "" if verb == "launch" else f"{verb} "
    prog = f"python -m experiments.launch {prefix}{backend}"
    config = (LAUNCHES if verb == "launch" else PLACES)[backend]
    # A tuple is given by repeating its flag: --env A=1 --env B=2.
    parsed = tyro.cli(config, args=words, prog=prog, config=(tyro.conf.UseAppendAction,))
    return verb, parsed, command


def plan(verb: str, config: Any, command: Sequence[str]) -> list[steps.Section]:
    """What `--dry-run` prints."""
    if verb == "launch":
        module, file = {
            tpu_vm.TpuVm: (tpu_vm_plan, "worker.sh"),
            slurm.Slurm: (slurm, "slurm.sh"),
            kubernetes.Kubernetes: (kubernetes_plan, "jobset.yaml"),
            skypilot.SkyPilot: (skypilot, "skypilot.yaml"),
        }[type(config)]
        return module.plan(config, command, template(file))
    if isinstance(config, tpu_vm.TpuVmPlace):
        return tpu_vm_plan.plan_verb(verb, tpu_vm.place_of(config), template("worker.sh"))
    if isinstance(config, kubernetes.KubernetesPlace):
        return kubernetes_plan.plan_verb(verb, kubernetes.place_of(config), template("jobset.yaml"))
    return slurm.plan_verb(verb, config)


def carry_out(verb: str, config: Any, command: Sequence[str]) -> None:
    """Do it."""
    if isinstance(config, tpu_vm.TpuVmPlace):
        full = config if isinstance(config, tpu_vm.TpuVm) else tpu_vm.place_of(config)
        bound = tpu_host.host(full, command, template("worker.sh"), say, show)
        getattr(tpu_run, verb)(bound)
    elif isinstance(config, kubernetes.KubernetesPlace):
        full = config if isinstance(config, kubernetes.Kubernetes) else kubernetes.place_of(config)
        bound = kubernetes_run.host(full, command, template("jobset.yaml"), say, show)
        getattr(kubernetes_run, verb)(bound)
    elif isinstance(config, skypilot.SkyPilot):
        skypilot.launch(config, command, template("skypilot.yaml"), say)
    elif isinstance(config, slurm.Slurm):
        slurm_run.launch(config, command, template("slurm.sh"), say, show)
    elif verb == "follow":
        slurm_run.follow(config, say, show)
    else:
        slurm_run.delete(config, say)


def sentence(error: BaseException, left: str) -> str:
    """A failure on one line, with the one that came before it and that it would hide.

    Args:
      error: what happened.
      left: what an interruption has made of the run.
    """
    text = " ".join(str(error).split())
    before = error.__context__
    if isinstance(before, (LaunchError, Interrupted)) and error.__cause__ is not before:
        return f"{sentence(before, left)}; then {text}"
    if isinstance(error, Interrupted):
        return f"interrupted ({text}): {left}"
    return text


def left(verb: str, config: Any) -> str:
    """What an interruption makes of a run."""
    if verb != "launch":
        return "the run goes on as it was"
    if isinstance(config, kubernetes.Kubernetes) and config.delete != "always":
        return "the JobSet is kept, as --delete says"
    return "the run was ended"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
      argv: words; by default those of the program.

    Returns:
      The exit status: 0, 1 after a failure, 2 for a mistake on the command line, 130 after Ctrl-C.
    """
    status, verb, config = 2, "launch", None  # until the command line is understood
    try:
        verb, config, command = parse(sys.argv[1:] if argv is None else argv)
        text = steps.render(plan(verb, config, command))
        if config.dry_run:
            print(text, end="")
            return 0
        status = 1
        carry_out(verb, config, command)
        return 0
    except (LaunchError, Interrupted) as error:
        print(f"launch: {sentence(error, left(verb, config))}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else status
    except KeyboardInterrupt:
        print("launch: interrupted before anything was started", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

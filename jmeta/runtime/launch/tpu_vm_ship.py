"""What a TPU VM gets before a run begins: the code, the storage that its workers share, the run."""

from jmeta.runtime.launch import code, tpu_vm
from jmeta.runtime.launch.steps import CommandError, LaunchError
from jmeta.runtime.launch.storage import Storage
from jmeta.runtime.launch.tpu_vm_host import Host, remote, said_there


def ship(h: Host, resume: bool) -> None:
    """Bring the code to all workers, and the run directory that is here, unless it is shared."""
    c = h.commands
    h.say(f"shipping the code to {h.config.name}")
    remote(h, c.prepare)
    remote(h, c.ship)
    h.say("installing it")
    remote(h, c.install)
    if resume and c.mount is None:
        _restore(h)


def _restore(h: Host) -> bool:
    """Ship the run directory that is here, if there is one."""
    there = (code.staging(tpu_vm.out_of(h.config)) / "run.tar.gz").exists()
    for step in h.commands.restore if there else ():
        remote(h, step)
    return there


def mount(h: Host, shared: Storage, begun: bool) -> None:
    """Make the workers' run directory one on shared storage, and see whose run it holds.

    Args:
      h: the launch.
      shared: where it lies.
      begun: whether this launch has begun the run there, before a preemption.

    Raises:
      LaunchError: it cannot be mounted; it holds a run that is not to be gone on with, or none.
    """
    assert h.commands.mount is not None
    assert h.commands.look is not None
    h.say(f"mounting {shared.name}")
    try:
        remote(h, h.commands.mount)
    except CommandError as error:
        raise LaunchError(said_there(error) or str(error)) from error
    if begun:
        return  # by this launch: it is our own
    filled = bool(remote(h, h.commands.look).strip())
    if filled and not h.config.resume:
        raise LaunchError(
            f"{shared.name} holds a run already: choose another --name, or --resume it"
        )
    if h.config.resume and not filled and not _restore(h):
        out = tpu_vm.out_of(h.config)
        raise LaunchError(f"there is no run in {shared.name}, nor in {out}, to --resume")

"""TPU VMs: what `--dry-run` prints of a VM's life and of the commands that come back to it."""

from collections.abc import Sequence

from jmeta.runtime.launch import code
from jmeta.runtime.launch.steps import Section, Step
from jmeta.runtime.launch.tpu_vm import Commands, TpuVm, commands, log, out_of


def plan(config: TpuVm, command: Sequence[str], template: str) -> list[Section]:
    """The whole life of a launch, in order, for `--dry-run`.

    Example:
      >>> sections = plan(TpuVm(name="n", zone="us-west4-a", type="v5litepod-8"),
      ...                 ["experiments.sinusoid"], "# worker.sh")
      >>> sections[1].heading, len(sections[1].steps)
      ('if it is not there: create it', 1)
    """
    c, _ = commands(config, command, template)
    beat, stage = f"every {config.poll:g} s", code.staging(out_of(config))
    packing = (code.pack(out_of(config), stage / "run.tar.gz"),) if config.resume else ()
    begin = (c.resume,) if config.resume else (c.start,)
    restore, again = c.restore, "delete, create, ship and install as above, then"
    if c.mount is not None:
        restore, again = (), "delete, create, ship, install and mount as above, then"
    elif config.resume:
        begin = (*c.restore, *begin)
    copies = f"every {config.sync:g} s, and at the end: the run directory of worker 0"
    assert c.create is not None
    sections = [
        Section("is the VM there?", (c.describe,)),
        Section("if it is not there: create it", (c.create,)),
        Section(f"{beat} until the queued resource is ACTIVE", (c.queue,)) if c.queue else None,
        Section(f"{beat} until it is READY, at most {config.wait:g} s", (c.describe,)),
        Section("ship the code and install it, on all workers",
                (*c.stage, *(packing if c.mount is None else ()), c.prepare, c.ship, c.install)),
        None if c.mount is None or c.look is None else Section(
            "mount the storage on all workers; is a run there?", (c.mount, c.look)
        ),
        None if c.mount is None or not config.resume else Section(
            "if none is there, but one is here", (*packing, *c.restore)
        ),
        Section("start the command on all workers, detached", begin),
        None if config.detach else Section(
            f"{beat} until all workers have ended: the state, each worker, what is new in the log",
            (c.describe, c.status, log(config, 0)),
        ),
        None if config.detach else Section(
            copies if c.mount is None else "at the end: the run directory, through worker 0",
            (c.pack, c.bring, *c.place),
        ),
        None if config.detach else Section(
            "at the end: each worker's log", (Step(("mkdir", "-p", (stage / "logs").as_posix())),
                                              c.logs)
        ),
        None if config.detach or not config.restarts else Section(
            f"after a preemption, at most {config.restarts} times: {again}",
            (c.delete, *restore, c.resume),
        ),
        _ending(config, c),
    ]  # fmt: skip
    return [section for section in sections if section is not None]


def plan_verb(verb: str, place: TpuVm, template: str) -> list[Section]:
    """What follow, fetch and delete do, in order, for `--dry-run`."""
    c, _ = commands(place, (), template)
    stage = code.staging(out_of(place))
    watch = Section(
        f"every {place.poll:g} s until all workers have ended",
        (c.describe, c.status, log(place, 0)),
    )
    bring = Section(
        "the run directory of worker 0, and each worker's log",
        (Step(("mkdir", "-p", (stage / "logs").as_posix())), c.pack, c.bring, *c.place, c.logs),
    )
    return {
        "follow": [watch, bring],
        "fetch": [bring],
        "delete": [Section("delete it", (c.delete,))],
    }[verb]


def _ending(config: TpuVm, c: Commands) -> Section | None:
    if config.detach or config.delete == "never":
        return None
    when = {"always": "at the end, however it comes", "success": "after success"}[config.delete]
    return Section(f"{when}, unless the VM was there before", (c.delete,))

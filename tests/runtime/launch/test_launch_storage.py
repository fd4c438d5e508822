"""Several workers of a TPU VM with one run directory, on a bucket or a share that is mounted."""

import pytest
from launch_world import POD, SAVES_AND_WAITS, TPU, assert_failed, assert_nothing_runs

TAKEN = {"on": "ssh status", "after": "began", "from": 2, "to": 2, "state": "PREEMPTED"}


def test_several_workers_without_storage_are_refused_with_what_to_add(world):
    code, _, err = world.run(POD[:-2])
    assert code == 2
    assert err == (
        "launch: --type v5litepod-16 has 4 workers, which need one run directory that all of them "
        "see: add --storage gs://BUCKET/FOLDER or --storage nfs://HOST/SHARE\n"
    )
    assert world.calls() == []


def test_a_preempted_run_goes_on_from_the_bucket_without_a_copy(world):
    world.program(SAVES_AND_WAITS)
    world.cue(TAKEN)
    status, out, err = world.run(POD, "--sync", "0", "--restarts", "1")
    assert (status, err) == (0, "")
    assert "restart 1/1" in out
    assert "went on" in out
    # Nothing was copied but at the end, and nothing shipped back.
    assert len(world.calls("--command=bash jmeta-n/worker.sh pack")) == 1
    assert not world.calls("--command=bash jmeta-n/worker.sh unpack")
    assert (world.out / "ckpt").read_text() == "saved\n"
    mounts = world.calls("gcsfuse", "mine")
    assert len(mounts) == 4  # two workers, twice
    assert {"--rename-dir-limit=0", "--metadata-cache-ttl-secs=0"} <= set(mounts[0])
    assert_nothing_runs(world)


def test_a_run_that_cannot_be_brought_back_is_said_to_be_in_the_bucket(world):
    world.program(SAVES_AND_WAITS)
    world.cue(TAKEN, {"on": "ssh pack", "stderr": "Connection refused", "status": 255})
    result = world.run(POD, "--restarts", "0")
    assert_failed(world, result, "preempted")
    assert "the run is in gs://mine/runs/n" in result[1]
    assert (world.stored() / "ckpt").read_text() == "saved\n"


def test_the_run_of_another_launch_is_not_gone_on_with(world):
    world.stored().mkdir(parents=True)
    (world.stored() / "ckpt").write_text("saved")
    result = world.run(POD)
    assert_failed(world, result, "gs://mine/runs/n holds a run already", "--resume it")
    assert len(world.calls("delete")) == 1
    world.program(SAVES_AND_WAITS)
    status, out, _ = world.run(POD, "--resume")
    assert status == 0
    assert "went on" in out
    assert (world.out / "ckpt").read_text() == "saved"


def test_a_run_of_one_worker_goes_on_on_several(world):
    result = world.run(POD, "--resume")
    assert_failed(world, result, "there is no run in gs://mine/runs/n, nor in", "to --resume")
    world.out.mkdir(parents=True)
    (world.out / "ckpt").write_text("saved")
    world.program(SAVES_AND_WAITS)
    status, out, _ = world.run(POD, "--resume")
    assert status == 0
    assert "went on" in out
    assert (world.stored() / "ckpt").read_text() == "saved"


REFUSED = {
    "bucket": ("gs://none/runs", {}, "gs://none cannot be mounted on host-w", "doesn't exist"),
    "share": ("nfs://host/vol", {"on": "sudo mount", "stderr": "mount.nfs: Connection refused"},
              "host:/vol cannot be mounted on host-w", "Connection refused"),
    "permission": ("gs://mine/runs", {"on": "gcsfuse mine", "stderr": "Error: 403 Forbidden"},
                   "gs://mine cannot be mounted on host-w", "403 Forbidden"),
    "installation": ("gs://mine", {"on": "sudo apt-get", "stderr": "E: no network"},
                     "gs://mine cannot be mounted", "E: no network"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_mount_that_fails_is_one_sentence_and_leaves_nothing(world, what):
    where, cue, *said = REFUSED[what]
    if what == "installation":
        world.state(gcsfuse_version="2.5.1")
    if cue:
        world.cue(cue)
    result = world.run([*POD[:-1], where])
    assert_failed(world, result, *said)
    assert not (world.fake / "vm").exists()
    assert not world.calls("--command=bash jmeta-n/worker.sh start experiments.reviews")


def test_a_bucket_that_cannot_rename_a_folder_is_refused(world):
    move = world.fake / "remote" / "mv"
    refusal = 'echo "mv: cannot move: Too many open files" >&2; exit 1'
    move.write_text(
        f'#!/bin/bash\ncase "$1" in *.probe*) {refusal} ;; esac\nexec /usr/bin/mv "$@"\n'
    )
    move.chmod(0o755)
    assert_failed(
        world, world.run(POD), "cannot rename a folder", "--enable-hierarchical-namespace"
    )
    assert list(world.stored().iterdir()) == []


def test_an_old_gcsfuse_is_replaced(world):
    world.state(gcsfuse_version="2.5.1")
    assert world.run([*TPU, "--storage", "gs://mine"])[0] == 0
    source = (world.fake / "etc-gcsfuse.list").read_text()
    assert source.startswith("deb [signed-by=/usr/share/keyrings/")
    assert source.endswith("gcsfuse-jammy main\n")


def test_a_share_is_mounted_so_that_workers_see_what_others_write(world):
    assert world.run([*POD[:-1], "nfs://10.0.0.2/vol1"])[0] == 0
    assert (world.fake / "shares" / "10.0.0.2:_vol1" / "n" / "ckpt").read_text() == "saved\n"
    (first, _) = world.calls("sudo", "mount")
    assert first[-2:] == ["10.0.0.2:/vol1", "shared"]
    assert "hard,actimeo=0,lookupcache=none" in first


def test_a_vm_that_stays_is_mounted_once_and_keeps_what_was_not_fetched(world):
    (world.fake / "w0" / "jmeta-n" / "run").mkdir(parents=True)
    (world.fake / "w0" / "jmeta-n" / "run" / "old").write_text("not fetched")
    world.state(vm={"state": "READY"})
    argv = [*TPU, "--storage", "gs://mine/runs"]
    assert world.run(argv)[0] == 0
    home = world.fake / "w0" / "jmeta-n"
    assert [path.read_text() for path in home.glob("run.*/old")] == ["not fetched"]
    assert (home / "run").is_symlink()
    assert world.run(argv, "--resume")[0] == 0
    assert len(world.calls("gcsfuse", "mine")) == 1
    assert world.run(TPU, "--out", str(world.out.with_name("m")))[0] == 0
    assert not (home / "run").is_symlink()

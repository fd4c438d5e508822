"""Storage that all workers of a TPU VM share, so that they have one run directory.

A Cloud Storage bucket or an NFS share: the name is checked here, `worker.sh mount` mounts it.
"""

import re
from typing import NamedTuple

from jmeta.runtime.launch.steps import LaunchError

_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])((?:/[A-Za-z0-9_.=@-]+)*)/?")
_SHARE = re.compile(r"nfs://([A-Za-z0-9][A-Za-z0-9.-]*)((?:/[A-Za-z0-9_.=@-]+)+)/?")

# Chips (v5e, v6e) or cores (the others) in the name of a type, for each worker; up to eight of
# them are one worker everywhere. cloud.google.com/tpu/docs/v5e, and the pages beside it.
_ALONE = 8
_EACH = ((r"(?:v5litepod|v6e)-(\d+)", 4), (r"(?:v[234]|v5p)-(\d+)", 8))


class Storage(NamedTuple):
    """Where a run directory lies.

    Attributes:
      source: what is mounted: `gs://BUCKET` or `HOST:/SHARE`.
      folder: the run directory in it.
      name: all of it, as its user would write it.
    """

    source: str
    folder: str
    name: str


def storage(text: str, run: str) -> Storage:
    """Where a run lies on storage that its user names.

    Args:
      text: `gs://BUCKET`, `gs://BUCKET/FOLDER` or `nfs://HOST/SHARE`.
      run: the name of the run, checked.

    Raises:
      LaunchError: it is none of these.

    Example:
      >>> storage("gs://mine/runs", "a")
      Storage(source='gs://mine', folder='runs/a', name='gs://mine/runs/a')
      >>> storage("nfs://10.0.0.2/vol1", "a")
      Storage(source='10.0.0.2:/vol1', folder='a', name='nfs://10.0.0.2/vol1/a')
    """
    bucket, share = _BUCKET.fullmatch(text), _SHARE.fullmatch(text)
    found = bucket or share
    if found is None or any(re.fullmatch(r"\.+|-.*", part) for part in found[2].split("/")):
        raise LaunchError(
            f"--storage {text!r} must be gs://BUCKET/FOLDER or nfs://HOST/SHARE, of letters, "
            "digits and . _ = @ -"
        )
    inside = found[2].strip("/")
    if bucket is None:
        return Storage(f"{found[1]}:/{inside}", run, f"nfs://{found[1]}/{inside}/{run}")
    folder = f"{inside}/{run}" if inside else run
    return Storage(f"gs://{found[1]}", folder, f"gs://{found[1]}/{folder}")


def workers(kind: str) -> int | None:
    """How many workers a TPU VM of an accelerator type has; None for a type not known here.

    Example:
      >>> [workers(kind) for kind in ("v5litepod-8", "v5litepod-16", "v4-8", "v5p-32", "v6e-256")]
      [1, 4, 1, 4, 64]
    """
    for pattern, each in _EACH:
        found = re.fullmatch(pattern, kind)
        if found is not None:
            count = int(found[1])
            return 1 if count <= _ALONE else -(-count // each)
    return None


def require_shared(kind: str, shared: Storage | None) -> None:
    """Refuse several workers without a run directory that all of them see.

    Raises:
      LaunchError: so it is; the message says what to add.
    """
    count = workers(kind)
    if shared is None and count is not None and count > 1:
        raise LaunchError(
            f"--type {kind} has {count} workers, which need one run directory that all of them "
            "see: add --storage gs://BUCKET/FOLDER or --storage nfs://HOST/SHARE"
        )

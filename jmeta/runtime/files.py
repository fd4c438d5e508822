"""Atomic writes: a reader sees the old file or the new one, never half of it."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path | str, content: str | bytes) -> Path:
    """Write a file through a temporary one in the same folder, then rename.

    Args:
      path: The file to write; missing parent folders are made.
      content: Text (written as UTF-8, newlines kept) or bytes.

    Returns:
      The path written.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> write_atomically(Path(folder) / "a" / "b.txt", "hello").read_text()
      'hello'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path

"""Files that everything here may use: atomic writes, and the folder of caches.

Imports nothing but the standard library, so that any part of jmeta may import it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(
    path: Path | str, content: str | bytes | Callable[[IO[bytes]], object]
) -> Path:
    """Write a file whole or not at all: to a temporary file in the same folder, then renamed.

    Args:
      path: The file to write; missing parent folders are made.
      content: Text (written as UTF-8, newlines kept), bytes, or a function that writes to the open
        binary file it is given.

    Returns:
      The path.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> write_atomically(Path(folder) / "a" / "b.txt", "hello").read_text()
      'hello'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made anew, never opened, so that two writers cannot share it; as readable as any new file.
    name = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        with name.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    return path


def cache_dir() -> Path:
    """``$JMETA_CACHE``, or ``~/.cache/jmeta``."""
    return Path(os.environ.get("JMETA_CACHE") or "~/.cache/jmeta").expanduser()

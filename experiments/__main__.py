"""List the experiments: `python -m experiments`."""

import ast
import sys
from pathlib import Path


def first_line(file: Path) -> str:
    """The first line of a module's docstring, read without importing the module."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def listing(folder: Path) -> str:
    """One line for each experiment in a folder: its name and what it is for."""
    files = sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))
    width = max((len(file.stem) for file in files), default=0)
    return "\n".join(f"  {file.stem:<{width}}  {first_line(file)}".rstrip() for file in files)


def main() -> None:
    """Print the list and how to run one."""
    if len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help", "list"):
        sys.exit(f"run an experiment as a module: python -m experiments.{sys.argv[1]} --help")
    print("python -m experiments.NAME --preset P --seeds N --out DIR    (--help for the rest)\n")
    print(listing(Path(__file__).parent))


if __name__ == "__main__":
    main()

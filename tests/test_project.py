"""The project as a whole: packaging, make targets, and what no tracked file may hold."""

import ast
import configparser
import pathlib
import re
import subprocess
import warnings

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXTRAS = {"test", "peers", "docs", "tpu", "cuda"}


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def tracked() -> list[pathlib.Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def test_dependencies_have_floors_and_no_ceilings(setup_cfg):
    lists = [
        setup_cfg["options"]["install_requires"],
        *setup_cfg["options.extras_require"].values(),
    ]
    for requirement in "\n".join(lists).split():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z0-9,]+\])?>=[0-9.]+", requirement), requirement
    assert setup_cfg["options"]["python_requires"] == ">=3.11"


def test_extras_and_base(setup_cfg):
    assert set(setup_cfg["options.extras_require"]) >= EXTRAS
    base = {
        re.split(r"[\[>]", line)[0] for line in setup_cfg["options"]["install_requires"].split()
    }
    needed = {"jax", "flax", "optax", "transformers", "datasets", "orbax-checkpoint"}
    assert needed | {"tensorflow-datasets"} <= base


def test_version_is_said_once(setup_cfg):
    import jmeta

    assert jmeta.__version__ == setup_cfg["metadata"]["version"]


def test_pyproject_holds_only_what_a_build_needs():
    import tomllib

    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(content) == {"build-system"}


def test_make_targets_and_continuous_integration():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    assert {"setup", "demo", "test", "bench", "lint", "docs"} <= targets
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    assert targets == phony
    ci = ROOT / ".ci" / "run"
    commands = [line.strip() for line in ci.read_text().splitlines()]
    assert "make test" in commands
    assert ci.stat().st_mode & 0o111, ".ci/run is not executable"


def test_the_demo_goes_on_and_readme_says_its_command():
    makefile = (ROOT / "Makefile").read_text()
    [command] = re.findall(r"^demo: setup\n\t\$\(BIN\)/(.*)\n\n", makefile, re.MULTILINE)
    assert command.split()[:3] == ["python", "-m", "experiments.fewshot_text"]
    assert "--resume" in command.split()
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()


def test_license_is_apache(setup_cfg):
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert setup_cfg["metadata"]["license"] == "Apache-2.0"


# Spelled so that this file does not hold what it forbids.
FORBIDDEN = {
    "an absolute path of a machine": r"(?<![\w.~/])/(home|root|work|Users|mnt|opt|tmp)/"
    r"(?!someone|ada/)\w",
    "a package registry": r"(pypi|npm" + r"js)\.(org|com)|index[-]url",
    "a credential": r"(gh[ps]|hf|sk)_[A-Za-z0-9]{20,}|BEGIN [A-Z ]*PRIVATE KEY",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_tracked_file_holds(what):
    for file in tracked():
        if file.suffix in (".png", ".npz", ".parquet") or file == pathlib.Path(__file__):
            continue
        found = re.search(FORBIDDEN[what], file.read_text(encoding="utf-8"))
        assert not found, f"{file.relative_to(ROOT)} holds {what}: {found[0]!r}"


def test_tracked_files_are_small():
    large = {str(f.relative_to(ROOT)): f.stat().st_size for f in tracked()}
    assert {name: size for name, size in large.items() if size > 2**20} == {}


def test_a_warning_of_jmetas_is_an_error_in_the_tests():
    with pytest.raises(UserWarning, match="at the caller"):
        warnings.warn("jmeta: at the caller", stacklevel=1)
    with pytest.warns(UserWarning, match="of another"):
        warnings.warn("of another", stacklevel=1)


def test_every_warning_says_that_it_is_jmetas():
    found = 0
    for file in (ROOT / "jmeta").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                text = ast.unparse(node.args[0])
                assert re.match(r"f?['\"]+jmeta: ", text), f"{file.name}:{node.lineno} {text}"
                found += 1
    assert found > 5


MODULES = sorted(
    file
    for folder in ("jmeta", "experiments", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_says_what_it_is_for(file):
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert doc, "no docstring"
    first = doc.partition("\n\n")[0]
    assert len(first.splitlines()) <= 2
    assert first.rstrip().endswith((".", "`"))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_is_one_idea(file):
    if file.is_relative_to(ROOT / "jmeta"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 450

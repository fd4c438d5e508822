"""What importing jmeta costs, who imports whom, and which names of JAX are off limits."""

import ast
import importlib
import inspect
import json
import os
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import jmeta

ROOT = pathlib.Path(__file__).resolve().parents[1]

# design: the direction of imports. A prefix allows what is below it. `jmeta.files` is a leaf.
ALLOWED = {
    "jmeta.files": set(),
    "jmeta.core": {"jmeta.core"},
    "jmeta.methods": {"jmeta.files", "jmeta.core", "jmeta.methods"},
    "jmeta.data": {"jmeta.files", "jmeta.data"},
    "jmeta.models": {"jmeta.files", "jmeta.core.types", "jmeta.core.tree", "jmeta.models"},
    "jmeta.tasks": {
        "jmeta.files",
        "jmeta.core.types",
        "jmeta.core.tree",
        "jmeta.data",
        "jmeta.tasks",
    },
    # Whatever iterates, a process takes its part of a global batch in one way.
    "jmeta.runtime": {"jmeta.files", "jmeta.core", "jmeta.data.loader", "jmeta.runtime"},
    # The planner compiles the real step, of models by name, and imports both when it plans.
    "jmeta.cost": {
        "jmeta.core",
        "jmeta.cost",
        "jmeta.files",
        "jmeta.models",
        "jmeta.runtime.parallel",
        "jmeta.runtime.train",
    },
    "jmeta.testing": {"jmeta.core"},
    "jmeta": {"jmeta"},
}
CORE_PACKAGES = {"jax", "optax"}  # all that core imports, at any depth
LIGHT = {"jax", "optax", "numpy", "jmeta"}  # all that any module imports when it is imported

# Names that jax removed or deprecated by 0.10, or never promised.
FORBIDDEN = (
    "jax._src",
    "jax.abstract_arrays",
    "jax.core",
    "jax.linear_util",
    "jax.lib",
    "jax.interpreters",
    "jax.experimental.enable_x64",
    "jax.experimental.disable_x64",
    "jax.experimental.host_callback",
    "jax.experimental.maps",
    "jax.experimental.pjit",
    "jax.experimental.shard_map",
    "jax.random.PRNGKey",
    "jax.tree_map",
    "jax.tree_leaves",
    "jax.tree_flatten",
    "jax.tree_unflatten",
    "jax.tree_structure",
    "jax.tree_util.tree_multimap",
    "jax.tree_util.build_tree",
    "jax.xla",
    "jax.xla_computation",
    "jax.device_put_replicated",
    "jax.device_put_sharded",
    "jax.pmap",
    "jax.config.jax_",
    "jax.numpy.clip_a",
    "jax.numpy.trapz",
    "jax.nn.normalize",
)


def modules(*folders: str) -> list[pathlib.Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def dotted(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> list[str]:
    """Every module, and every `module.name`, that a file imports anywhere."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "importlib.import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append(node.args[0].value)
    return found


def at_import(tree: ast.Module) -> list[str]:
    """What a file imports when it is imported: not inside functions, nor for types alone."""
    found, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(str(node.module))
        todo += ast.iter_child_nodes(node)
    return found


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def used(tree: ast.AST) -> set[str]:
    """Dotted names as they resolve through the file's imports, and the imports themselves."""
    alias = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                alias[each.asname or each.name.partition(".")[0]] = (
                    each.name if each.asname else each.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for each in node.names:
                alias[each.asname or each.name] = f"{node.module}.{each.name}"
    found = set(imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, dot, rest = ast.unparse(node).partition(".")
            if head.isidentifier():
                found.add(alias.get(head, f"?{head}") + dot + rest)
    return found


def loaded(code: str) -> set[str]:
    """Modules loaded by a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_jmeta_costs_jax_and_optax():
    extra = loaded("import jmeta") - loaded("import jax, optax")
    foreign = {
        name
        for name in extra
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "jmeta"}
        # Parts of jax itself that `import jax` leaves for later: no package beyond it.
        and not under(name, "jax")
    }
    assert foreign == set()
    assert "jmeta.core.optim" in extra


def test_import_of_any_module_is_light():
    for file in modules("jmeta"):
        for name in at_import(ast.parse(file.read_text(encoding="utf-8"))):
            top = name.partition(".")[0]
            assert top in LIGHT or top in sys.stdlib_module_names, f"{dotted(file)} imports {name}"


@pytest.mark.parametrize("file", modules("jmeta"), ids=dotted)
def test_direction_of_imports(file):
    name = dotted(file)
    home = max((prefix for prefix in ALLOWED if under(name, prefix)), key=len)
    if name == "jmeta":
        home = "jmeta"
    for target in imported(ast.parse(file.read_text(encoding="utf-8"))):
        top = target.partition(".")[0]
        assert top not in ("experiments", "benchmarks", "tests"), f"{name} imports {target}"
        if top == "jmeta":
            allowed = any(under(target, prefix) for prefix in ALLOWED[home])
            # `from jmeta.core import tree` names the module as an attribute of its package.
            assert allowed, f"{name} imports {target}; allowed: {sorted(ALLOWED[home])}"
        elif home == "jmeta.core":
            known = top in CORE_PACKAGES or top in sys.stdlib_module_names
            assert known, f"{name} imports {target}"


@pytest.mark.parametrize("file", modules("jmeta", "experiments", "benchmarks"), ids=dotted)
def test_no_name_that_jax_removed_or_deprecated(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    bad = [name for name in used(tree) if any(under(name, each) for each in FORBIDDEN)]
    # Reading an option is one thing that `jax.config` still promises; inspected by hand.
    assert bad == [], f"{dotted(file)} uses {bad}"


def test_all_is_complete_and_documented():
    public = {
        name
        for name, value in vars(jmeta).items()
        if not name.startswith("_")
        and (
            getattr(value, "__module__", "").startswith("jmeta")
            or name in ("cost", "methods", "optim")
        )
    }
    submodules = {each.name for each in pkgutil.iter_modules(jmeta.__path__)}
    assert public - submodules - {"annotations"} <= set(jmeta.__all__)
    assert all(hasattr(jmeta, name) for name in jmeta.__all__)
    assert list(jmeta.__all__) == sorted(jmeta.__all__)


PUBLIC = {
    **{f"jmeta.{name}": getattr(jmeta, name) for name in jmeta.__all__},
    **{f"jmeta.methods.{name}": getattr(jmeta.methods, name) for name in jmeta.methods.__all__},
    **{f"jmeta.optim.{name}": getattr(jmeta.optim, name) for name in jmeta.optim.__all__},
}


@pytest.mark.parametrize("name", [n for n, v in PUBLIC.items() if inspect.isfunction(v)])
def test_every_public_function_has_an_example(name):
    doc = inspect.getdoc(PUBLIC[name]) or ""
    if name.startswith("jmeta.optim.") and ("optax" in doc or ":func:" in doc):
        return  # a drop-in says what it stands in for, and is used like it
    assert "Example" in doc, f"{name} has no Example"
    assert ">>>" in doc, f"{name} has no example that runs"


@pytest.mark.parametrize("name", [n for n, v in PUBLIC.items() if inspect.isclass(v)])
def test_every_public_class_says_what_it_is(name):
    doc = PUBLIC[name].__doc__ or ""
    assert len(doc) > 30, f"{name} is not documented"
    assert not doc.startswith(f"{PUBLIC[name].__name__}("), f"{name} is not documented"


@pytest.mark.parametrize("name", ["data", "models", "runtime", "tasks", "testing"])
def test_subpackages_are_attributes_on_first_use(name):
    assert getattr(jmeta, name) is importlib.import_module(f"jmeta.{name}")


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="mamml"):
        _ = jmeta.mamml

"""Which part imports which: the core, the networks upon it, the commands upon both."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jax_unlearn

ROOT = pathlib.Path(jax_unlearn.__file__).parent
WINGS = ("models", "pretrained", "app")
# What a wing may import of the package, itself among them.
BELOW = {
    "core": {"core"},
    "models": {"core", "models"},
    "pretrained": {"core", "models", "pretrained"},
    "app": {"core", *WINGS},
}
CORE_PACKAGES = {"jax", "numpy", "optax"}
BLOCKED = (
    "PIL", "chex", "flax", "huggingface_hub", "jinja2", "matplotlib", "orbax", "safetensors",
    "scipy", "tokenizers", "torch", "tqdm", "tyro",
)  # fmt: skip
BOUND = (
    "attacks", "baselines", "divergences", "duality", "formulations", "likelihoods", "losses",
    "metrics", "mixtures", "multipliers", "problem", "quantification", "samplers", "schedules",
    "sharding", "sweep",
)  # fmt: skip


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def wing_of(module):
    part = module.split(".")[1] if "." in module else "core"
    return part if part in WINGS else "core"


CORE = [module for module in MODULES if wing_of(module) == "core"]


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(tree, inside):
    """Import statements that run: at the level of the module, and `inside` functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not is_type_checking(node) and (inside or not isinstance(node, ast.FunctionDef)):
            yield from statements(node, inside)


# The face's names that are looked up when they are asked for, as type checkers see them.
LAZY = {
    alias.name
    for node in MODULES["jax_unlearn"].body
    if is_type_checking(node)
    for statement in node.body
    for alias in statement.names
}


def imported(module, *, inside):
    """The full names of the modules that one imports, of this package and of others."""
    for node in statements(MODULES[module], inside):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        assert node.level == 0, f"{module} has a relative import"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            if node.module == "jax_unlearn" and alias.name in LAZY:
                yield "jax_unlearn.pretrained"
            else:
                yield full if full in MODULES else node.module


def own(names):
    return {name for name in names if name.split(".")[0] == "jax_unlearn"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_from_above(module):
    names = set(imported(module, inside=True))
    found = {name: wing_of(name) for name in own(names)}
    assert not {name for name, wing in found.items() if wing not in BELOW[wing_of(module)]}
    assert found.keys() <= MODULES.keys()
    others = {name.split(".")[0] for name in names - own(names)}
    here = {path.stem for path in (ROOT.parent / "tests").rglob("*.py")}
    assert not others & ({"tests", "examples", "benchmarks"} | here)
    if wing_of(module) == "core":
        assert others <= CORE_PACKAGES | sys.stdlib_module_names


def test_there_is_no_circle():
    """Modules are taken away while one is left whose imports are all gone."""
    left = {module: own(imported(module, inside=False)) for module in MODULES}
    assert sum(map(len, left.values())) > 100
    while ready := [module for module, names in left.items() if not names & left.keys()]:
        for module in ready:
            del left[module]
    assert not left, f"among these is a circle: {sorted(left)}"


def loads(lines):
    """The top-level packages, not of Python itself, that some lines load in a new process."""
    ran = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


TELL = """
import sys
print(*{name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names)
"""


@pytest.mark.slow
def test_the_core_needs_jax_optax_and_numpy_alone():
    block = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(f"{{name}} is not there")
sys.meta_path.insert(0, Refuse())
import jax, numpy, optax
"""
    face = f"import jax_unlearn; [getattr(jax_unlearn, name) for name in {BOUND}]\n"
    everything = f"import importlib; [importlib.import_module(name) for name in {CORE}]\n"
    assert loads(block + face + everything + TELL) == loads(block + TELL) | {"jax_unlearn"}


@pytest.mark.slow
def test_the_core_loads_nothing_where_everything_is_installed():
    given = "import jax, jax.numpy, numpy, optax\n"
    assert loads(given + "import jax_unlearn\n" + TELL) == loads(given + TELL) | {"jax_unlearn"}


@pytest.mark.slow
def test_what_loads_networks_is_imported_when_asked_for():
    assert jax_unlearn._LAZY == tuple(sorted(LAZY))
    asked = """
import jax_unlearn
load = jax_unlearn.load_pretrained
import jax_unlearn.pretrained
assert load is jax_unlearn.pretrained.load_pretrained
"""
    assert "flax" not in loads("import jax_unlearn\n" + TELL)
    assert {"flax", "safetensors"} <= loads(asked + TELL)
    for name in LAZY:
        assert getattr(jax_unlearn, name) is getattr(jax_unlearn.pretrained, name)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'jax_unlearn' has no attribute 'load_trained'"):
        jax_unlearn.load_trained  # noqa: B018

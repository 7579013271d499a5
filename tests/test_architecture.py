"""The rules of docs/architecture.md that a syntax tree can show; each rule is also shown to fail on bad source."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "sharding", "jaxinfer", "serving")  # each may import itself and those before it
NOT_IMPORTABLE = ("scripts", "benchmarks", "tests", "oracle", "conftest")
ENVIRONMENT_READERS = {"jaxinfer/config.py", "serving/cli.py", "sharding/multihost.py"}
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv", "expandvars"}
MESH_NAMES = {"Mesh", "AbstractMesh", "PartitionSpec", "shard_map"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "transformers"}
FORBIDDEN_FILES = {"utils.py", "base.py"}
WITHOUT_JAX = ("jaxinfer.scheduler", "jaxinfer.sharded_scheduler", "jaxinfer.cache", "serving.client")
CONFIG_CLASS = re.compile(r"(Config|Spec|Scaling|Params|Options)$")
REGISTRY_ENTRY = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)*:\w+")
MAX_LINES, MAX_KERNEL_LINES = 400, 800
MAX_DOCSTRING_LINES = 5

Rule = Callable[[str, ast.Module], list[str]]


def is_generated(path: str) -> bool:
    return path.startswith("serving/protos/")


def sources(*folders: str) -> dict[str, str]:
    """Repository path -> source of every Python file that a person wrote."""
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    found = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    return {path: text for path, text in found.items() if not is_generated(path)}


def trees() -> dict[str, ast.Module]:
    return {path: ast.parse(source, path) for path, source in sources(*PACKAGES).items()}


def module_name(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of everything imported: statements at any depth, import_module("..."), registry entries.

    `from a import b` yields both a and a.b, since b may be a module.
    """
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and REGISTRY_ENTRY.fullmatch(node.value):
            yield node.lineno, node.value.partition(":")[0]


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, identifier) of every name, attribute and imported name, under its original name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, alias.name.rpartition(".")[2]) for alias in node.names)


# --- rules over one file: (repository path, tree) -> what is wrong with it


def imports_one_way(path: str, tree: ast.Module) -> list[str]:
    allowed = PACKAGES[: PACKAGES.index(path.split("/")[0]) + 1]
    tops = [(line, name.split(".")[0]) for line, name in imports(path, tree)]
    wrong = {(line, top) for line, top in tops if top in (*PACKAGES, *NOT_IMPORTABLE) and top not in allowed}
    return [f"line {line} imports {top}" for line, top in sorted(wrong)]


def mesh_only_in_sharding(path: str, tree: ast.Module) -> list[str]:
    if path.startswith("sharding/"):
        return []
    return [f"line {line} names {name}" for line, name in names(tree) if name in MESH_NAMES]


def environment_only_at_the_edge(path: str, tree: ast.Module) -> list[str]:
    if path in ENVIRONMENT_READERS:
        return []
    return [f"line {line} names {name}" for line, name in names(tree) if name in ENVIRONMENT_NAMES]


def no_pickle_no_torch(path: str, tree: ast.Module) -> list[str]:
    tops = {(line, name.split(".")[0]) for line, name in imports(path, tree)}
    wrong = [f"line {line} imports {top}" for line, top in sorted(tops) if top in FORBIDDEN_IMPORTS]
    wrong += [
        f"line {node.value.lineno} allows pickle"
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    return wrong


def short_docstring_first(path: str, tree: ast.Module) -> list[str]:
    docstring = ast.get_docstring(tree)
    if not docstring:
        return ["has no docstring"]
    lines = sum(1 for line in docstring.splitlines() if line.strip())
    return [f"docstring has {lines} lines of {MAX_DOCSTRING_LINES}"] if lines > MAX_DOCSTRING_LINES else []


FILE_RULES: tuple[Rule, ...] = (
    imports_one_way,
    mesh_only_in_sharding,
    environment_only_at_the_edge,
    no_pickle_no_torch,
    short_docstring_first,
)


@pytest.mark.parametrize("rule", FILE_RULES)
def test_rule_holds(rule: Rule) -> None:
    wrong = [f"{path}: {text}" for path, tree in trees().items() for text in rule(path, tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (imports_one_way, "pallas_kernels/x.py", "import sharding"),
        (imports_one_way, "pallas_kernels/attention/x.py", "from jaxinfer.config import ModelConfig"),
        (imports_one_way, "sharding/x.py", "def f():\n    import jaxinfer.engine as e"),
        (imports_one_way, "sharding/x.py", "import importlib\nm = importlib.import_module('serving.cli')"),
        (imports_one_way, "jaxinfer/x.py", "if True:\n    from serving import cli"),
        (imports_one_way, "jaxinfer/x.py", "TABLE = {'a': 'serving.cli:main'}"),
        (imports_one_way, "serving/x.py", "from scripts import train_tiny"),
        (mesh_only_in_sharding, "jaxinfer/x.py", "from jax.sharding import PartitionSpec as P"),
        (mesh_only_in_sharding, "jaxinfer/x.py", "import jax\nm = jax.sharding.Mesh(d, 'x')"),
        (mesh_only_in_sharding, "pallas_kernels/x.py", "from jax.experimental.shard_map import shard_map"),
        (mesh_only_in_sharding, "serving/x.py", "import jax.experimental.shard_map"),
        (environment_only_at_the_edge, "jaxinfer/engine.py", "import os\nos.environ.get('A')"),
        (environment_only_at_the_edge, "serving/client.py", "from os import getenv as g"),
        (environment_only_at_the_edge, "sharding/mesh.py", "import os as o\no.getenv('A')"),
        (no_pickle_no_torch, "jaxinfer/x.py", "import pickle"),
        (no_pickle_no_torch, "jaxinfer/x.py", "def f():\n    from torch import nn"),
        (no_pickle_no_torch, "serving/x.py", "import torch.nn"),
        (no_pickle_no_torch, "jaxinfer/x.py", "np.load(f, allow_pickle=True)"),
        (short_docstring_first, "jaxinfer/x.py", "import os"),
        (short_docstring_first, "jaxinfer/__init__.py", ""),
        (short_docstring_first, "jaxinfer/x.py", f'"""{chr(10).join("abcdefg")}"""'),
    ],
)
def test_rule_catches(rule: Rule, path: str, source: str) -> None:
    assert rule(path, ast.parse(source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("serving/cli.py", '"""D."""\nimport os, jaxinfer.engine\nfrom . import client\nos.environ["A"]'),
        ("sharding/ops.py", '"""D."""\nfrom jax.sharding import Mesh\nfrom pallas_kernels import dispatch'),
        ("jaxinfer/models/llama.py", '"""D."""\nfrom ..config import LayerSpec\nnp.load(f, allow_pickle=False)'),
        ("jaxinfer/models/__init__.py", '"""D."""\nA = {"X": "jaxinfer.models.llama:config", "note": "serving: no"}'),
    ],
)
def test_rules_accept_good_source(path: str, source: str) -> None:
    assert [text for rule in FILE_RULES for text in rule(path, ast.parse(source))] == []


# --- rules over all files


def unread_config_fields(files: dict[str, ast.Module]) -> list[str]:
    """Fields of config dataclasses that nothing but their own validation reads, as attribute or by getattr."""
    declared: list[tuple[str, str, set[ast.AST]]] = []
    for path, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and CONFIG_CLASS.search(node.name) and is_dataclass(node):
                fields = [item.target.id for item in node.body if is_field(item)]  # type: ignore[attr-defined]
                declared += [(f"{path}: {node.name}.{name}", name, validation(node)) for name in fields]
    reads = [(name, node) for tree in files.values() for name, node in attribute_reads(tree)]
    return [
        label
        for label, field, excluded in declared
        if not any(name == field and node not in excluded for name, node in reads)
    ]


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and "ClassVar" not in ast.unparse(node)


def attribute_reads(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load()):
                yield name, node
            case ast.Call(func=ast.Name("getattr"), args=[_, ast.Constant(str(name)), *_]):
                yield name, node


def validation(owner: ast.ClassDef) -> set[ast.AST]:
    """Nodes of the class's special and check methods: a field that only they read has no effect."""
    methods = [item for item in owner.body if isinstance(item, ast.FunctionDef) and re.match("__|_?check", item.name)]
    return {node for method in methods for node in ast.walk(method)}


def test_every_config_field_is_read() -> None:
    unread = unread_config_fields(trees())
    assert not unread, "\n".join(unread)


def test_unread_config_field_is_found() -> None:
    config = (
        "@dataclass(frozen=True)\nclass XConfig:\n    read: int\n    used: int\n    unread: int\n"
        "    def f(self): return self.used\n    def __post_init__(self): assert self.unread > 0"
    )
    files = {"jaxinfer/a.py": ast.parse(config), "jaxinfer/b.py": ast.parse("def f(c): c.unread = c.read")}
    assert unread_config_fields(files) == ["jaxinfer/a.py: XConfig.unread"]


class WithoutFunctionBodies(ast.NodeTransformer):
    """Leaves what runs when a module is imported."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        return None

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(None)  # a registry entry is imported on use

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def modules_behind(start: str, files: dict[str, ast.Module]) -> set[str]:
    """What `start` imports anywhere in it, and what importing that loads: parents, their imports, and so on."""
    by_name = {module_name(path): (path, tree) for path, tree in files.items()}
    loaded: set[str] = set()
    pending = [start]
    while pending:
        name = pending.pop()
        if name in loaded:
            continue
        loaded.add(name)
        pending += [name.rpartition(".")[0]] if "." in name else []
        if name in by_name:
            path, tree = by_name[name]
            code = tree if name == start else WithoutFunctionBodies().visit(ast.parse(ast.unparse(tree)))
            pending += [imported for _, imported in imports(path, code)]
    return loaded


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_imports_no_jax(name: str) -> None:
    files = trees()
    folder = ROOT / name.replace(".", "/")
    assert folder.is_dir() or folder.with_suffix(".py").is_file()
    members = [name, *(module_name(path) for path in files if path.startswith(f"{name.replace('.', '/')}/"))]
    for member in members:
        assert "jax" not in modules_behind(member, files), f"{member} imports jax, perhaps through another module"
    program = f"import sys, {', '.join(members)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=280, check=False).returncode == 0


@pytest.mark.parametrize(
    "sources_by_path",
    [
        {"jaxinfer/scheduler.py": "def f():\n    import jax.numpy"},
        {"jaxinfer/scheduler.py": "from jaxinfer import batch", "jaxinfer/batch.py": "import jax"},
        {
            "jaxinfer/scheduler.py": "import numpy",
            "jaxinfer/__init__.py": "from .llm import LLM",
            "jaxinfer/llm.py": "import jax",
        },
    ],
)
def test_jax_behind_the_scheduler_is_found(sources_by_path: dict[str, str]) -> None:
    files = {path: ast.parse(source) for path, source in sources_by_path.items()}
    assert "jax" in modules_behind("jaxinfer.scheduler", files)


def test_jax_imported_on_use_elsewhere_is_allowed() -> None:
    lazy = "def __getattr__(name):\n    from jaxinfer.llm import LLM\n    return LLM"
    files = {"jaxinfer/scheduler.py": "import jaxinfer", "jaxinfer/__init__.py": lazy, "jaxinfer/llm.py": "import jax"}
    assert "jax" not in modules_behind("jaxinfer.scheduler", {path: ast.parse(text) for path, text in files.items()})


def misnamed_or_too_long(files: dict[str, str]) -> list[str]:
    wrong = [path for path in files if path.rpartition("/")[2] in FORBIDDEN_FILES]
    for path, source in files.items():
        limit = MAX_KERNEL_LINES if path.startswith("pallas_kernels/") else MAX_LINES
        if (lines := source.count("\n")) > limit:
            wrong.append(f"{path} has {lines} lines, over {limit}")
    return wrong


def test_files_are_short_and_named_for_what_they_hold() -> None:
    wrong = misnamed_or_too_long(sources(*PACKAGES, "scripts", "benchmarks"))
    assert not wrong, "\n".join(wrong)


def test_long_and_misnamed_files_are_found() -> None:
    files = {
        "jaxinfer/a.py": "\n" * 401,
        "jaxinfer/utils.py": "",
        "sharding/x/base.py": "",
        "pallas_kernels/k.py": "\n" * 800,
    }
    assert len(misnamed_or_too_long(files)) == 3


def registry_entries(files: dict[str, ast.Module]) -> list[str]:
    """The "module:attribute" strings that are values of a dict literal."""
    values = (
        value
        for tree in files.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for value in node.values
    )
    texts = (value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))
    return sorted({text for text in texts if REGISTRY_ENTRY.fullmatch(text)})


def test_there_are_registries() -> None:
    assert any(entry.startswith("jaxinfer.models.") for entry in registry_entries(trees()))


@pytest.mark.parametrize("entry", registry_entries(trees()))
def test_registry_entry_exists(entry: str) -> None:
    module, _, attribute = entry.partition(":")
    assert hasattr(importlib.import_module(module), attribute)

"""The project's own papers: pins, packaging, and that what README.md tells people to type exists."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
PIN = re.compile(r"([a-z0-9][a-z0-9-]*)==([0-9][\w.+!]*)")

# Data may hold any text; a container file and the machine it builds may have any paths.
MAY_NAME_PATHS = re.compile(r"(^|/)(Dockerfile[^/]*|assets/.*|goldens/.*)$")
MACHINE_PATH = re.compile(r"(?<![\w.~$)}\]*-])/(?:work|tmp|root|home|Users|farm)/[\w.]")
REGISTRY_ADDRESS = re.compile(r"index-url|pypi\.org/simple|pythonhosted\.org|\"resolved\": *\"http|\bfile:///\w")


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, Version]:
    matches = (PIN.fullmatch(line) for line in constraint_lines())
    return {match[1]: Version(match[2]) for match in matches if match}


def requirements() -> Iterator[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    yield from (Requirement(line) for group in groups for line in group)


def test_constraints_pin_every_version_exactly_once() -> None:
    lines = constraint_lines()
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    assert lines == sorted(set(lines))
    assert len(pins()) == len(lines)


def test_constraints_cover_and_satisfy_every_requirement() -> None:
    pinned = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name != PROJECT["name"]:
            assert pinned[name] in requirement.specifier, f"{requirement} is not met by {name}=={pinned[name]}"


def test_constraints_cover_what_is_installed_with_the_project() -> None:
    """Walk the installed requirements, from the project's down: each has a pin."""
    pinned, pending, seen = pins(), [(PROJECT["name"], frozenset({"dev"}))], set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if any(requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in (*extras, "")):
                pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert sorted({name for name, _ in seen} - set(pinned) - {PROJECT["name"]}) == []


def test_versions_that_belong_together() -> None:
    pinned = pins()
    expected = {"jax": "0.11.2", "jaxlib": "0.11.2", "jax-triton": "0.3.1", "triton": "3.6.0", "grpcio-tools": "1.81.1"}
    assert {name: str(pinned[name]) for name in expected} == expected


def test_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version(PROJECT["name"]) == PROJECT["version"]
    packages = [ROOT / name for name in ("pallas_kernels", "sharding", "jaxinfer", "serving")]
    literal = re.compile(r"^__version__\s*=\s*[\"'](.+)[\"']", re.MULTILINE)
    found = {v for package in packages for file in package.rglob("*.py") for v in literal.findall(file.read_text())}
    assert found <= {PROJECT["version"]}


def project_files() -> list[str]:
    """Every file that is tracked, or would be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    skipped = {".venv", "build", "dist", ".git", ".hypothesis", ".pytest_cache", ".ruff_cache", "__pycache__"}
    files = (file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file())
    return [file.as_posix() for file in files if not skipped & set(file.parts)]


def addresses_of_one_machine(text: str) -> list[str]:
    return [
        f"line {number}: {line.strip()[:120]}"
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY_ADDRESS.search(line)
    ]


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    wrong = []
    for name in project_files():
        content = (ROOT / name).read_bytes()
        if b"\0" in content or MAY_NAME_PATHS.search(name) or (ROOT / name) == Path(__file__):
            continue
        wrong += [f"{name}: {found}" for found in addresses_of_one_machine(content.decode(errors="replace"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ("see /home/someone/notes.md", True),
        ('open("/tmp/x.json")', True),
        ("--extra-index-url=https://example.org", True),
        ("pip install -i https://pypi.org/simple x", True),
        ("~/.cache/jaxinfer", False),
        ("docs/work/plan.md, $HOME/tmp/x, https://example.org/home/page", False),
    ],
)
def test_addresses_are_found(text: str, is_wrong: bool) -> None:
    assert bool(addresses_of_one_machine(text)) is is_wrong


def code_in_readme(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shell_commands() -> list[list[str]]:
    lines = "\n".join(code_in_readme("sh")).replace("\\\n", " ").splitlines()
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]


def test_make_targets_in_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in shell_commands() if words[0] == "make"} | set(
        re.findall(r"`make ([a-z-]+)`", README)
    )
    assert {"demo", "test"} <= named <= targets


def test_cli_commands_in_readme_exist() -> None:
    named = {words[1] for words in shell_commands() if words[0].endswith("jaxinfer")}
    assert named
    program = "import sys; from serving.cli import main; sys.argv[0] = 'jaxinfer'; sys.exit(main())"
    for command in sorted(named):
        call = [sys.executable, "-c", program, command, "--help"]
        shown = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
        assert shown.returncode == 0, shown.stderr


def test_files_named_in_readme_exist() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_python_in_readme_imports_what_exists() -> None:
    blocks = code_in_readme("python")
    assert blocks
    for block in blocks:
        imports = [line for line in block.splitlines() if re.match(r"(from|import) ", line)]
        exec(compile("\n".join(imports), "README.md", "exec"), {})
        compile(block, "README.md", "exec")


def test_wheel_holds_the_packages_and_their_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"pallas_kernels", "sharding", "jaxinfer", "serving"}
    assert {f"{package}/py.typed" for package in tops} <= set(names)
    assert any(name.startswith("serving/protos/") and name.endswith(".proto") for name in names)
    data = [*(ROOT / "jaxinfer" / "assets").rglob("*.json"), *(ROOT / "jaxinfer" / "assets").rglob("*.safetensors")]
    assert {file.relative_to(ROOT).as_posix() for file in data} <= set(names)
    assert not [name for name in names if "__pycache__" in name]

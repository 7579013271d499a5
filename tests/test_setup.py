"""scripts/setup.sh with an interpreter that only pretends to install: which Python it takes, when it starts again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("sh", "cat", "cksum", "cp", "dirname", "mkdir", "rm", "sleep", "touch")

# Answers the version question by its exit status, prints its own path, makes "environments", records installations.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  -V) echo "Python {version}" ;;
  *"sys.exit(not"*) exit {unusable} ;;
  *_base_executable*) echo "$0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "made by $0" >>"$LOG" ;;
  "-m pip install "*) echo "installed $*" >>"$LOG"; exit "${{PIP_STATUS:-0}}" ;;
esac
"""
FAKE_UV = """#!/bin/sh
case "$*" in
  --version) echo "uv 0" ;;
  "python find "*) [ -e "$MANAGED" ] && echo "$MANAGED" ;;
  "python install "*) [ -n "${{UV_PYTHON:-}}" ] && cp "$UV_PYTHON" "$MANAGED" ;;
  "venv "*)
    for last; do :; done
    mkdir -p "$last/bin" && cp "$MANAGED" "$last/bin/python" && echo "made by uv" >>"$LOG" ;;
  "pip install "*) echo "installed by uv" >>"$LOG"; exit "${{UV_PIP_STATUS:-0}}" ;;
esac
"""


class Machine:
    """A copy of the set-up script in a folder of its own, a home, and a PATH that holds only what a test puts there."""

    def __init__(self, folder: Path):
        self.project = folder / "my project"  # with a space
        self.home, self.bin = folder / "home", folder / "bin"
        for path in (self.project / "scripts", self.home, self.bin):
            path.mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
            shutil.copy(ROOT / name, self.project / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.log_file = folder / "log"
        self.environment = {"PATH": str(self.bin), "HOME": str(self.home), "LOG": str(self.log_file)}
        self.environment["MANAGED"] = str(folder / "managed")

    def add(self, path: Path, version: str = "3.12.1", *, text: str = FAKE_PYTHON) -> Path:
        """An executable; a Python when `text` is not given."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unusable = int(not version.startswith(("3.12", "3.13", "3.14")))
        path.write_text(text.format(version=version, unusable=unusable))
        path.chmod(0o755)
        return path

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(self.project / "scripts" / "setup.sh")]
        env = self.environment | environment
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    def log(self) -> str:
        """What was done since this was last asked."""
        text = self.log_file.read_text() if self.log_file.exists() else ""
        self.log_file.unlink(missing_ok=True)
        return text


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_python_only_under_pyenv(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.11.7")
    machine.add(machine.home / ".pyenv/versions/3.11.7/bin/python", "3.11.7")
    wanted = machine.add(machine.home / ".pyenv/versions/3.13.0/bin/python", "3.13.0")
    assert machine.setup().returncode == 0
    assert f"made by {wanted}" in machine.log()


def test_named_python_comes_first(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12")
    named = machine.add(machine.home / "my python", "3.14.0")
    assert machine.setup(PYTHON=str(named)).returncode == 0
    assert f"made by {named}" in machine.log()


def test_unusable_named_python_is_reported(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12")
    old = machine.add(machine.home / "old", "3.9.1")
    done = machine.setup(PYTHON=str(old))
    assert done.returncode == 0
    assert f"PYTHON={old} is not a usable interpreter" in done.stderr


def test_no_python_says_what_was_looked_for(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.11.7")
    done = machine.setup()
    assert done.returncode == 1
    assert all(part in done.stderr for part in ("3.12", "Python 3.11.7", "PATH", "pyenv", "uv", "PYTHON="))
    assert not (machine.project / ".venv").exists()


def test_python_that_uv_has(machine: Machine) -> None:
    machine.add(machine.home / ".local/bin/uv", text=FAKE_UV)
    machine.add(Path(machine.environment["MANAGED"]))
    assert machine.setup().returncode == 0
    assert machine.log() == "made by uv\ninstalled by uv\ninstalled by uv\n"


def test_python_that_uv_brings(machine: Machine) -> None:
    machine.add(machine.bin / "uv", text=FAKE_UV)
    brought = machine.add(machine.home / "download")
    assert machine.setup(UV_PYTHON=str(brought)).returncode == 0
    assert "made by uv" in machine.log()


def test_uv_that_brings_none_is_reported(machine: Machine) -> None:
    machine.add(machine.bin / "uv", text=FAKE_UV)
    done = machine.setup()
    assert done.returncode == 1
    assert "could not install one" in done.stderr


def test_pip_installs_where_uv_cannot(machine: Machine) -> None:
    machine.add(machine.bin / "uv", text=FAKE_UV)
    machine.add(Path(machine.environment["MANAGED"]))
    assert machine.setup(UV_PIP_STATUS="2").returncode == 0
    assert "installed -m pip install" in machine.log()


def test_up_to_date_environment_is_left_alone(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12")
    assert machine.setup().returncode == 0
    log = machine.log()
    assert "made by" in log
    assert "--constraint constraints.txt" in log
    assert machine.setup().returncode == 0
    assert machine.log() == ""


def test_changed_pins_update_the_environment(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12")
    machine.setup()
    machine.log()
    with (machine.project / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert machine.setup().returncode == 0
    log = machine.log()
    assert "installed" in log
    assert "made by" not in log


def test_extras_are_kept(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12")
    assert machine.setup(EXTRAS="cuda13").returncode == 0
    assert "--editable .[dev,cuda13]" in machine.log()
    assert machine.setup().returncode == 0
    assert machine.log() == ""
    (machine.project / "pyproject.toml").write_text("")
    assert machine.setup().returncode == 0
    assert "--editable .[dev,cuda13]" in machine.log()


def test_unfinished_environment_is_made_anew(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12")
    assert machine.setup(PIP_STATUS="1").returncode != 0
    leftover = machine.project / ".venv" / "leftover"
    leftover.touch()
    machine.log()
    assert machine.setup().returncode == 0
    assert "made by" in machine.log()
    assert not leftover.exists()


def test_moved_environment_is_made_anew(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12")
    machine.setup()
    machine.log()
    machine.project = machine.project.rename(machine.project.with_name("elsewhere"))
    assert machine.setup().returncode == 0
    assert "made by" in machine.log()


def test_second_setup_waits_for_the_first(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12")
    machine.setup()
    machine.log()
    marker = machine.project / ".venv" / ".jaxinfer-unfinished"
    marker.write_text(str(os.getpid()))  # this process is alive, so somebody seems to be at work
    command = ["sh", str(machine.project / "scripts" / "setup.sh")]
    with subprocess.Popen(command, env=machine.environment, stderr=subprocess.PIPE, text=True) as second:
        assert second.stderr is not None
        assert "waiting" in second.stderr.readline()
        marker.unlink()
        assert second.wait(timeout=60) == 0
    assert machine.log() == ""

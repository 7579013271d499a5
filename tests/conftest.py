"""What every test gets: the CPU with eight virtual devices, a compilation cache below build/, hypothesis profiles.

Eight devices cost single-device programs nothing measurable (compile, dispatch, matmul and loop times are the same), so
sharded and unsharded tests share a process. The cache is one file per program under its own hash: workers and
subprocesses may share it, and an entry that an interrupted run left truncated is reported by jax and compiled again.
"""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / "build" / "test-cache"

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; subprocesses inherit it
os.environ["XDG_CACHE_HOME"] = str(CACHE)  # where an engine with default options keeps compiled programs

import hypothesis
import jax
import pytest
from hypothesis.database import DirectoryBasedExampleDatabase

from jaxinfer.config import default_compilation_cache
from jaxinfer.config import shipped_model as shipped_model_dir

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(default_compilation_cache()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

hypothesis.settings.register_profile(
    "local",
    deadline=None,  # the first example of a test compiles
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # the machine may be busy
    database=DirectoryBasedExampleDatabase(CACHE / "hypothesis"),
)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("local"), derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root directory."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """Directory of the model that ships with the project."""
    directory = shipped_model_dir()
    if not (directory / "config.json").is_file():
        pytest.fail(f"the shipped model is missing: no config.json in {directory} (scripts/train_tiny.py makes it)")
    return directory

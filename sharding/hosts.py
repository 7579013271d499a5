"""Which of how many hosts this process is, and where host 0 is: from flags, Slurm or Kubernetes. No jax.

Hides the variables of the launchers, what is contradictory among them, and the spelling of addresses.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SOURCES = ("auto", "none", "flags", "slurm", "kubernetes", "tpu")
MAX_HOSTS = 4096
DEFAULT_PORT = 8400  # of host 0, where the launcher names no port
FIRST_SLURM_PORT = 61_440  # ports that systems hand out last; steps of different jobs should differ


class HostsError(ValueError):
    """A group of hosts that cannot be; the message names the value and what would do."""


def _flag(default: Any, help_text: str, limits: tuple[float, float] | None = None, choices: Any = None) -> Any:
    return field(default=default, metadata={"help": help_text, "limits": limits, "choices": choices})


@dataclass(frozen=True)
class HostsConfig:
    """How the hosts that run one engine find each other. Flags are generated from these fields.

    `lost_after_s` ends at 15: noticing takes a fifth more, host 0's clients have 12 s to hear of it, and every process
    ends within 30 s.
    """

    hosts: str = _flag(
        "auto",
        "who says which host this is: auto (flags, else Slurm, Kubernetes or TPU metadata), none (this host is alone), "
        "flags (they alone), slurm, kubernetes, tpu",
        choices=SOURCES,
    )
    coordinator: str | None = _flag(None, "HOST:PORT where host 0 waits for the others")
    num_hosts: int | None = _flag(None, "hosts that run one engine together", (1, MAX_HOSTS))
    host_id: int | None = _flag(None, "number of this host, from 0; host 0 serves and prints", (0, MAX_HOSTS - 1))
    hosts_token_file: str | None = _flag(None, "file with a secret that every host must show (default: none is asked)")
    join_timeout_s: float = _flag(300.0, "longest wait for all hosts at the start, in seconds", (0.1, 86_400))
    lost_after_s: float = _flag(
        15.0, "seconds without a sign of life after which a host is lost, and the group ends", (1, 15)
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            _check_field(spec, getattr(self, spec.name))
        if self.coordinator is not None:
            split_address(self.coordinator)
        if self.num_hosts is not None and self.host_id is not None and self.host_id >= self.num_hosts:
            raise HostsError(f"--host-id {self.host_id} must be from 0 to {self.num_hosts - 1} (--num-hosts - 1)")
        given = self.given()
        if given and self.hosts == "none":
            raise HostsError(f"--hosts none contradicts {' and '.join(given)}: this host would be alone")

    def given(self) -> list[str]:
        """The flags that say where this host is, of those that were given."""
        return [f"--{name.replace('_', '-')}" for name in _PLACE_FIELDS if getattr(self, name) is not None]


_PLACE_FIELDS = ("coordinator", "num_hosts", "host_id")


def _check_field(spec: dataclasses.Field, value: Any) -> None:
    flag, limits, choices = "--" + spec.name.replace("_", "-"), spec.metadata["limits"], spec.metadata["choices"]
    if choices is not None and value not in choices:
        raise HostsError(f"{flag} {value!r} is not one of {', '.join(choices)}")
    if value is None and "None" in str(spec.type):
        return
    if limits is None:
        if not isinstance(value, str):
            raise HostsError(f"{flag} {value!r} must be of type {spec.type}")
        return
    kinds = int if "int" in str(spec.type) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not limits[0] <= value <= limits[1]:
        raise HostsError(f"{flag} {value!r} must be a number from {limits[0]:,} to {limits[1]:,}")


@dataclass(frozen=True)
class Place:
    """One host's place among the hosts of a group."""

    source: str  # who said so, for messages
    host: str  # name or address of host 0
    port: int
    num_hosts: int
    host_id: int
    local_device_ids: tuple[int, ...] | None = None  # of this process, where it shares its node's devices

    @property
    def is_leader(self) -> bool:
        return self.host_id == 0

    @property
    def coordinator(self) -> str:
        return join_address(self.host, self.port)


@dataclass(frozen=True)
class _Found:
    """What one launcher's variables say; the flags may say the rest."""

    source: str
    num_hosts: int
    host_id: int
    host: str
    port: int
    local_device_ids: tuple[int, ...] | None = None


def locate(
    config: HostsConfig, variables: Mapping[str, str], find_tpu: Callable[[], Place | None] = lambda: None
) -> Place | None:
    """This host's place, or None where it is alone.

    `variables`: the environment; `find_tpu` asks a TPU VM's metadata, is called last, and gives None where there is no
    TPU. Raises HostsError for flags that are half given, out of range, or contradict the launcher, and where the
    launcher that `config.hosts` names is not there.
    """
    if config.hosts == "none":
        return None
    if config.hosts == "tpu":
        if config.given():
            raise HostsError(f"--hosts tpu contradicts {' and '.join(config.given())}: --hosts flags takes flags alone")
        place = find_tpu()
        if place is None:
            raise HostsError("--hosts tpu: this host has no TPU whose metadata say which host it is")
        return _of_several(place)
    found = _launcher(config.hosts, variables)
    indexed = config.hosts == "kubernetes" and config.given() and _INDEX in variables
    if found is None and config.hosts in _WANTED and not indexed:
        raise HostsError(f"--hosts {config.hosts}: the environment lacks {_WANTED[config.hosts]}")
    if config.given():
        return _from_flags(config, found, variables)
    if found is None:
        if config.hosts == "flags":
            raise HostsError("--hosts flags needs --coordinator, --num-hosts and --host-id")
        return _of_several(find_tpu())
    if found.num_hosts == 1:
        return None
    return Place(found.source, found.host, found.port, found.num_hosts, found.host_id, found.local_device_ids)


def _of_several(place: Place | None) -> Place | None:
    return None if place is None or place.num_hosts == 1 else place


_INDEX = "JOB_COMPLETION_INDEX"
_WANTED = {
    "slurm": "SLURM_STEP_NUM_TASKS, SLURM_PROCID and SLURM_STEP_NODELIST (start the command with srun)",
    "kubernetes": "LWS_GROUP_SIZE, LWS_WORKER_INDEX and LWS_LEADER_ADDRESS (a LeaderWorkerSet sets them; in an indexed "
    "Job or a JobSet give --coordinator and --num-hosts)",
}


def _launcher(wanted: str, variables: Mapping[str, str]) -> _Found | None:
    """What the launcher says; HostsError where two of them disagree."""
    finders = {"slurm": _slurm, "kubernetes": _leader_worker_set}
    found = [
        place
        for source, finder in finders.items()
        if wanted in ("auto", source) and (place := finder(variables)) is not None
    ]
    several = [place for place in found if place.num_hosts > 1]
    for other in several[1:]:
        if (other.num_hosts, other.host_id) != (several[0].num_hosts, several[0].host_id):
            raise HostsError(
                f"{several[0].source} says host {several[0].host_id} of {several[0].num_hosts}, {other.source} says "
                f"host {other.host_id} of {other.num_hosts}; --hosts {' or '.join(finders)} chooses"
            )
    return several[0] if several else found[0] if found else None


def _from_flags(config: HostsConfig, found: _Found | None, variables: Mapping[str, str]) -> Place | None:
    """The flags' place; what they leave out comes from the launcher, what both say must agree."""
    if found is not None and found.num_hosts > 1:
        for name in ("num_hosts", "host_id"):
            given, said = getattr(config, name), getattr(found, name)
            if given is not None and given != said:
                raise HostsError(
                    f"--{name.replace('_', '-')} {given} contradicts {found.source}, which says {said}; leave the flag "
                    "out, or let --hosts flags take flags alone"
                )
    else:
        found = None
    num_hosts = config.num_hosts if config.num_hosts is not None or found is None else found.num_hosts
    host_id = config.host_id if config.host_id is not None or found is None else found.host_id
    if host_id is None and config.hosts in ("auto", "kubernetes") and _INDEX in variables:
        host_id = _number(variables, _INDEX, 0)
        if num_hosts is not None and host_id >= num_hosts:
            raise HostsError(f"{_INDEX}={host_id} must be from 0 to {num_hosts - 1} (--num-hosts - 1)")
    host, port = split_address(config.coordinator) if config.coordinator else (None, 0)
    if host is None and found is not None:
        host, port = found.host, found.port
    values = {"--coordinator": host, "--num-hosts": num_hosts, "--host-id": host_id}
    if num_hosts == 1 and host_id in (None, 0):
        return None
    missing = [flag for flag, value in values.items() if value is None]
    if host is None or num_hosts is None or host_id is None:
        raise HostsError(
            f"{' and '.join(config.given())} without {' and '.join(missing)}: --coordinator, --num-hosts and --host-id "
            "belong together, unless a launcher says the rest"
        )
    source = "flags" if found is None else found.source
    return Place(source, host, port, num_hosts, host_id, None if found is None else found.local_device_ids)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _slurm(variables: Mapping[str, str]) -> _Found | None:
    """A step that srun started; a batch script outside of srun has no list of the step's nodes."""
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    if not {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST", count} <= variables.keys():
        return None
    num_hosts = _number(variables, count, 1, MAX_HOSTS)
    host_id = _number(variables, "SLURM_PROCID", 0)
    if host_id >= num_hosts:
        raise HostsError(f"SLURM_PROCID={host_id} must be below {count}={num_hosts}")
    job, step = _number(variables, "SLURM_JOB_ID", 0), variables.get("SLURM_STEP_ID", "0")
    port = FIRST_SLURM_PORT + (job + (int(step) * 997 if step.isdecimal() else 0)) % (2**16 - FIRST_SLURM_PORT)
    host = first_slurm_node(variables["SLURM_STEP_NODELIST"])
    return _Found("Slurm", num_hosts, host_id, host, port, _slurm_devices(variables))


def _slurm_devices(variables: Mapping[str, str]) -> tuple[int, ...] | None:
    """One device per task where a node has several tasks that all see several devices; else whatever is visible."""
    tasks = variables.get("SLURM_STEP_TASKS_PER_NODE", variables.get("SLURM_TASKS_PER_NODE", "1"))
    if not re.search(r"(^|,)0*([2-9]|1\d)", tasks):  # "1(x4)": one on each of four nodes
        return None
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "," not in visible:
        return None  # Slurm bound each task to a device of its own
    return (_number(variables, "SLURM_LOCALID", 0),) if "SLURM_LOCALID" in variables else None


def first_slurm_node(nodes: str) -> str:
    """The first of a list as Slurm writes it: `rack[2-3,7]-n[01-04],other` -> `rack2-n01`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    name = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first is not None else ""
    if not name or re.search(r"[\[\]\s]", name):
        raise HostsError(f"SLURM_STEP_NODELIST={nodes!r} is no list of nodes")
    return name


def _leader_worker_set(variables: Mapping[str, str]) -> _Found | None:
    names = ("LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS")
    if not set(names) <= variables.keys():
        return None
    num_hosts, host_id = _number(variables, names[0], 1, MAX_HOSTS), _number(variables, names[1], 0)
    if host_id >= num_hosts:
        raise HostsError(f"{names[1]}={host_id} must be below {names[0]}={num_hosts}")
    address = variables[names[2]]
    try:
        host, port = split_address(join_address(address, DEFAULT_PORT))
    except HostsError as error:
        raise HostsError(f"{names[2]}={address!r} is no name or address of a host") from error
    return _Found("the LeaderWorkerSet", num_hosts, host_id, host, port)


def _number(variables: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    text = variables[name].strip()
    whole = text.isascii() and text.isdecimal()
    if most is not None and not (whole and least <= int(text) <= most):
        raise HostsError(f"{name}={text!r} must be a whole number from {least} to {most:,}")
    if not whole or int(text) < least:
        raise HostsError(f"{name}={text!r} must be a whole number of at least {least}")
    return int(text)


# ---- addresses -------------------------------------------------------------------------------------------------------


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` -> (host, port); HostsError where it is neither."""
    match = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^:\[\]\s]+)):(\d{1,5})", address)
    if match is None or not 1 <= int(match[3]) <= 65_535:
        raise HostsError(f"--coordinator {address!r} is not HOST:PORT, with a port from 1 to 65535")
    return match[1] or match[2], int(match[3])


def join_address(host: str, port: int) -> str:
    """(host, port) -> `host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

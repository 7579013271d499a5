"""Several processes over one mesh: which of them this one is, and how they come together.

Hides jax's own coordination service, which would end a process its own way when a peer dies, and TPU metadata.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sharding.control import HostLostError, Kind, Message
from sharding.group import Group, wait_for
from sharding.hosts import DEFAULT_PORT, HostsConfig, HostsError, Place, join_address, locate, split_address
from sharding.rendezvous import gather

MAX_TOKEN_BYTES = 4096
JAX_SILENCE_S = 100  # after which jax's own service counts a host as dead: far behind ours
JAX_SHUTDOWN_S = 10


def find(config: HostsConfig) -> Place | None:
    """This process's place among the hosts, from the flags, the environment or a TPU VM's metadata; None: alone.

    Raises HostsError, which names what contradicts what.
    """
    return locate(config, os.environ, _tpu_place)


def join(
    config: HostsConfig,
    place: Place | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Group | None:
    """Meet the other hosts, agree with them on `facts` (JSON), and start jax over all of their devices.

    Call it before anything else of jax; `place` defaults to `find(config)`. None: this host is alone. Raises HostsError
    (who did not come in time, who has other facts, why this host is refused) or HostLostError.
    """
    place = find(config) if place is None else place
    if place is None:
        return None
    gathered = gather(place, token=_token(config.hosts_token_file), timeout_s=config.join_timeout_s, say=say)
    group = Group(place, gathered.links, lost_after_s=config.lost_after_s)
    try:
        group.agree({**(facts or {}), "lost_after_s": config.lost_after_s})  # it sets how often a host is to be heard
        _start_jax(group, place, gathered.jax_port, gathered.bind, config.join_timeout_s)
    except BaseException as error:
        group.fail(f"it could not join: {error}")
        group.close(0)
        raise
    return group


# ---- jax -------------------------------------------------------------------------------------------------------------


def _start_jax(group: Group, place: Place, port: int, bind: str, timeout_s: float) -> None:
    """`jax.distributed.initialize`, in a thread: it cannot be interrupted, and a host may be lost meanwhile."""
    import jax

    if jax.distributed.is_initialized():
        raise HostsError("jax.distributed is initialized already; leave that to this")
    with contextlib.suppress(AttributeError):  # its handler would take SIGTERM from whoever drains
        jax.config.update("jax_enable_preemption_service", False)
    _delay_aborts()
    done, errors = threading.Event(), []

    def start() -> None:
        try:
            jax.distributed.initialize(
                join_address(place.host, port),
                place.num_hosts,
                place.host_id,
                list(place.local_device_ids) if place.local_device_ids is not None else None,
                cluster_detection_method="deactivate",
                initialization_timeout=round(timeout_s) + 60,
                heartbeat_timeout_seconds=JAX_SILENCE_S,
                shutdown_timeout_seconds=JAX_SHUTDOWN_S,
                coordinator_bind_address=join_address(bind or "::", port),
            )
        except Exception as error:
            errors.append(error)
        done.set()

    threading.Thread(target=start, name="jaxinfer-join", daemon=True).start()
    if not wait_for(done, group, timeout_s):
        raise HostsError(f"jax on {place.num_hosts} hosts did not start within {timeout_s:g} s (--join-timeout-s)")
    if errors:
        raise errors[0]


def _delay_aborts() -> None:
    """Let SIGABRT kill this process six seconds later than it would.

    When host 0 dies, jax's service aborts the other processes from C++, whatever Python has to say. So the aborting
    thread sleeps first, and the others see that host 0 is gone, say so and exit. The handler is C's own `sleep`: it may
    be called from a signal handler (POSIX), and its argument, SIGABRT, is 6.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


# ---- who says so -----------------------------------------------------------------------------------------------------


def _token(path: str | None) -> bytes:
    if path is None:
        return b""
    try:
        with open(path, "rb") as file:
            token = file.read(MAX_TOKEN_BYTES + 1).strip()
    except OSError as error:
        raise HostsError(f"--hosts-token-file {path!r} cannot be read: {error.strerror}") from error
    if not 16 <= len(token) <= MAX_TOKEN_BYTES:
        raise HostsError(f"--hosts-token-file {path!r} has {len(token)} bytes; 16 to {MAX_TOKEN_BYTES} will do")
    return token


def _tpu_place() -> Place | None:
    """Where a TPU VM's metadata, or GKE's variables, say that this host is; None, at no cost, without a TPU."""
    if not _has_tpu():
        return None
    from jax._src import clusters  # no public way says which host this is before all have met

    try:
        for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
            if not cluster.is_env_present():
                continue
            num_hosts = cluster.get_process_count()
            if num_hosts == 1:
                return Place("TPU metadata", "localhost", DEFAULT_PORT, 1, 0)
            address = cluster.get_coordinator_address(timeout_secs=60, override_coordinator_port=None)
            host, port = split_address(address)
            return Place("TPU metadata", host, port, num_hosts, cluster.get_process_id())
    except Exception as error:  # of the network, or metadata that jax does not know
        raise HostsError(
            f"the TPU's metadata do not say which host this is ({error}); --hosts none makes this host alone, "
            "--coordinator, --num-hosts and --host-id say it"
        ) from error
    return None


def _has_tpu() -> bool:
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


__all__ = [
    "Group",
    "HostLostError",
    "HostsConfig",
    "HostsError",
    "Kind",
    "Message",
    "Place",
    "find",
    "join",
]

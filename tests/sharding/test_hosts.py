"""Where a host is among the hosts: flags, launchers' variables, and what is refused about them, word for word."""

from __future__ import annotations

from typing import Any

import pytest

from sharding.hosts import DEFAULT_PORT, HostsConfig, HostsError, Place, first_slurm_node, locate, split_address

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "8",  # of the job, not of the step
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "tiny-0.tiny.default"}
FLAGS = {"coordinator": "10.0.0.1:7000", "num_hosts": 2, "host_id": 1}


def where(flags: dict[str, Any], variables: dict[str, str], tpu: Place | None = None) -> Place | None:
    return locate(HostsConfig(**flags), variables, lambda: tpu)


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        ({}, {}),
        ({"hosts": "none"}, SLURM),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}),
        ({}, {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}),  # a batch script
        ({}, {**LWS, "LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}),
        ({"num_hosts": 1}, {}),
        ({"num_hosts": 1, "host_id": 0, "coordinator": "a:1"}, {}),
        ({}, {"JOB_COMPLETION_INDEX": "3"}),  # one of many jobs that have nothing to do with each other
    ],
)
def test_a_lone_host(flags: dict[str, Any], variables: dict[str, str]) -> None:
    assert where(flags, variables) is None


@pytest.mark.parametrize(
    ("flags", "variables", "place"),
    [
        (FLAGS, {}, Place("flags", "10.0.0.1", 7000, 2, 1)),
        ({**FLAGS, "coordinator": "[fd00::1]:7000"}, {}, Place("flags", "fd00::1", 7000, 2, 1)),
        ({**FLAGS, "hosts": "flags"}, SLURM, Place("flags", "10.0.0.1", 7000, 2, 1)),
        ({}, SLURM, Place("Slurm", "gpu07", 62674, 4, 2)),
        ({"coordinator": "a:1"}, SLURM, Place("Slurm", "a", 1, 4, 2)),
        ({"num_hosts": 4, "host_id": 2, "coordinator": "a:1"}, SLURM, Place("Slurm", "a", 1, 4, 2)),
        ({}, LWS, Place("the LeaderWorkerSet", "tiny-0.tiny.default", DEFAULT_PORT, 2, 1)),
        ({"hosts": "kubernetes"}, {**SLURM, **LWS}, Place("the LeaderWorkerSet", "tiny-0.tiny.default", 8400, 2, 1)),
        (
            {"coordinator": "job-0.svc:1", "num_hosts": 3, "hosts": "kubernetes"},
            {"JOB_COMPLETION_INDEX": "2"},
            Place("flags", "job-0.svc", 1, 3, 2),
        ),
        (FLAGS, {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place("flags", "10.0.0.1", 7000, 2, 1)),
    ],
)
def test_a_place_among_several(flags: dict[str, Any], variables: dict[str, str], place: Place) -> None:
    assert where(flags, variables) == place


def test_tpu_metadata_are_asked_last() -> None:
    tpu = Place("TPU metadata", "10.0.0.9", 8482, 4, 3)
    assert where({}, {}, tpu) == tpu == where({"hosts": "tpu"}, LWS, tpu)
    assert where({}, LWS, tpu) != tpu and where({"hosts": "none"}, {}, tpu) is None
    alone = Place("TPU metadata", "localhost", DEFAULT_PORT, 1, 0)
    assert where({}, {}, alone) is None and where({"hosts": "tpu"}, {}, alone) is None


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ({"host_id": 1}, {}, "--host-id without --coordinator and --num-hosts: "),
        ({"coordinator": "a:1", "num_hosts": 2}, {}, "--coordinator and --num-hosts without --host-id: "),
        ({"hosts": "flags"}, SLURM, "--hosts flags needs --coordinator, --num-hosts and --host-id"),
        ({"hosts": "none", "host_id": 0}, {}, "--hosts none contradicts --host-id"),
        ({"hosts": "tpu", "host_id": 0}, {}, "--hosts tpu contradicts --host-id"),
        ({"hosts": "pods"}, {}, "--hosts 'pods' is not one of auto, none, flags, slurm, kubernetes, tpu"),
        ({"hosts": "slurm"}, LWS, "--hosts slurm: the environment lacks SLURM_STEP_NUM_TASKS"),
        ({"hosts": "kubernetes"}, SLURM, "--hosts kubernetes: the environment lacks LWS_GROUP_SIZE"),
        ({**FLAGS, "hosts": "slurm"}, {}, "--hosts slurm: the environment lacks SLURM_STEP_NUM_TASKS"),
        ({**FLAGS, "hosts": "kubernetes"}, {}, "--hosts kubernetes: the environment lacks LWS_GROUP_SIZE"),
        ({"hosts": "tpu"}, SLURM, "--hosts tpu: this host has no TPU whose metadata say which host it is"),
        ({**FLAGS, "host_id": 2}, {}, "--host-id 2 must be from 0 to 1"),
        ({**FLAGS, "host_id": -1}, {}, "--host-id -1 must be a number from 0 to 4,095"),
        ({**FLAGS, "num_hosts": 0}, {}, "--num-hosts 0 must be a number from 1 to 4,096"),
        ({**FLAGS, "num_hosts": 2.5}, {}, "--num-hosts 2.5 must be a number"),
        ({**FLAGS, "coordinator": "10.0.0.1"}, {}, "--coordinator '10.0.0.1' is not HOST:PORT"),
        ({**FLAGS, "coordinator": "fd00::1:7000"}, {}, "--coordinator 'fd00::1:7000' is not HOST:PORT"),
        ({**FLAGS, "coordinator": "a:70000"}, {}, "--coordinator 'a:70000' is not HOST:PORT"),
        ({"lost_after_s": 60.0}, {}, "--lost-after-s 60.0 must be a number from 1 to 15"),
        ({"join_timeout_s": float("nan")}, {}, "--join-timeout-s nan must be a number"),
        (FLAGS, SLURM, "--num-hosts 2 contradicts Slurm, which says 4"),
        ({"host_id": 0}, SLURM, "--host-id 0 contradicts Slurm, which says 2"),
        ({"host_id": 0}, LWS, "--host-id 0 contradicts the LeaderWorkerSet, which says 1"),
        ({}, {**SLURM, **LWS}, "Slurm says host 2 of 4, the LeaderWorkerSet says host 1 of 2; --hosts slurm or kuber"),
        ({}, {**SLURM, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 must be below SLURM_STEP_NUM_TASKS=4"),
        ({}, {**SLURM, "SLURM_PROCID": "-1"}, "SLURM_PROCID='-1' must be a whole number of at least 0"),
        ({}, {**LWS, "LWS_GROUP_SIZE": "two"}, "LWS_GROUP_SIZE='two' must be a whole number from 1 to 4,096"),
        (
            {},
            {**LWS, "LWS_GROUP_SIZE": "9" * 12},
            "LWS_GROUP_SIZE='999999999999' must be a whole number from 1 to 4,096",
        ),
        ({}, {**LWS, "LWS_LEADER_ADDRESS": ""}, "LWS_LEADER_ADDRESS='' is no name or address of a host"),
        ({}, {**LWS, "LWS_LEADER_ADDRESS": "a b"}, "LWS_LEADER_ADDRESS='a b' is no name or address of a host"),
        ({}, {**SLURM, "SLURM_STEP_NODELIST": "["}, "SLURM_STEP_NODELIST='[' is no list of nodes"),
        (
            {"coordinator": "a:1", "num_hosts": 2},
            {"JOB_COMPLETION_INDEX": "2"},
            "JOB_COMPLETION_INDEX=2 must be from 0",
        ),
    ],
)
def test_what_is_refused(flags: dict[str, Any], variables: dict[str, str], message: str) -> None:
    with pytest.raises(HostsError) as caught:
        where(flags, variables)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-015],host2", "node001"),
        ("node[7,9-12]", "node7"),
        ("rack[2-3,7]-n[01-04],other", "rack2-n01"),
        ("a-b.c[10-11].d", "a-b.c10.d"),
    ],
)
def test_the_first_node_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_slurm_node(nodes) == first


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_LOCALID": "1"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_LOCALID": "3"}, (3,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "2", "SLURM_LOCALID": "2"}, None),
    ],
)
def test_tasks_on_one_node_share_its_devices(variables: dict[str, str], devices: tuple[int, ...] | None) -> None:
    place = where({}, {**SLURM, **variables})
    assert place is not None and place.local_device_ids == devices


def test_steps_of_a_job_have_ports_of_their_own() -> None:
    ports = {where({}, {**SLURM, "SLURM_STEP_ID": str(step)}).port for step in range(20)}
    assert len(ports) == 20 and all(61_440 <= port < 65_536 for port in ports)


def test_addresses() -> None:
    assert split_address("a.b:1") == ("a.b", 1) and split_address("[::1]:65535") == ("::1", 65535)

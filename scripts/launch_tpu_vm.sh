#!/bin/sh
# Rents a TPU slice on Google Cloud, installs this project on its VMs and starts the server there.
#
#   scripts/launch_tpu_vm.sh NAME --device v6e:2x4 --zone us-east5-b [--model DIR] [options] [-- flags of jaxinfer serve]
#
#   NAME                  of the VM, the group of VMs, or the queued resource
#   --device TPU:TOPOLOGY v6e:1x1, 2x2, 2x4 and v5p:2x2x1 are one VM (`gcloud compute instances create`);
#                         v6e:4x4 and up, v5p:2x2x2 and up are a slice of several (a managed instance group);
#                         v5e:1x1 to 16x16 is a queued resource, Google's older way; tpu7x is for GKE only: see deploy/
#   --zone ZONE
#   --project PROJECT     (default: gcloud's own; a slice of several v6e or v5p VMs needs it)
#   --model DIR           a directory in the VMs' home, or gs://BUCKET/DIR, which each of them copies first
#                         (default: the model that ships with jaxinfer)
#   --mesh AXES           as in tensor=8 (default: one chip; a slice of several VMs needs all)
#   --replicas N          whole engines, on chips of their own; one VM only (default 1)
#   --provisioning KIND   on-demand (the default), spot or flex-start
#   --max-run TIME        delete the VM after this long, as in 4h; flex-start needs it
#   --port N              of the server, on the loopback interface of the first VM (default 50051)
#   --disk-gb N           size of the boot disk: room for the model (default 200)
#   --delete              delete what NAME, --device and --zone describe, and do nothing else
#   --dry-run             print every command, and run none
#   --help
#
# What is rented costs money until it is deleted. No secret is passed: gcloud's own login and the VM's service account do.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
program=launch_tpu_vm.sh
dry_run=no
# shellcheck source=scripts/launch_common.sh
. "$root/scripts/launch_common.sh"

name="" device="" zone="" project="" model="" mesh="" replicas=1 provisioning=on-demand max_run="" port=50051 disk_gb=200
delete=no
image_family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
image_project=ubuntu-os-accelerator-images
v5e_runtime=v2-alpha-tpuv5-lite
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
coordinator_port=8400
try_every_s=20 tries=90 # for capacity and for VMs to boot: half an hour

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage "$0"; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --delete) delete=yes ;;
    --) shift; break ;;
    --*=*)
      option=${1%%=*} value=${1#*=}
      shift
      set -- "$option" "$value" "$@"
      continue
      ;;
    --device | --zone | --project | --model | --mesh | --replicas | --provisioning | --max-run | --port | --disk-gb)
      needs_value "$@"
      case $1 in
        --device) device=$2 ;;
        --zone) zone=$2 ;;
        --project) project=$2 ;;
        --model) model=$2 ;;
        --mesh) mesh=$2 ;;
        --replicas) replicas=$2 ;;
        --provisioning) provisioning=$2 ;;
        --max-run) max_run=$2 ;;
        --port) port=$2 ;;
        --disk-gb) disk_gb=$2 ;;
      esac
      shift
      ;;
    -*) die "unknown option '$1' (--help lists them; flags of jaxinfer serve come after --)" ;;
    *)
      [ -z "$name" ] || die "unknown argument '$1': NAME is '$name' already"
      name=$1
      ;;
  esac
  shift
done

# ---- what to rent ----

[ -n "$name" ] || die "NAME is missing (--help shows how to call this)"
matches NAME "$name" '[a-z]([-a-z0-9]{0,50}[a-z0-9])?' "lower-case letters, digits and dashes, beginning with a letter"
[ -n "$device" ] || die "--device is missing: TPU:TOPOLOGY, as in v6e:2x4"
[ -n "$zone" ] || die "--zone is missing, as in us-east5-b"
matches --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, as in us-east5-b"
[ -z "$project" ] || matches --project "$project" '[a-z][-a-z0-9.:]*' "the id of a project"
one_of --provisioning "$provisioning" on-demand spot flex-start
[ -z "$max_run" ] || matches --max-run "$max_run" '([0-9]+[smhd])+' "a time, as in 4h or 1h30m"
whole_number --port "$port" 1 65535
whole_number --disk-gb "$disk_gb" 50 65536
check_mesh "$mesh" "$replicas"
case $model in
  gs://*) matches --model "$model" 'gs://[a-z0-9][-a-z0-9._]*/[A-Za-z0-9._/-]+' "gs://BUCKET/DIR, in plain letters" ;;
  *) [ -z "$model" ] || matches --model "$model" '[A-Za-z0-9._/-]+' "a directory on the VMs, in plain letters" ;;
esac

tpu=${device%%:*} topology=${device#*:}
[ "$tpu" != "$device" ] || die "--device '$device' has no topology: TPU:TOPOLOGY, as in v6e:2x4"
case $tpu in
  v6e) machine=ct6e-standard-4t topologies="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" ;;
  v5p) machine=ct5p-hightpu-4t topologies="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16" ;;
  v5e) machine="" topologies="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" ;;
  v7x | tpu7x | ironwood)
    die "--device $device: tpu7x is reached through GKE; edit deploy/leaderworkerset-tpu.yaml and" \
      "use scripts/launch_kubernetes.sh. Here: v6e, v5p, v5e"
    ;;
  *) die "--device $device: '$tpu' is none of: v6e v5p v5e" ;;
esac
# shellcheck disable=SC2086 # one word per choice
one_of "--device $tpu:" "$topology" $topologies
chips=$(($(printf '%s' "$topology" | sed 's/x/*/g')))
case $topology in
  1x1) hosts=1 machine=${machine:+ct6e-standard-1t} ;;
  2x4) hosts=1 machine=${machine:+ct6e-standard-8t} ;;
  *) hosts=$((chips / 4)) ;;
esac
[ "$replicas" = 1 ] || [ "$hosts" = 1 ] \
  || die "--replicas $replicas: $device is $hosts VMs, which serve one replica together; rent a slice per replica"
[ -n "$project" ] || [ "$hosts" = 1 ] || [ "$tpu" = v5e ] \
  || die "--project is missing: $device is $hosts VMs, whose group names its workload policy with the project"
[ "$delete" = yes ] || needs_devices "$mesh" "$replicas" "$chips" "$hosts" "$device"
if [ "$provisioning" = flex-start ]; then
  [ "$hosts" = 1 ] && [ "$tpu" != v5e ] || die "--provisioning flex-start: only for one VM of v6e or v5p, not $device"
  [ -n "$max_run" ] || die "--provisioning flex-start needs --max-run, as in 4h"
fi
[ -z "$max_run" ] || [ "$tpu" != v5e ] || die "--max-run $max_run: a queued resource of v5e has no such limit"

# gcloud_at COMMAND...: run, in the project and the zone.
gcloud_at() {
  [ -z "$project" ] || set -- "$@" "--project=$project"
  run gcloud "$@" "--zone=$zone"
}

# gcloud_in_region COMMAND...
gcloud_in_region() {
  [ -z "$project" ] || set -- "$@" "--project=$project"
  run gcloud "$@" "--region=${zone%-*}"
}

model_source=""
case $model in
  gs://*) model_source=${model%/} model=models/$(basename "$model") ;;
esac
# The server's arguments are for a shell on the VM, which runs in the home directory.
[ "$replicas" = 1 ] || set -- --replicas "$replicas" "$@"
[ -z "$mesh" ] || set -- --mesh "$mesh" "$@"
set -- serve ${model:+"$model"} --port "$port" "$@"
serve=$(quoted "$@")

# ---- renting ----

scheduling() { # flags of an instance or of an instance template
  printf '%s\n' --maintenance-policy=TERMINATE # TPU VMs cannot be moved while they run
  case $provisioning in
    spot) printf '%s\n' --provisioning-model=SPOT ;;
    flex-start) printf '%s\n' --provisioning-model=FLEX_START --request-valid-for-duration=2h ;;
  esac
  [ -z "$max_run" ] || printf '%s\n' "--max-run-duration=$max_run"
  [ -z "$max_run" ] && [ "$provisioning" != spot ] || printf '%s\n' --instance-termination-action=DELETE
}

create_vm() {
  # shellcheck disable=SC2046 # one word per flag
  gcloud_at compute instances create "$name" "--machine-type=$machine" "--image-project=$image_project" \
    "--image-family=$image_family" "--boot-disk-size=${disk_gb}GB" $(scheduling)
}

# The VMs of a slice are wired to each other only if their group has a workload policy with the slice's topology.
create_slice() {
  policy="$name-policy" template="$name-template"
  gcloud_in_region compute resource-policies create workload-policy "$policy" --type=HIGH_THROUGHPUT \
    "--accelerator-topology=$topology"
  # shellcheck disable=SC2046
  run gcloud compute instance-templates create "$template" ${project:+"--project=$project"} "--machine-type=$machine" \
    "--image-project=$image_project" "--image-family=$image_family" "--boot-disk-size=${disk_gb}GB" $(scheduling)
  gcloud_at compute instance-groups managed create "$name" "--template=$template" "--size=$hosts" \
    --default-action-on-vm-failure=do-nothing \
    "--workload-policy=projects/$project/regions/${zone%-*}/resourcePolicies/$policy"
  gcloud_at compute instance-groups managed wait-until "$name" --stable "--timeout=$((try_every_s * tries))"
}

create_queued() {
  accelerator=v5litepod-$chips
  set -- compute tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$accelerator" \
    "--runtime-version=$v5e_runtime"
  [ "$provisioning" != spot ] || set -- "$@" --spot
  gcloud_at "$@"
  until_true "the queued resource is ACTIVE" queued_is_active
}

queued_is_active() {
  state=$(gcloud_at compute tpus queued-resources describe "$name" '--format=value(state.state)')
  [ "$dry_run" = no ] || printf '%s\n' "$state"
  case $state in
    FAILED | SUSPENDED) die "the queued resource $name is $state" ;;
  esac
  [ "$state" = ACTIVE ] || [ "$dry_run" = yes ]
}

# until_true WHAT COMMAND...: again and again, until it succeeds.
until_true() {
  what=$1 tried=0
  shift
  [ "$dry_run" = no ] || printf '# until %s (at most %s tries, %s s apart):\n' "$what" "$tries" "$try_every_s"
  until "$@"; do
    tried=$((tried + 1))
    [ "$tried" -lt "$tries" ] || die "given up after $tries tries: $what"
    sleep "$try_every_s"
  done
}

delete_all() {
  if [ "$tpu" = v5e ]; then
    gcloud_at compute tpus queued-resources delete "$name" --force --quiet
  elif [ "$hosts" = 1 ]; then
    gcloud_at compute instances delete "$name" --quiet
  else
    gcloud_at compute instance-groups managed delete "$name" --quiet
    run gcloud compute instance-templates delete "$name-template" ${project:+"--project=$project"} --quiet
    gcloud_in_region compute resource-policies delete "$name-policy" --quiet
  fi
}

# ---- installing and starting ----

vms() { # names, one a line; a dry run has a placeholder for those of a group
  if [ "$tpu" = v5e ] || [ "$hosts" = 1 ]; then
    printf '%s\n' "$name"
  elif [ "$dry_run" = yes ]; then
    printf '%s-XXXX\n' "$name"
  else
    gcloud_at compute instance-groups managed list-instances "$name" '--format=value(NAME)'
  fi
}

on_vm() { # on_vm NAME COMMAND; a queued resource is one name for all its VMs
  if [ "$tpu" = v5e ]; then
    gcloud_at compute tpus tpu-vm ssh "$1" --worker=all "--command=$2"
  else
    gcloud_at compute ssh "$1" "--command=$2"
  fi
}

to_vm() { # to_vm NAME FILE
  if [ "$tpu" = v5e ]; then
    gcloud_at compute tpus tpu-vm scp "$2" "$1:" --worker=all
  else
    gcloud_at compute scp "$2" "$1:"
  fi
}

# Ubuntu 22.04 has no Python 3.12: uv, in an environment of its own, brings one.
install_command() {
  cat <<'EOF'
set -eu
sudo apt-get update -qq
sudo apt-get install -qq -y make python3-venv
[ -x uv/bin/uv ] || { python3 -m venv uv && uv/bin/pip install -q uv; }
rm -rf jaxinfer && mkdir jaxinfer && tar -xzf jaxinfer.tgz -C jaxinfer
PATH=$HOME/uv/bin:$PATH make -C jaxinfer setup EXTRAS=tpu
EOF
}

# The unit's limits are what libtpu wants for memory that chips read directly.
start_command() { # start_command FLAGS: those of jaxinfer serve that differ between VMs
  printf 'set -eu\n'
  [ -z "$model_source" ] || printf 'mkdir -p %s && gcloud storage rsync --recursive %s %s\n' "$model" "$model_source" "$model"
  cat <<EOF
sudo systemctl stop jaxinfer 2>/dev/null || true
sudo systemd-run --unit=jaxinfer --uid="\$(id -u)" --working-directory="\$HOME" --setenv=HOME="\$HOME" \\
  --property=LimitMEMLOCK=infinity --property=LimitNOFILE=65536 --property=TimeoutStopSec=60 \\
  "\$HOME/jaxinfer/.venv/bin/jaxinfer" $serve${1:+ $1}
EOF
}

if [ "$delete" = yes ]; then
  delete_all
  exit
fi
[ "$dry_run" = yes ] || command -v gcloud >/dev/null || die "gcloud is not on PATH: install the Google Cloud CLI, or use --dry-run"

archive=$root/build/launch/jaxinfer.tgz
run mkdir -p "$root/build/launch"
run tar -czf "$archive" -C "$root" --exclude=__pycache__ Makefile README.md LICENSE NOTICE pyproject.toml constraints.txt \
  scripts pallas_kernels sharding jaxinfer serving

if [ "$tpu" = v5e ]; then
  create_queued
elif [ "$hosts" = 1 ]; then
  create_vm
else
  create_slice
fi
prepare() {
  until_true "$1 answers" on_vm "$1" true
  to_vm "$1" "$archive"
  on_vm "$1" "$(install_command)"
}

# A slice knows the numbers of its VMs: host 0 of ours shall be number 0 of the slice. They reach each other by name. (The
# VMs of a queued resource find each other by their metadata, which have addresses; those of a group have none.)
exec 3>&1
number_of() {
  number=$(on_vm "$1" "curl -sf -H Metadata-Flavor:Google $metadata/agent-worker-number")
  if [ "$dry_run" = yes ]; then
    printf '%s\n' "$number" >&3
    printf NUMBER
    return
  fi
  whole_number "worker number of $1:" "$number" 0 "$((hosts - 1))"
  printf '%s' "$number"
}

start() { # start NAME; $numbers has a line "NAME NUMBER" for each VM of a group
  number=$(printf '%s\n' "$numbers" | sed -n "s/^$1 //p")
  on_vm "$1" "$(start_command "${number:+--coordinator $first:$coordinator_port --num-hosts $hosts --host-id $number}")"
}

# on_all COMMAND: with each VM's name, on all of them at once.
on_all() {
  processes=""
  for vm in $all_vms; do
    if [ "$dry_run" = yes ]; then "$1" "$vm"; else
      "$1" "$vm" &
      processes="$processes $!"
    fi
  done
  for process in $processes; do
    wait "$process" || die "a VM could not be prepared (see above); what was rented is still there"
  done
}

all_vms=$(vms)
if [ "$dry_run" = yes ] && [ "$hosts" -gt 1 ] && [ "$tpu" != v5e ]; then
  printf '# on each of the %s VMs of the group:\n' "$hosts"
  printf '# (%s is its name, NUMBER its agent-worker-number, 0 to %s; ' "$all_vms" "$((hosts - 1))"
  printf '%s is the name of number 0)\n' "$name-FIRST"
fi
on_all prepare
numbers="" first=$(printf '%s\n' "$all_vms" | head -n 1)
if [ "$hosts" -gt 1 ] && [ "$tpu" != v5e ]; then
  for vm in $all_vms; do
    number=$(number_of "$vm")
    [ "$number" != 0 ] || first=$vm
    numbers="$numbers
$vm $number"
  done
  [ "$dry_run" = yes ] || [ "$(printf '%s\n' "$numbers" | sed 's/.* //' | sort -u | grep -c .)" = "$hosts" ] \
    || die "the VMs' worker numbers are not 0 to $((hosts - 1)):$(printf '%s' "$numbers" | tr '\n' ';')"
  [ "$dry_run" = no ] || first=$name-FIRST
fi
on_all start

ssh="compute ssh"
[ "$tpu" != v5e ] || ssh="compute tpus tpu-vm ssh --worker=0"
where="--zone=$zone${project:+ --project=$project}"
say "logs:   gcloud $ssh $first $where --command='journalctl -u jaxinfer -f'"
say "reach:  gcloud $ssh $first $where -- -N -L $port:127.0.0.1:$port"
say "delete: scripts/$program $name --device $device $where --delete"

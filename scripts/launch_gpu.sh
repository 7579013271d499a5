#!/bin/sh
# Serves a model on this GPU host: one process for all of its GPUs, from the repository's .venv or in a container.
#
#   scripts/launch_gpu.sh [--model DIR] [--mesh tensor=8] [--replicas N] [options] [-- flags of jaxinfer serve]
#
#   --model DIR        model directory on this host (default: the model that ships with jaxinfer)
#   --mesh AXES        how one replica is spread over GPUs, as in tensor=4,context=2 (default: one GPU)
#   --replicas N       whole engines, on GPUs of their own (default 1)
#   --gpus LIST        all (the default), or indices such as 0,1,2,3
#   --port N           port on this host's loopback interface (default 50051)
#   --runtime KIND     venv (the default: made, or brought up to date, first) or docker
#   --extra NAME       cuda13 (the default) or cuda12: which CUDA packages
#   --image NAME       docker: the image (default jaxinfer:EXTRA)
#   --build            docker: build the image first, from deploy/Dockerfile
#   --coordinator H:P  with --num-hosts N and --host-id I, this host is number I of N that serve one model together:
#                      the same command on each of them, but for the number; H:P is an address of host 0
#   --dry-run          print what would be run, and run nothing
#   --help
#
# The server has neither TLS nor authentication: its port is on 127.0.0.1; use `ssh -L 50051:127.0.0.1:50051 HOST`.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
program=launch_gpu.sh
dry_run=no
# shellcheck source=scripts/launch_common.sh
. "$root/scripts/launch_common.sh"

model="" mesh="" replicas=1 gpus=all port=50051 runtime=venv extra=cuda13 image="" build=no
coordinator="" num_hosts="" host_id=""

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage "$0"; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --build) build=yes ;;
    --) shift; break ;;
    --*=*)
      option=${1%%=*} value=${1#*=}
      shift
      set -- "$option" "$value" "$@"
      continue
      ;;
    --model | --mesh | --replicas | --gpus | --port | --runtime | --extra | --image | --coordinator | --num-hosts | \
      --host-id)
      needs_value "$@"
      case $1 in
        --model) model=$2 ;;
        --mesh) mesh=$2 ;;
        --replicas) replicas=$2 ;;
        --gpus) gpus=$2 ;;
        --port) port=$2 ;;
        --runtime) runtime=$2 ;;
        --extra) extra=$2 ;;
        --image) image=$2 ;;
        --coordinator) coordinator=$2 ;;
        --num-hosts) num_hosts=$2 ;;
        --host-id) host_id=$2 ;;
      esac
      shift
      ;;
    *) die "unknown argument '$1' (--help lists them; flags of jaxinfer serve come after --)" ;;
  esac
  shift
done

one_of --runtime "$runtime" venv docker
one_of --extra "$extra" cuda13 cuda12
whole_number --port "$port" 1 65535
check_mesh "$mesh" "$replicas"
matches --gpus "$gpus" 'all|[0-9]+(,[0-9]+)*' "all, or indices such as 0,1"
[ "$build" = no ] || [ "$runtime" = docker ] || die "--build needs --runtime docker"
[ -z "$image" ] || [ "$runtime" = docker ] || die "--image needs --runtime docker"
[ -z "$model" ] || [ -d "$model" ] || die "--model '$model' is not a directory"
if [ -n "$coordinator$num_hosts$host_id" ]; then
  [ -n "$coordinator" ] && [ -n "$num_hosts" ] && [ -n "$host_id" ] \
    || die "--coordinator, --num-hosts and --host-id belong together: give all three, or none"
  matches --coordinator "$coordinator" '[^ :]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}' "HOST:PORT"
  whole_number --num-hosts "$num_hosts" 2 4096
  whole_number --host-id "$host_id" 0 "$((num_hosts - 1))"
  [ "$replicas" = 1 ] || die "--replicas $replicas: several hosts serve one replica together; start a group per replica"
elif [ "$gpus" != all ]; then
  needs_devices "$mesh" "$replicas" "$(printf '%s' "$gpus" | tr ',' '\n' | grep -c .)" 1 "--gpus $gpus"
fi

# From here on "$@" holds the flags of jaxinfer serve.
[ -z "$coordinator" ] || set -- --coordinator "$coordinator" --num-hosts "$num_hosts" --host-id "$host_id" "$@"
[ "$replicas" = 1 ] || set -- --replicas "$replicas" "$@"
[ -z "$mesh" ] || set -- --mesh "$mesh" "$@"

in_venv() {
  run env "EXTRAS=$extra" sh "$root/scripts/setup.sh"
  set -- "$root/.venv/bin/jaxinfer" serve ${model:+"$model"} --port "$port" "$@"
  [ "$gpus" = all ] || set -- env "CUDA_VISIBLE_DEVICES=$gpus" "$@"
  finish "$@"
}

# The container's port is open on all of its own interfaces, hence --insecure; docker publishes it on the host's loopback
# interface only. Several hosts must reach each other: they take the host's network, and the port stays on loopback.
# The volume keeps compiled programs, of several hosts only on host 0, which alone writes them; docker makes it with the
# owner that /cache has in the image.
in_docker() {
  image=${image:-jaxinfer:$extra}
  [ "$build" = no ] || run docker build --file "$root/deploy/Dockerfile" --build-arg "EXTRA=$extra" --tag "$image" "$root"
  if [ -n "$coordinator" ]; then
    set -- "$image" serve ${model:+/model} --port "$port" "$@"
    set -- --network host "$@"
    if [ "$host_id" = 0 ]; then
      set -- --health-cmd "python /opt/jaxinfer/health.py 127.0.0.1:$port" "$@"
    else
      set -- --no-healthcheck "$@" # host 0 alone has the port
    fi
  else
    set -- "$image" serve ${model:+/model} --host 0.0.0.0 --insecure "$@"
    set -- --publish "127.0.0.1:$port:50051" "$@"
  fi
  [ -z "$model" ] || set -- --volume "$(cd "$model" && pwd):/model:ro" "$@"
  devices=all
  [ "$gpus" = all ] || devices="\"device=$gpus\"" # docker reads CSV: without the quotes the comma would end the value
  finish docker run --rm --init --name "jaxinfer-$port" --gpus "$devices" --read-only --tmpfs /tmp \
    --cap-drop ALL --security-opt no-new-privileges --shm-size 1g --stop-timeout 60 \
    --volume jaxinfer-cache:/cache "$@"
}

"in_$runtime" "$@"

#!/bin/sh
# Submits a Slurm job that serves a model: one task, hence one process, per node for all of the node's GPUs.
#
#   scripts/launch_slurm.sh [--model DIR] [--nodes N] [--mesh tensor=16] [options] [-- flags of jaxinfer serve]
#
#   --model DIR          model directory that every node sees (default: the model that ships with jaxinfer)
#   --mesh AXES          how one replica is spread over all GPUs of the job, as in tensor=8,pipe=2 (default: one GPU; several nodes need all)
#   --replicas N         whole engines, on GPUs of their own; one node only (default 1)
#   --nodes N            (default 1)
#   --gpus-per-node N    0 asks for no GPUs (default 8)
#   --cpus-per-task N    (default 16)
#   --time LIMIT         as Slurm writes it, such as 08:00:00 or 1-00:00:00 (default 08:00:00)
#   --partition NAME, --account NAME, --constraint NAME   passed on
#   --job-name NAME      (default jaxinfer)
#   --port N             of the server, on the loopback interface of the first node (default 50051)
#   --coordinator-port N where the first node waits for the others (default 8400)
#   --jaxinfer PATH      the command on the nodes (default: this repository's .venv/bin/jaxinfer)
#   --dry-run            print the job script, and submit nothing
#   --help
#
# Reach it through the login node: ssh -J LOGIN -L 50051:127.0.0.1:50051 FIRST_NODE (the job's log names it).
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
program=launch_slurm.sh
dry_run=no
# shellcheck source=scripts/launch_common.sh
. "$root/scripts/launch_common.sh"

model="" mesh="" replicas=1 nodes=1 gpus_per_node=8 cpus_per_task=16 time=08:00:00 partition="" account="" constraint=""
job_name=jaxinfer port=50051 coordinator_port=8400 jaxinfer=$root/.venv/bin/jaxinfer

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage "$0"; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --) shift; break ;;
    --*=*)
      option=${1%%=*} value=${1#*=}
      shift
      set -- "$option" "$value" "$@"
      continue
      ;;
    --model | --mesh | --replicas | --nodes | --gpus-per-node | --cpus-per-task | --time | --partition | --account | \
      --constraint | --job-name | --port | --coordinator-port | --jaxinfer)
      needs_value "$@"
      case $1 in
        --model) model=$2 ;;
        --mesh) mesh=$2 ;;
        --replicas) replicas=$2 ;;
        --nodes) nodes=$2 ;;
        --gpus-per-node) gpus_per_node=$2 ;;
        --cpus-per-task) cpus_per_task=$2 ;;
        --time) time=$2 ;;
        --partition) partition=$2 ;;
        --account) account=$2 ;;
        --constraint) constraint=$2 ;;
        --job-name) job_name=$2 ;;
        --port) port=$2 ;;
        --coordinator-port) coordinator_port=$2 ;;
        --jaxinfer) jaxinfer=$2 ;;
      esac
      shift
      ;;
    *) die "unknown argument '$1' (--help lists them; flags of jaxinfer serve come after --)" ;;
  esac
  shift
done

whole_number --nodes "$nodes" 1 4096
whole_number --gpus-per-node "$gpus_per_node" 0 64
whole_number --cpus-per-task "$cpus_per_task" 1 1024
whole_number --port "$port" 1 65535
whole_number --coordinator-port "$coordinator_port" 1 65535
[ "$port" != "$coordinator_port" ] || die "--port $port and --coordinator-port must differ"
check_mesh "$mesh" "$replicas"
matches --time "$time" '([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}' "a Slurm time, such as 08:00:00 or 1-00:00:00"
name='[A-Za-z0-9][A-Za-z0-9_.-]*' # a directive is no shell: what is written there must need no quotes
matches --job-name "$job_name" "$name" "letters, digits, dots, dashes and underscores"
[ -z "$partition" ] || matches --partition "$partition" "$name(,$name)*" "names of partitions"
[ -z "$account" ] || matches --account "$account" "$name" "the name of an account"
[ -z "$constraint" ] || matches --constraint "$constraint" '[A-Za-z0-9_.&|*()-]+' "names of features"
[ "$replicas" = 1 ] || [ "$nodes" = 1 ] \
  || die "--replicas $replicas with --nodes $nodes: several hosts serve one replica together; submit a job per replica"
[ "$gpus_per_node" = 0 ] || needs_devices "$mesh" "$replicas" "$((nodes * gpus_per_node))" "$nodes" \
  "--nodes $nodes with --gpus-per-node $gpus_per_node"

# From here on "$@" is the command that each task runs.
[ "$replicas" = 1 ] || set -- --replicas "$replicas" "$@"
[ -z "$mesh" ] || set -- --mesh "$mesh" "$@"
set -- "$jaxinfer" serve ${model:+"$model"} --port "$port" "$@"

directive() { [ -z "$2" ] || printf '#SBATCH --%s=%s\n' "$1" "$2"; }

job_script() {
  printf '#!/bin/bash\n'
  directive job-name "$job_name"
  directive nodes "$nodes"
  directive ntasks-per-node 1
  [ "$gpus_per_node" = 0 ] || directive gpus-per-node "$gpus_per_node"
  directive cpus-per-task "$cpus_per_task"
  directive time "$time"
  directive partition "$partition"
  directive account "$account"
  directive constraint "$constraint"
  directive output "$job_name-%j.log"
  directive signal TERM@90 # a minute and a half before the time limit the tasks get SIGTERM, and drain
  cat <<EOF
set -eu
first=\$(scontrol show hostnames "\$SLURM_JOB_NODELIST" | head -n 1)
echo "serving on \$first, 127.0.0.1:$port" >&2
# One process per node. A task that ends takes the others with it: they cannot go on alone.
step=(srun --nodes=$nodes --ntasks=$nodes --ntasks-per-node=1 --cpus-per-task=$cpus_per_task --kill-on-bad-exit=1)
set -- $(quoted "$@")
EOF
  if [ "$nodes" = 1 ]; then
    # shellcheck disable=SC2016 # the job expands these
    printf '%s\n' 'exec "${step[@]}" "$@"'
  else
    cat <<EOF
# shellcheck disable=SC2016 # each task expands its own number
task='exec "\$@" --coordinator "\$0" --num-hosts "\$SLURM_NTASKS" --host-id "\$SLURM_PROCID"'
exec "\${step[@]}" bash -c "\$task" "\$first:$coordinator_port" "\$@"
EOF
  fi
}

if [ "$dry_run" = yes ]; then
  job_script "$@"
  exit
fi
[ -z "$model" ] || [ -d "$model" ] || die "--model '$model' is not a directory here"
command -v sbatch >/dev/null || die "sbatch is not on PATH: run this on a login node, or take what --dry-run prints"
job_script "$@" | sbatch

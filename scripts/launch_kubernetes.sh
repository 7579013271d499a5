#!/bin/sh
# Applies one of deploy/'s manifests to a Kubernetes cluster.
#
#   scripts/launch_kubernetes.sh deploy/leaderworkerset-tpu.yaml --image registry.example/jaxinfer:tpu [options]
#
#   MANIFEST          deploy/deployment.yaml, deploy/leaderworkerset-gpu.yaml, deploy/leaderworkerset-tpu.yaml, or your copy
#   --image NAME      takes the place of REGISTRY/jaxinfer:... in the manifest; needed while that is there
#   --namespace NAME  (default: kubectl's own)
#   --context NAME    (default: kubectl's own)
#   --delete          delete what the manifest describes
#   --dry-run         print the command and the manifest that it would be given, and ask no cluster anything
#   --help
#
# Reach the server: kubectl port-forward deployment/jaxinfer 50051 (or pod/jaxinfer-0, the first leader of a set).
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
program=launch_kubernetes.sh
dry_run=no
# shellcheck source=scripts/launch_common.sh
. "$root/scripts/launch_common.sh"

manifest="" image="" namespace="" context="" action=apply

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage "$0"; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --delete) action=delete ;;
    --*=*)
      option=${1%%=*} value=${1#*=}
      shift
      set -- "$option" "$value" "$@"
      continue
      ;;
    --image | --namespace | --context)
      needs_value "$@"
      case $1 in
        --image) image=$2 ;;
        --namespace) namespace=$2 ;;
        --context) context=$2 ;;
      esac
      shift
      ;;
    -*) die "unknown option '$1' (--help lists them; flags of jaxinfer serve are in the manifest)" ;;
    *)
      [ -z "$manifest" ] || die "unknown argument '$1': MANIFEST is '$manifest' already"
      manifest=$1
      ;;
  esac
  shift
done

[ -n "$manifest" ] || die "MANIFEST is missing: one of deploy/*.yaml, or your copy"
[ -f "$manifest" ] || die "MANIFEST '$manifest' is no file"
grep -q '^apiVersion:' "$manifest" || die "MANIFEST '$manifest' is no Kubernetes manifest: it has no apiVersion"
[ -z "$image" ] || matches --image "$image" '[a-z0-9][A-Za-z0-9._/-]*(:[0-9]+/[A-Za-z0-9._/-]+)?(:[A-Za-z0-9._-]+)?(@sha256:[0-9a-f]{64})?' "an image's name"
[ -z "$namespace" ] || matches --namespace "$namespace" '[a-z0-9]([-a-z0-9]*[a-z0-9])?' "lower-case letters, digits and dashes"
placeholder='REGISTRY/jaxinfer:[a-z0-9]*'
if grep -q "$placeholder" "$manifest"; then
  [ -n "$image" ] || [ "$action" = delete ] || die "--image is missing: $manifest has $(grep -o "$placeholder" "$manifest" | head -n 1) in its place"
elif [ -n "$image" ]; then
  die "--image $image: $manifest has no REGISTRY/jaxinfer:... that it would take the place of"
fi

filled_in() { sed "s|$placeholder|${image:-&}|" "$manifest"; }

set -- kubectl
[ -z "$context" ] || set -- "$@" "--context=$context"
[ -z "$namespace" ] || set -- "$@" "--namespace=$namespace"

if [ "$dry_run" = yes ]; then
  printf "%s <<'END'\\n" "$(quoted "$@" "$action" -f -)"
  filled_in
  printf 'END\n'
  exit
fi
command -v kubectl >/dev/null || die "kubectl is not on PATH: install it, or use --dry-run"
if [ "$action" = apply ] && grep -q '^kind: LeaderWorkerSet' "$manifest"; then
  "$@" get crd leaderworkersets.leaderworkerset.x-k8s.io >/dev/null \
    || die "the cluster has no LeaderWorkerSet: install the controller of kubernetes-sigs/lws first"
fi
printf '+ %s\n' "$(quoted "$@" "$action" -f -)" >&2
filled_in | "$@" "$action" -f -

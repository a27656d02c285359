#!/bin/bash
# Run a command in a real one-node cluster that is made for it and stopped after it: run.sh COMMAND...
#
# Exit code: the command's own; 124 when it took longer than MODELOPS_LAB_DEADLINE (35m; it is interrupted first). 77 when the
# cluster could not be built or started here: then nothing was run, and stderr and the file that MODELOPS_LAB_NOT_RUN names
# say why. So "not run" is told apart from "failed".
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); lab=${K8S_LAB:-$HOME/.cache/k8s-lab}; export K8S_LAB=$lab
log=$(mktemp); child=; interrupted=
trap 'rm -f "$log"' EXIT

no() {
  [ -z "$interrupted" ] || exit 130
  echo "no cluster, so the command was not run: $1" >&2
  [ -z "${MODELOPS_LAB_NOT_RUN:-}" ] || printf '%s\n' "$1" > "$MODELOPS_LAB_NOT_RUN"
  exit 77
}
within() { # LIMIT COMMAND...: interrupted when the limit is reached or we are, killed two minutes later; its exit code
  timeout --signal=INT --kill-after=2m "$@" 9>&- & child=$!
  local code
  while :; do
    code=0; wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break # a signal to us ends a wait, and not the child
  done
  child=; return "$code"
}
trap 'interrupted=yes; [ -z "$child" ] || kill -INT "$child" 2>/dev/null || true' INT TERM HUP
prepare() { # WHAT LIMIT COMMAND...: quiet, unless it fails
  local what=$1; shift
  echo "$what" >&2
  within "$@" >"$log" 2>&1 || { local code=$?; cat "$log" >&2; no "$what: exit code $code: $(tail -n 2 "$log" | tr '\n' ' ')"; }
}

[ "$(id -u)" = 0 ] || no "only root can make a cluster, and this is $(id -un)"
grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release || no "a cluster is made of packages of Debian 12, and this is another system"
mkdir -p "$lab"
exec 9>"$lab/lock"
flock -n 9 || no "another run has the cluster in $lab"
if [ -e "$lab/run/of-run.sh" ]; then
  echo "a run before this one was killed; its cluster is stopped" >&2
  "$here/cluster.sh" down 9>&-
fi
[ ! -e "$lab/run" ] || no "there is one already, which was started by hand: stop it with $here/cluster.sh down"
[ ! -e /run/netns/k8slab ] || no "there is one already, of another folder: the network namespace k8slab"

prepare "building Kubernetes, unless it is in $lab" 25m "$here/build.sh"
prepare "building the image of PostgreSQL" 10m "$here/images.sh" postgres
prepare "looking for the package index from a container" 2m "$here/images.sh" index
echo "building ModelOps's own images" >&2 # if they cannot be built here, something is wrong with them
for again in yes no; do # an index may have hiccups
  within 20m "$here/images.sh" modelops "$lab/images.tar" >"$log" 2>&1 && break
  cat "$log" >&2; [ "$again" = yes ] && [ -z "$interrupted" ] || exit 1
done
stop() { trap '' INT TERM HUP; "$here/cluster.sh" down 9>&- || true; rm -f "$log" "$lab/images.tar"; }
trap stop EXIT
mkdir -p "$lab/run"; touch "$lab/run/of-run.sh"
IMAGES=$lab/images.tar prepare "starting the cluster" 10m "$here/cluster.sh" up
rm -f "$lab/images.tar"
prepare "running a first pod" 5m "$here/cluster.sh" try localhost/modelops:0.1.0
prepare "making volumes" 1m "$here/cluster.sh" volumes 4
KUBECONFIG=$("$here/cluster.sh" kubeconfig); export KUBECONFIG
export MODELOPS_AFTER_APPLY="$here/cluster.sh dns" MODELOPS_TEST_POSTGRES=localhost/postgres:15 MODELOPS_TEST_ADDRESS=10.99.0.1
[ -z "$interrupted" ] || exit 130
within "${MODELOPS_LAB_DEADLINE:-35m}" "$@"

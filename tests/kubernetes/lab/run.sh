#!/bin/bash
# Run a command in a real one-node cluster that is made for it and stopped after it: run.sh COMMAND...
#
# Exit code: the command's own; 124 when it took longer than MODELOPS_LAB_DEADLINE (35m; it is interrupted first). 77 when the
# cluster could not be built or started here: then nothing was run, and stderr and the file that MODELOPS_LAB_NOT_RUN names
# say why. So "not run" is told apart from "failed". Where MODELOPS_CI_ENDS is set (seconds since 1970), nothing goes on beyond
# that time: a command that would not have half an hour is not run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); lab=${K8S_LAB:-${HOME:-/root}/.cache/k8s-lab}; export K8S_LAB=$lab
log=$(mktemp); child=; interrupted=
COMMAND_S=1800 STOP_S=240 # what the command needs; to kill it, and stop the cluster
MEMORY_MB=3500 # of the cluster and of what the tests start in it
trap 'rm -f "$log"' EXIT

no() {
  [ -z "$interrupted" ] || exit 130
  echo "no cluster, so the command was not run: $1" >&2
  [ -z "${MODELOPS_LAB_NOT_RUN:-}" ] || printf '%s\n' "$1" > "$MODELOPS_LAB_NOT_RUN"
  exit 77
}
seconds_left() { # RESERVE: until CI must have ended, but for a reserve
  echo $((${MODELOPS_CI_ENDS:-$(date +%s) + 86400} - $(date +%s) - $1))
}
at_most() { # LIMIT RESERVE: the limit in seconds, or what is left if that is less
  local left limit=$((${1%m} * 60)); left=$(seconds_left "$2")
  echo $((left < limit ? (left > 0 ? left : 1) : limit))
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
in_time() { [ "$(seconds_left "$COMMAND_S")" -gt 0 ] || no "there is less than half an hour left for it"; }
prepare() { # WHAT LIMIT COMMAND...: quiet, unless it fails
  local what=$1 code=0 limit; shift
  in_time
  echo "$what" >&2
  limit=$(at_most "$1" "$COMMAND_S"); shift
  within "$limit" "$@" >"$log" 2>&1 || code=$?
  [ "$code" != 0 ] || return 0
  cat "$log" >&2
  [ "$code" != 124 ] && [ "$code" != 137 ] || no "$what took longer than $limit s: $(tail -n 2 "$log" | tr '\n' ' ')"
  no "$what: exit code $code: $(tail -n 2 "$log" | tr '\n' ' ')"
}

has_room() { # on disk and in memory, for what follows
  local disk=5 free memory limit
  [ -x "$lab/bin/kube-proxy" ] || disk=12 # to build all
  mkdir -p /var/lib/containers || no "the folder /var/lib/containers cannot be made"
  free=$(df --output=avail -BG "$lab" /var/lib/containers | tail -n +2 | tr -dc '0-9\n' | sort -n | head -n 1) ||
    no "how much room there is on disk cannot be told"
  [ "$free" -ge "$disk" ] || no "there are $free GB free on disk, and a cluster takes $disk"
  memory=$(($(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024))
  limit=$(cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null | grep -E '^[0-9]{1,14}$' | head -n 1 || true)
  [ -z "$limit" ] || [ $((limit >> 20)) -ge "$memory" ] || memory=$((limit >> 20))
  [ "$memory" -ge "$MEMORY_MB" ] || no "there are $memory MB of memory to be had, and a cluster takes $MEMORY_MB"
}

in_time
[ "$(id -u)" = 0 ] || no "only root can make a cluster, and this is $(id -un)"
grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release || no "a cluster is made of packages of Debian 12, and this is another system"
mkdir -p "$lab" && [ -w "$lab" ] || no "the folder $lab cannot be written"
has_room
exec 9>"$lab/lock"
flock -n 9 || no "another run has the cluster in $lab"
if [ -e "$lab/run/of-run.sh" ]; then
  prepare "stopping the cluster of a run before this one, which was killed" 5m "$here/cluster.sh" down
fi
[ ! -e "$lab/run" ] || no "there is one already, which was started by hand: stop it with $here/cluster.sh down"
[ ! -e /run/netns/k8slab ] || no "there is one already, of another folder: the network namespace k8slab"

prepare "building Kubernetes, unless it is in $lab" 25m "$here/build.sh"
prepare "building the image of PostgreSQL" 10m "$here/images.sh" postgres
prepare "looking for the package index from a container" 2m "$here/images.sh" index
echo "building ModelOps's own images" >&2 # if they cannot be built here, something is wrong with them
for again in yes no; do # an index may have hiccups
  code=0; within "$(at_most 20m "$COMMAND_S")" "$here/images.sh" modelops "$lab/images.tar" >"$log" 2>&1 || code=$?
  [ "$code" != 0 ] || break
  cat "$log" >&2
  [ "$code" != 124 ] && [ "$code" != 137 ] && [ "$(seconds_left "$COMMAND_S")" -gt 0 ] ||
    no "it took too long to build ModelOps's own images"
  [ "$again" = yes ] && [ -z "$interrupted" ] || exit 1
done
stop() { trap '' INT TERM HUP; timeout --kill-after=10 150 "$here/cluster.sh" down 9>&- || true; rm -f "$log" "$lab/images.tar"; }
trap stop EXIT
mkdir -p "$lab/run"; touch "$lab/run/of-run.sh"
IMAGES=$lab/images.tar prepare "starting the cluster" 10m "$here/cluster.sh" up
rm -f "$lab/images.tar"
prepare "running a first pod" 5m "$here/cluster.sh" try localhost/modelops:0.1.0
prepare "making volumes" 1m "$here/cluster.sh" volumes 4
KUBECONFIG=$("$here/cluster.sh" kubeconfig); export KUBECONFIG
export PATH=$PATH:$lab/tools
export MODELOPS_AFTER_APPLY="$here/cluster.sh dns" MODELOPS_TEST_POSTGRES=localhost/postgres:15 MODELOPS_TEST_ADDRESS=10.99.0.1
[ -z "$interrupted" ] || exit 130
in_time
within "$(at_most "${MODELOPS_LAB_DEADLINE:-35m}" "$STOP_S")" "$@"

#!/bin/bash
# Run a command in a real one-node cluster that is made for it and stopped after it: run.sh COMMAND...
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); lab=${K8S_LAB:-$HOME/.cache/k8s-lab}
no() { echo "$1; or let KUBECONFIG name a cluster that has the images" >&2; exit 1; }
[ "$(id -u)" = 0 ] && grep -q '^VERSION_CODENAME=bookworm' /etc/os-release || no "a cluster can be made by root on Debian 12"
[ ! -e "$lab/run" ] || no "there is one already: stop it with $here/cluster.sh down"
export K8S_LAB=$lab
"$here/build.sh"
"$here/images.sh" "$lab/images.tar"
trap '"$here/cluster.sh" down' EXIT
IMAGES=$lab/images.tar "$here/cluster.sh" up
rm -f "$lab/images.tar"
"$here/cluster.sh" volumes 4
KUBECONFIG=$("$here/cluster.sh" kubeconfig); export KUBECONFIG
export MODELOPS_AFTER_APPLY="$here/cluster.sh dns" MODELOPS_TEST_POSTGRES=localhost/postgres:15
"$@"

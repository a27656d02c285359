#!/bin/bash
# Install what hosts need and Debian has, if this is root there: ip, setpriv, nft, and a PostgreSQL that speaks TLS. Nothing is
# started by that.
set -euo pipefail
[ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] || exit 0
need="iproute2 util-linux nftables"
compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || need="$need postgresql"
dpkg -s $need >/dev/null 2>&1 && exit
settings=/etc/postgresql-common/createcluster.conf
if [ ! -e "$settings" ]; then # else Debian would make a database and run it
  mkdir -p "${settings%/*}"
  echo 'create_main_cluster = false' > "$settings"
fi
{
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends -o Dpkg::Options::=--force-confold $need
} >&2

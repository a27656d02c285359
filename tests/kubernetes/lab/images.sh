#!/bin/bash
# Build all images that the tests need, and save them as one archive: images.sh ARCHIVE. Quick if nothing has changed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../../.." && pwd); export CONTAINERS_CONF=$here/containers.conf
ca=/etc/ssl/certs/ca-certificates.crt
nice podman build -q --timestamp 0 --build-arg BASE_IMAGE=localhost/debian-base:bookworm \
  --secret "id=ca,src=$ca" -t localhost/modelops:0.1.0 "$root"
nice podman build -q --build-arg VERSION=0.1.1 -t localhost/modelops:0.1.1 - < "$here/next.Dockerfile"
nice podman build -q --build-arg VERSION=0.2.0 --build-arg PROTOCOL=1000 -t localhost/modelops:0.2.0 - < "$here/next.Dockerfile"
nice podman build -q -t localhost/postgres:15 - < "$here/postgres.Dockerfile"
rm -f "$1"
nice podman save -q -m -o "$1" localhost/modelops:0.1.0 localhost/modelops:0.1.1 localhost/modelops:0.2.0 localhost/postgres:15

#!/bin/bash
# The images that the tests need; quick if nothing has changed. usage: images.sh postgres|index|modelops ARCHIVE
#   index: look whether a container reaches what the next one needs; modelops: build ours, and save all as one archive
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../../.." && pwd); export CONTAINERS_CONF=$here/containers.conf
ca=/etc/ssl/certs/ca-certificates.crt
build() { nice podman build -q --network host "$@"; } # without a network of its own, of which podman would leave a bridge
postgres() { build -t localhost/postgres:15 - < "$here/postgres.Dockerfile"; }
index() {
  nice podman run --rm -q --network host -v "$ca:/ca:ro" -e SSL_CERT_FILE=/ca localhost/debian-base:bookworm python3 -c \
    'import re, urllib.parse as p, urllib.request as u
index = "https://pypi.org/simple/uv/"
page = u.urlopen(index, timeout=60).read().decode()
file = p.urljoin(index, re.search(r"href=\"([^#\"]+)", page)[1])
print(u.urlopen(u.Request(file, method="HEAD"), timeout=60).status, file)'
}
modelops() {
  build --timestamp 0 --build-arg BASE_IMAGE=localhost/debian-base:bookworm --secret "id=ca,src=$ca" \
    -t localhost/modelops:0.1.0 "$root"
  build --build-arg VERSION=0.1.1 -t localhost/modelops:0.1.1 - < "$here/next.Dockerfile"
  build --build-arg VERSION=0.2.0 --build-arg PROTOCOL=1000 -t localhost/modelops:0.2.0 - < "$here/next.Dockerfile"
  rm -f "$1"
  nice podman save -q -m -o "$1" localhost/modelops:0.1.0 localhost/modelops:0.1.1 localhost/modelops:0.2.0 localhost/postgres:15
  nice podman image prune -f --filter label=org.opencontainers.image.title=ModelOps >/dev/null # those of other sources
}
"$@"

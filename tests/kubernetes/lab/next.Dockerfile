# The next release, for tests of upgrades: another version, and with PROTOCOL another protocol of server and workers.
ARG BASE=localhost/modelops:0.1.0
FROM ${BASE}
ARG VERSION
ARG PROTOCOL=""
USER 0:0
RUN set -eu; cd /opt/modelops/lib/python3*/site-packages; \
    sed -i "s/^Version: .*/Version: ${VERSION}/" modelops-*.dist-info/METADATA; \
    if [ -n "${PROTOCOL}" ]; then \
      sed -i "s/^PROTOCOL: Final = .*/PROTOCOL: Final = ${PROTOCOL}/" modelops/worker/messages.py; \
      grep -q "^PROTOCOL: Final = ${PROTOCOL}$" modelops/worker/messages.py; \
      rm -f modelops/worker/__pycache__/messages.*; \
    fi
USER 10001:10001

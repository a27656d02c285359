# One image for server, scheduler and worker. Build it with podman, buildah or docker:
#
#     podman build --timestamp 0 -t modelops:0.1.0 .
#
# The same sources, base image and timestamp give the same layers: versions and hashes are pinned in requirements.txt, and
# byte code is checked against nothing that differs between builds.
#
# BASE_IMAGE: any Debian or similar with Python 3.11 or newer and its venv module. Name it by digest to build twice the same.
# PYTHONS: further interpreters for bundles that ask for them, such as "3.13 3.14"; uv fetches them.
# Without scipy: it is for those who write studies (mo.sobol, mo.latin_hypercube), 110 MB that no part of a pool uses.
# Where an authority of one's own signs (a company's proxy): --secret id=ca,src=/etc/ssl/certs/ca-certificates.crt
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PYTHONS=""
ENV PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=manual UV_PYTHON_INSTALL_DIR=/opt/python
WORKDIR /src
COPY requirements.txt ./
RUN --mount=type=secret,id=ca,required=false \
    set -eu; if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca; fi; \
    awk '/^uv==/ {own = 1} own {print} own && !/\\$/ {exit}' requirements.txt > uv.txt; \
    python3 -m venv /tmp/first; \
    /tmp/first/bin/pip install --quiet --require-hashes -r uv.txt; \
    /tmp/first/bin/uv venv --quiet --no-project --python "$(command -v python3)" /opt/modelops; \
    awk '/^[^ ]/ {own = /^scipy==/} !own' requirements.txt > parts.txt; \
    /tmp/first/bin/uv pip install --quiet --python /opt/modelops/bin/python --require-hashes --no-build -r parts.txt; \
    mkdir -p /opt/python; \
    for version in ${PYTHONS}; do /tmp/first/bin/uv python install --quiet "${version}"; done
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# Without tests, and without what of pyarrow nobody here uses: servers, other formats, its own ways to object storage.
# Bundles have a pyarrow of their own.
RUN --mount=type=secret,id=ca,required=false \
    set -eu; if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca; fi; \
    /tmp/first/bin/uv pip install --quiet --python /opt/modelops/bin/python --no-deps .; \
    cd /opt/modelops/lib/python3*/site-packages/modelops-*.dist-info; rm uv_cache.json; sed -i /uv_cache.json/d RECORD; cd /; \
    find /opt/modelops -depth -type d \( -name tests -o -name __pycache__ \) -path '*/site-packages/*' -exec rm -rf {} +; \
    cd /opt/modelops/lib/python3*/site-packages/pyarrow; rm -rf include src ./*flight* ./*s3* ./*gcs* ./*azure* ./*hdfs* ./*orc*; cd /; \
    python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/modelops/lib

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="ModelOps" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/python /opt/python
COPY --from=build /opt/modelops /opt/modelops
# A number, so that Kubernetes can see that it is not root. The folder is what a volume is mounted over.
RUN set -eu; \
    echo 'modelops:x:10001:10001:ModelOps:/var/lib/modelops:/usr/sbin/nologin' >> /etc/passwd; \
    echo 'modelops:x:10001:' >> /etc/group; \
    mkdir -p /var/lib/modelops; chown 10001:10001 /var/lib/modelops; chmod 0700 /var/lib/modelops; \
    for tool in cc gcc g++ c++ clang make ld as; do \
      if command -v "${tool}" >/dev/null; then echo "the base image holds ${tool}" >&2; exit 1; fi; \
    done
ENV PATH=/opt/modelops/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/modelops \
    MODELOPS_HOME=/var/lib/modelops \
    UV_PYTHON_INSTALL_DIR=/opt/python \
    UV_PYTHON_DOWNLOADS=never \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/modelops
EXPOSE 8785 8786 8787
ENTRYPOINT ["modelops"]
CMD ["--help"]

# PostgreSQL as the lab's pods run it: where docker.io/library/postgres has it, and with the same user.
FROM localhost/debian-base:bookworm
RUN set -eu; groupadd -g 999 postgres; useradd -u 999 -g 999 -d /var/lib/postgresql -m postgres; \
    apt-get update -q; apt-get install -qy --no-install-recommends postgresql-15; apt-get clean; rm -rf /var/lib/apt/lists/*
USER 999:999

"""The commands of `k8s/README.md` that bring a database back, on a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from modelops.store import Records
from modelops.study.ids import new_job_id

if TYPE_CHECKING:
    from services import Postgres

PAGE = Path(__file__).parents[2] / "k8s/README.md"
PROGRAMS = ("pg_dump", "psql", "pg_restore")


def test_a_database_that_a_newer_version_has_changed_is_brought_back_as_it_was(
    postgres: Postgres, tmp_path: Path
) -> None:
    lines = [line.strip() for line in PAGE.read_text("utf-8").splitlines()]
    dump, empty, restore = (line for line in lines if line.startswith(PROGRAMS))
    url = postgres.new_database()
    environ = {
        **os.environ,
        "URL": url.replace("+psycopg", ""),
        "PATH": f"{postgres.programs}:{os.environ['PATH']}",
    }

    def do(command: str) -> None:
        subprocess.run(["sh", "-euc", command], cwd=tmp_path, env=environ, check=True, capture_output=True)

    job = new_job_id()
    records = Records.open(url)
    records.create_job(job, b"{}", bundle="1")
    records.close()
    do(dump)
    engine = sa.create_engine(url)
    with engine.begin() as sql:
        sql.exec_driver_sql("CREATE TABLE of_a_newer_version (job varchar(64) REFERENCES jobs (job))")
        sql.exec_driver_sql("UPDATE jobs SET bundle = '2'")
        sql.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    do(empty)
    do(restore)
    records = Records.open(url)
    try:
        assert records.job(job).bundle == "1"
        assert "of_a_newer_version" not in sa.inspect(records.database.engine).get_table_names()
    finally:
        records.close()

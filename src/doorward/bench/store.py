"""The results store: one table of trials in any database that SQLAlchemy knows, SQLite by default."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sql
from pydantic import Field, ValidationError

from doorward.bench.suite import Trial, parts_of, work_of
from doorward.core.errors import DoorwardError, InputError
from doorward.core.records import Record

#: "died": the worker process was lost once; the trial is run again.
Status = Literal["done", "skipped", "failed", "died"]

_meta = sql.MetaData()
_trials = sql.Table(
    "trials",
    _meta,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("work", sql.String(64), index=True),  # null in rows of an earlier make, until they are read
    sql.Column("suite", sql.String(64), nullable=False, index=True),
    sql.Column("scale", sql.String(16), nullable=False),
    sql.Column("trial", sql.String(128), nullable=False),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("attempts", sql.Integer, nullable=False),
    sql.Column("seed", sql.Integer, nullable=False),
    sql.Column("given", sql.JSON, nullable=False),
    sql.Column("resolved", sql.JSON, nullable=False),
    sql.Column("versions", sql.JSON, nullable=False),
    sql.Column("git_revision", sql.String(64)),
    sql.Column("device", sql.String(128), nullable=False),
    sql.Column("threads", sql.Integer, nullable=False),
    sql.Column("seconds", sql.Float),
    sql.Column("peak_memory", sql.BigInteger),
    sql.Column("result", sql.JSON),
    sql.Column("error", sql.Text),
    sql.Column("finished", sql.String(32), nullable=False),
)


#: Which rows hold what a detector sees in a model.
_parts = sql.Table(
    "parts",
    _meta,
    sql.Column("part", sql.String(64), primary_key=True),
    sql.Column("key", sql.String(64), primary_key=True),
)

#: What a `Row` holds; the rest is made from it.
_COLUMNS = [column for column in _trials.c if column is not _trials.c.work]


class StoreError(DoorwardError):
    """Tells that the results store can no longer be read or written; what it held is intact."""


def now() -> str:
    """Return date and time in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Row(Record):
    """One trial's row.

    Attributes:
        key: names suite, scale, trial, and the content of model and judging; the same work has the same key.
        attempts: how often it was tried.
        given: the trial as declared.
        resolved: all settings with their defaults, and hashes of data and code.
        seconds, peak_memory: of the scan; bytes.
        result: a `bench.outcome.Outcome`.
        finished: date and time in UTC.
    """

    key: str
    suite: str
    scale: str
    trial: str
    status: Status
    attempts: int = 1
    seed: int
    given: dict[str, Any]
    resolved: dict[str, Any]
    versions: dict[str, str] = Field(default_factory=dict)
    git_revision: str | None = None
    device: str
    threads: int
    seconds: float | None = None
    peak_memory: int | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    finished: str = Field(default_factory=now)


class Store:
    """Keep rows by key. A row that is done is never replaced, so that nothing is counted twice.

    Args:
        url: as SQLAlchemy takes it, such as `sqlite:///results.sqlite`.

    Raises:
        InputError: if the URL cannot be understood or the database not opened.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._engine = sql.create_engine(url)
        except ImportError as error:
            raise InputError(f"--store {url}: its driver is not installed ({error.name})") from error
        except (sql.exc.SQLAlchemyError, ValueError) as error:
            raise InputError(
                f"--store {url}: cannot be opened as a results store ({_why(error)}); an address is, "
                "for one, sqlite:///results.sqlite"
            ) from error
        try:
            _meta.create_all(self._engine)
            self._name_work()
        except sql.exc.SQLAlchemyError as error:
            self.close()
            raise InputError(f"--store {url}: cannot be opened as a results store ({_why(error)})") from error

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _name_work(self) -> None:
        """Add the column of a store of an earlier make, and name the work of rows that do not."""
        column = _trials.c.work
        with self._engine.begin() as connection:
            inspector = sql.inspect(connection)
            if column.name not in {found["name"] for found in inspector.get_columns(_trials.name)}:
                words = sql.schema.CreateColumn(column).compile(self._engine)
                connection.execute(sql.text(f"ALTER TABLE {_trials.name} ADD COLUMN {words}"))
                for index in _trials.indexes:
                    index.create(connection, checkfirst=True)
            nameless = sql.select(_trials.c.key, _trials.c.resolved).where(column.is_(None))
            for key, resolved in connection.execute(nameless).all():
                named = sql.update(_trials).where(_trials.c.key == key)
                connection.execute(named.values(work=work_of(resolved, key)))

    def put(self, row: Row) -> bool:
        """Write a row in one transaction, unless one of its key is done; tell whether it was written.

        Raises:
            StoreError: if the database cannot be written to, as when the disk is full.
        """
        try:
            with self._engine.begin() as connection:
                where = _trials.c.key == row.key
                if connection.scalar(sql.select(_trials.c.status).where(where)) == "done":
                    return False
                connection.execute(sql.delete(_trials).where(where))
                connection.execute(sql.delete(_parts).where(_parts.c.key == row.key))
                held = row.model_dump(mode="json") | {"work": work_of(row.resolved, row.key)}
                connection.execute(sql.insert(_trials).values(held))
                if row.status == "done":
                    seen = (row.result or {}).get("seen") or {"measurements": []}
                    problem = {one["detector"] for one in seen["measurements"]}
                    parts = [part for name, part in parts_of(row.resolved).items() if name in problem]
                    found = [{"part": part, "key": row.key} for part in parts]
                    if found:
                        connection.execute(sql.insert(_parts), found)
        except sql.exc.IntegrityError as error:
            there = self.get(row.key)
            if there is None or there.status != "done":
                raise StoreError(f"the results store {self.url} refuses a result ({_why(error)})") from error
            return False  # another run has written the same just now
        except sql.exc.SQLAlchemyError as error:
            raise StoreError(
                f"the results store {self.url} cannot be written to ({_why(error)}); what it holds is "
                "intact: make room, then run the same command again"
            ) from error
        return True

    def get(self, key: str) -> Row | None:
        """Return the row of a key."""
        rows = self._select(sql.select(_trials).where(_trials.c.key == key))
        return rows[0] if rows else None

    def done(self, work: str) -> Row | None:
        """Return the first row of this work that is done, of whatever trial."""
        same = (_trials.c.work == work) & (_trials.c.status == "done")
        rows = self._select(
            sql.select(_trials).where(same).order_by(_trials.c.finished, _trials.c.key).limit(1)
        )
        return rows[0] if rows else None

    def holding(self, part: str) -> Row | None:
        """Return the first row that is done and holds what a detector sees in a model (`parts_of`)."""
        where = _trials.c.key.in_(sql.select(_parts.c.key).where(_parts.c.part == part))
        rows = self._select(
            sql.select(_trials).where(where).order_by(_trials.c.finished, _trials.c.key).limit(1)
        )
        return rows[0] if rows else None

    def latest(self, trials: Sequence[Trial]) -> dict[str, Row]:
        """Return the last row of each trial by name, of those trials only that are declared as these are.

        Other rows of the same names are of an earlier make of the suite.
        """
        declared = {(t.suite, str(t.scale), t.name): t for t in trials}
        suites = sorted({t.suite for t in trials})
        found = {}
        for row in self._select(
            sql.select(_trials).where(_trials.c.suite.in_(suites)).order_by(_trials.c.finished, _trials.c.key)
        ):
            trial = declared.get((row.suite, row.scale, row.trial))
            if trial is not None and _declares(row.given, trial):
                found[row.trial] = row
        return found

    def _select(self, query: sql.Select[Any]) -> list[Row]:
        try:
            with self._engine.connect() as connection:
                found = connection.execute(query.with_only_columns(*_COLUMNS)).mappings()
                return [Row.model_validate(dict(row)) for row in found]
        except sql.exc.SQLAlchemyError as error:
            raise StoreError(f"the results store {self.url} cannot be read ({_why(error)})") from error


def _declares(given: dict[str, Any], trial: Trial) -> bool:
    """Return whether a row was declared as this trial is; what it does not name has its default."""
    try:
        return Trial.model_validate(given).model_dump(mode="json") == trial.model_dump(mode="json")
    except ValidationError:  # by an older or newer make
        return False


def _why(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]

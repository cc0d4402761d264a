"""The store of a fleet: one row for each content that is scanned, in any database that SQLAlchemy knows."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import sqlalchemy as sql
from sqlalchemy import event

from doorward.core.errors import DoorwardError, InputError
from doorward.core.records import Record

#: What the tables below are; a store of another number is refused.
SCHEMA = 1
#: How often a model is tried before its process is said to die of it.
TRIES = 2
#: How often a driver may die while it works on a model, which is seldom the model's fault.
LOST = 5
#: Seconds without a sign of life after which a driver is taken for dead.
LEASE = 60.0
#: Marks connections that only read.
READS = "doorward_reads"

State = Literal["waiting", "running", "done", "failed"]

_meta = sql.MetaData()
_versions = sql.Table("fleet_schema", _meta, sql.Column("version", sql.Integer, primary_key=True))
_scans = sql.Table(
    "fleet_scans",
    _meta,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("digest", sql.String(64), nullable=False, index=True),
    sql.Column("path", sql.Text, nullable=False),
    sql.Column("request", sql.JSON, nullable=False),
    sql.Column("state", sql.String(8), nullable=False, index=True),
    sql.Column("tries", sql.Integer, nullable=False),
    sql.Column("owner", sql.String(64)),
    sql.Column("alive", sql.Float),
    sql.Column("queued", sql.Float, nullable=False),
    sql.Column("finished", sql.Float),
    sql.Column("verdict", sql.String(16), index=True),
    sql.Column("p_value", sql.Float),
    sql.Column("targets", sql.JSON),
    sql.Column("seconds", sql.Float),
    sql.Column("peak_memory", sql.BigInteger),
    sql.Column("error", sql.Text),
    sql.Column("report", sql.Text),
)
_places = sql.Table(
    "fleet_places",
    _meta,
    sql.Column("place", sql.String(64), primary_key=True),  # the sha256 of the path, which may be long
    sql.Column("path", sql.Text, nullable=False),
    sql.Column("key", sql.String(64), nullable=False, index=True),
    sql.Column("seen", sql.Float, nullable=False),
)
_objects = sql.Table(
    "fleet_objects",
    _meta,
    sql.Column("stamp", sql.String(64), primary_key=True),
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("beyond", sql.JSON, nullable=False),
    sql.Column("beyond_stamp", sql.String(64)),
)


class StoreError(DoorwardError):
    """Tells that the store can no longer be read or written; what it held is intact."""


class Waiting(Record):
    """A model that is to be scanned.

    Attributes:
        key: of its content, how it is scanned, and the code that does.
        digest: sha256 of all that loading reaches; empty while that is not on this machine.
        request: a `ScanRequest` as JSON.
        owner: whoever works on it, for this once.
    """

    key: str
    digest: str
    path: str
    request: dict[str, Any]
    tries: int = 0
    owner: str | None = None


class Known(Record):
    """What was once fetched from object storage.

    Attributes:
        stamp: of what the storage said of it.
        digest: sha256 of all that loading reaches.
        beyond: further files that it names, and the stamp of these.
    """

    stamp: str
    digest: str
    beyond: tuple[str, ...] = ()
    beyond_stamp: str | None = None


class Done(Record):
    """What became of a model: a verdict, or why there is none.

    Attributes:
        seconds, peak_memory: of its process; bytes.
        report: the report as JSON.
        finished: seconds since 1970.
    """

    key: str
    digest: str
    path: str
    state: State
    verdict: str | None = None
    p_value: float | None = None
    targets: tuple[str, ...] = ()
    seconds: float | None = None
    peak_memory: int | None = None
    error: str | None = None
    finished: float | None = None


class FleetStore:
    """Keep what is to be scanned and what was found; several drivers may share it.

    A row that is done is never replaced. A row that a driver works on belongs to it as long as it shows signs
    of life.

    Args:
        url: as SQLAlchemy takes it, such as `sqlite:///fleet.sqlite` or `postgresql+psycopg://...`.
        lease: seconds without a sign of life after which a driver is taken for dead.

    Raises:
        InputError: if the URL cannot be understood, the database not opened, or it is of another version.
    """

    def __init__(self, url: str, *, lease: float = LEASE) -> None:
        self._lease = lease
        try:
            address = _absolute(sql.make_url(url))
            self.url = address.render_as_string(hide_password=False)
            self.name = sql.make_url(url).render_as_string(hide_password=True)
            self._engine = sql.create_engine(address, pool_pre_ping=True)
        except ImportError as error:
            raise InputError(f"--store: the driver of {url.split(':')[0]} is not installed") from error
        except (sql.exc.SQLAlchemyError, ValueError) as error:
            raise InputError(
                f"--store: not an address of a database, such as sqlite:///fleet.sqlite ({_why(error)})"
            ) from error
        if self._engine.dialect.name == "sqlite":
            _lock_at_once(self._engine)
        try:
            try:
                found = self._prepare()
            except (sql.exc.IntegrityError, sql.exc.ProgrammingError):
                found = self._prepare()  # another driver made the tables at the same moment
        except sql.exc.SQLAlchemyError as error:
            self.close()
            raise InputError(f"--store {self.name}: cannot be opened ({_why(error)})") from error
        if found != SCHEMA:
            self.close()
            raise InputError(
                f"--store {self.name}: it is of version {found}, this Doorward has {SCHEMA}; name another "
                "store, or use the Doorward that made this one"
            )

    def _prepare(self) -> int:
        """Make the tables if there are none, and return their version; those of another are left alone."""
        with self._engine.begin() as connection:
            if sql.inspect(connection).has_table(_versions.name):
                found = connection.scalar(sql.select(_versions.c.version))
                if found is not None and found != SCHEMA:
                    return int(found)
            _meta.create_all(connection)
            if connection.scalar(sql.select(_versions.c.version)) is None:
                connection.execute(sql.insert(_versions).values(version=SCHEMA))
            return SCHEMA

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def enqueue(self, wanted: Sequence[Waiting]) -> int:
        """Note models and where they lie; return how many of them were never scanned so."""
        now = time.time()
        with self._writing() as connection:
            _alone(connection)
            keys = [one.key for one in wanted]
            never_read = (_scans.c.state == "failed") & (_scans.c.digest == "") & _scans.c.key.in_(keys)
            connection.execute(
                sql.update(_scans).where(never_read).values(state="waiting", tries=0, error=None, queued=now)
            )
            known = set(connection.scalars(sql.select(_scans.c.key).where(_scans.c.key.in_(keys))))
            new = {one.key: one for one in wanted if one.key not in known}
            rows = [
                one.model_dump() | {"state": "waiting", "queued": now + i * 1e-6}
                for i, one in enumerate(new.values())
            ]
            if rows:
                connection.execute(sql.insert(_scans), rows)
            ids = {_place_of(one.path): one for one in wanted}
            connection.execute(sql.delete(_places).where(_places.c.place.in_(list(ids))))
            places = [
                {"place": place, "path": path_text(one.path), "key": one.key, "seen": now}
                for place, one in ids.items()
            ]
            connection.execute(sql.insert(_places), places)
        return len(new)

    def claim(self, owner: str, count: int) -> list[Waiting]:
        """Give a driver models that nobody works on, at most so many, those first that wait longest."""
        now = time.time()
        with self._writing() as connection:
            self._take_back(connection, now)
            query = (
                sql.select(_scans)
                .where(_scans.c.state == "waiting")
                .order_by(_scans.c.queued, _scans.c.key)
                .limit(count)
                .with_for_update(skip_locked=True)
            )
            rows = connection.execute(query).mappings().all()
            claimed = [
                Waiting(
                    **{name: row[name] for name in Waiting.model_fields}
                    | {"tries": row["tries"] + 1, "owner": f"{owner}/{uuid.uuid4().hex[:8]}"}
                )
                for row in rows
            ]
            for one in claimed:
                own = sql.update(_scans).where(_scans.c.key == one.key)
                connection.execute(own.values(state="running", owner=one.owner, alive=now, tries=one.tries))
        return claimed

    def _take_back(self, connection: sql.Connection, now: float) -> None:
        """Let what belongs to dead drivers be tried again, or fail where it was tried often enough."""
        lost = (_scans.c.state == "running") & (_scans.c.alive <= now - self._lease)
        connection.execute(
            sql.update(_scans)
            .where(lost & (_scans.c.tries >= LOST))
            .values(state="failed", finished=now, error=f"whatever scanned it was killed {LOST} times")
        )
        connection.execute(sql.update(_scans).where(lost).values(state="waiting", owner=None))

    def beat(self, owner: str) -> None:
        """Show that a driver is alive."""
        with self._writing() as connection:
            connection.execute(sql.update(_scans).where(_of(owner)).values(alive=time.time()))

    def finish(self, one: Waiting, found: Done, report: str | None) -> bool:
        """Write what became of a model, once; tell whether it still belonged to whoever claimed it."""
        values = found.model_dump(exclude={"key", "digest", "path", "finished"})
        values |= {"targets": list(found.targets), "report": report, "finished": time.time()}
        return self._end(one, values)

    def give_back(self, one: Waiting) -> bool:
        """Let a model be tried again, whose process was lost."""
        return self._end(one, {"state": "waiting", "owner": None})

    def _end(self, one: Waiting, values: dict[str, Any]) -> bool:
        with self._writing() as connection:
            own = sql.update(_scans).where(_claimed(one))
            return bool(connection.execute(own.values(**values)).rowcount)

    def admit(self, one: Waiting, key: str, known: Known | None, digest: str) -> bool:
        """Give a model the key of its content, which is known now that it was fetched.

        Return whether it is still to be scanned: not if its content has a key already, under which it is then
        found, or if it no longer belongs to whoever claimed it.
        """
        with self._writing() as connection:
            _alone(connection)
            if known is not None:
                connection.execute(sql.delete(_objects).where(_objects.c.stamp == known.stamp))
                connection.execute(sql.insert(_objects), [known.model_dump()])
            own = connection.scalar(sql.select(_scans.c.key).where(_claimed(one)))
            if own is None or own == key:
                return own is not None
            connection.execute(sql.update(_places).where(_places.c.key == own).values(key=key))
            if connection.scalar(sql.select(_scans.c.key).where(_scans.c.key == key)) is not None:
                connection.execute(sql.delete(_scans).where(_scans.c.key == own))
                return False
            connection.execute(sql.update(_scans).where(_claimed(one)).values(key=key, digest=digest))
            return True

    def known(self, stamp: str) -> Known | None:
        """Return what is known of objects of which their storage said the same."""
        with self._reading() as connection:
            row = connection.execute(sql.select(_objects).where(_objects.c.stamp == stamp)).mappings().first()
        return None if row is None else Known(**row)

    def release(self, owner: str) -> None:
        """Give back what a driver works on, as if it had not been tried: it ends in order."""
        with self._writing() as connection:
            again = {"state": "waiting", "owner": None, "tries": _scans.c.tries - 1}
            connection.execute(sql.update(_scans).where(_of(owner)).values(**again))

    def left(self) -> int:
        """Return how many models wait or are worked on."""
        return sum(count for state, count in self.counts().items() if state in ("waiting", "running"))

    def counts(self) -> dict[str, int]:
        """Return how many models are in each state; those that are done by verdict."""
        query = sql.select(_scans.c.state, _scans.c.verdict, sql.func.count()).group_by(
            _scans.c.state, _scans.c.verdict
        )
        with self._reading() as connection:
            found = connection.execute(query).all()
        counts: dict[str, int] = {}
        for state, verdict, count in found:
            name = verdict if state == "done" else state
            counts[name] = counts.get(name, 0) + count
        return counts

    def rows(self) -> Iterator[Done]:
        """Yield what became of the model at each place, by path."""
        columns = [_scans.c[name] for name in Done.model_fields if name != "path"]
        query = sql.select(*columns, _places.c.path).join(_places, _places.c.key == _scans.c.key)
        with self._reading() as connection:
            for row in connection.execute(query.order_by(_places.c.path)).mappings().yield_per(500):
                yield Done(**{**row, "targets": tuple(row["targets"] or ())})

    def report(self, key: str) -> str | None:
        """Return the report of a key as JSON."""
        with self._reading() as connection:
            found: str | None = connection.scalar(sql.select(_scans.c.report).where(_scans.c.key == key))
        return found

    @contextmanager
    def _writing(self) -> Iterator[sql.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sql.exc.SQLAlchemyError as error:
            raise self._lost(error) from error

    @contextmanager
    def _reading(self) -> Iterator[sql.Connection]:
        try:
            with self._engine.connect().execution_options(**{READS: True}) as connection:
                yield connection
        except sql.exc.SQLAlchemyError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> StoreError:
        return StoreError(
            f"the store {self.name} cannot be reached ({_why(error)}); what it holds is intact: run the same "
            "command again"
        )


def _absolute(url: sql.URL) -> sql.URL:
    """Return an address that means the same wherever a process stands."""
    file = url.database
    if url.get_backend_name() != "sqlite" or not file or file.startswith((":", "file:")):
        return url
    return url.set(database=os.path.abspath(file))


def _lock_at_once(engine: sql.Engine) -> None:
    """Let SQLite's transactions lock when they begin: two drivers must not claim the same."""

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # else the driver begins transactions itself, without a lock
        connection.execute("PRAGMA busy_timeout = 60000")
        connection.execute("PRAGMA journal_mode = WAL")

    @event.listens_for(engine, "begin")
    def begin(connection: sql.Connection) -> None:
        reads = connection.get_execution_options().get(READS)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _of(owner: str) -> sql.ColumnElement[bool]:
    """Return what holds for all that a driver works on."""
    return (_scans.c.state == "running") & _scans.c.owner.startswith(f"{owner}/", autoescape=True)


def _claimed(one: Waiting) -> sql.ColumnElement[bool]:
    """Return what holds for a claimed model alone, also when its key has changed."""
    return (_scans.c.state == "running") & (_scans.c.owner == one.owner)


def _alone(connection: sql.Connection) -> None:
    """Let no other transaction add keys before this one ends; SQLite's writers are alone anyway."""
    connection.execute(sql.select(_versions).with_for_update())


def _place_of(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()


def path_text(path: str) -> str:
    """Return a path as a text that a database takes, whatever bytes it has."""
    return path.encode("utf-8", "backslashreplace").decode()


def _why(error: Exception) -> str:
    text = str(getattr(error, "orig", None) or error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__

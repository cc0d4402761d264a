"""Models in object storage: fetched for as long as they are scanned, and not again when they are known."""

from __future__ import annotations

import multiprocessing.util
import os
import pickle
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy")

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from command_line import assert_one_line, call
from doorward.core.errors import InputError
from doorward.core.report_json import from_json
from doorward.fleet import remote
from doorward.fleet.attempt import Attempt
from doorward.fleet.engine import FleetSettings, note, work
from doorward.fleet.sources import find_models
from doorward.fleet.store import FleetStore, Known, Waiting
from doorward.fleet.task import run
from doorward.scan.request import ScanRequest
from test_fleet import Harmful

COMMON = ScanRequest(detectors=("unsafe-code",), time_budget=60.0)
GOOD, BAD = pickle.dumps({"weight": [1]}, protocol=2), pickle.dumps(Harmful())
Bucket = tuple[fsspec.AbstractFileSystem, str]


@pytest.fixture
def store(tmp_path: Path) -> FleetStore:
    return FleetStore(f"sqlite:///{tmp_path}/fleet.sqlite")


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give copies a folder of their own, which is empty in the end."""
    multiprocessing.util.get_temp_dir()  # its sockets stay at a short path: 108 bytes at most
    folder = tmp_path / "copies"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.glob("doorward-fleet-*")) == []


@pytest.fixture
def memory() -> Iterator[Bucket]:
    files = MemoryFileSystem()
    yield files, "memory://bucket"
    files.rm("/", recursive=True)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """Serve S3 in this process."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def s3(server: None) -> Iterator[Bucket]:
    files = fsspec.filesystem("s3", use_listings_cache=False)
    files.mkdir("s3://bucket")
    yield files, "s3://bucket"
    files.rm("s3://bucket", recursive=True)


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    found: Bucket = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the addresses of what is fetched, as it happens."""
    told: list[str] = []
    original = remote._fetch

    def fetch(listing: remote.Listing, folder: Path, most: int) -> int:
        told.extend(listing.objects)
        return original(listing, folder, most)

    monkeypatch.setattr(remote, "_fetch", fetch)
    return told


def scanned(store: FleetStore, *sources: str) -> int:
    """Scan sources and return how many models that took."""
    noted = note(find_models(sources, COMMON), store)
    assert noted.unreadable == ()
    return work(store, FleetSettings())


def test_models_are_fetched_once_and_scanned_as_on_this_machine(
    store: FleetStore, bucket: Bucket, fetches: list[str], tmp_path: Path
) -> None:
    files, url = bucket
    files.pipe_file(f"{url}/a/good.pkl", GOOD)
    files.pipe_file(f"{url}/a/whole/config.json", b'{"architectures": ["ViTForImageClassification"]}')
    files.pipe_file(f"{url}/a/whole/pytorch_model.bin", BAD)
    files.pipe_file(f"{url}/a/whole/deep/more.txt", b"more")
    files.pipe_file(f"{url}/a/.hidden/bad.pkl", BAD)
    files.pipe_file(f"{url}/a/readme.txt", b"no model")
    assert scanned(store, url) == 2
    good, whole = store.rows()
    assert (good.path, good.verdict) == (f"{url}/a/good.pkl", "could_not_tell")
    assert (whole.path, whole.verdict) == (f"{url}/a/whole", "unsafe")
    report = from_json(store.report(whole.key) or "")
    assert report.subject is not None
    assert (report.subject.path, report.subject.sha256) == (whole.path, whole.digest)
    assert report.request["model"] == whole.path
    assert str(tmp_path) not in (store.report(whole.key) or "")
    # what the storage says is the same: nothing is fetched
    fetches.clear()
    assert scanned(store, f"{url}/a") == 0
    assert fetches == []
    # the same content on this machine, and elsewhere in the bucket, is known; the second by its digest alone
    (tmp_path / "same.pkl").write_bytes(GOOD)
    files.pipe_file(f"{url}/b/same.pkl", GOOD)
    assert scanned(store, str(tmp_path / "same.pkl"), f"{url}/b") == 0
    assert fetches == ["same.pkl"]
    assert {one.key for one in store.rows() if one.path.endswith("same.pkl")} == {good.key}
    assert scanned(store, f"{url}/b/same.pkl") == 0
    assert fetches == ["same.pkl"]
    # another content at a known address is scanned
    files.pipe_file(f"{url}/a/good.pkl", BAD + b"more")
    assert scanned(store, url) == 1
    assert {one.path: one.verdict for one in store.rows()}[f"{url}/a/good.pkl"] == "unsafe"


def test_an_onnx_model_comes_with_the_files_it_names(
    store: FleetStore, bucket: Bucket, fetches: list[str], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np

    files, url = bucket
    weights = onnx.numpy_helper.from_array(np.arange(2000, dtype=np.float32).reshape(20, 100), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 20])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 100])],
        [weights],
    )
    local, apart = tmp_path / "m.onnx", {"save_as_external_data": True, "size_threshold": 0}
    onnx.save_model(onnx.helper.make_model(graph), local, location="weights.raw", **apart)
    for file in ("m.onnx", "weights.raw"):
        files.pipe_file(f"{url}/{file}", (tmp_path / file).read_bytes())
    files.pipe_file(f"{url}/other.raw", b"not named")
    assert scanned(store, url) == 1
    assert fetches == ["m.onnx", "weights.raw"]
    assert scanned(store, str(local)) == 0
    assert scanned(store, url) == 0
    assert fetches == ["m.onnx", "weights.raw"]
    files.pipe_file(f"{url}/weights.raw", b"\x01" * (tmp_path / "weights.raw").stat().st_size)
    assert scanned(store, url) == 1


def test_tables_lie_at_addresses_and_name_them(store: FleetStore, tmp_path: Path, bucket: Bucket) -> None:
    files, url = bucket
    files.pipe_file(f"{url}/x/good.pkl", GOOD)
    here = tmp_path / "bad.pkl"
    here.write_bytes(BAD)
    files.pipe_file(f"{url}/x/list.csv", f"path,seed\ngood.pkl,3\n{here},\nfile://{here},4\n".encode())
    own = tmp_path / "own.csv"
    own.write_text(f"path\n{url}/x/good.pkl\nbad.pkl\n")
    places = list(find_models([f"{url}/x/list.csv"], COMMON))
    assert [one.path for one in places] == [f"{url}/x/good.pkl", str(here)]
    assert [one.request.seed for one in places] == [3, 0]
    assert [one.path for one in find_models([str(own)], COMMON)] == [f"{url}/x/good.pkl", str(here)]
    assert scanned(store, str(own)) == 2
    assert {one.verdict for one in store.rows()} == {"could_not_tell", "unsafe"}
    files.pipe_file(f"{url}/list.csv", b"where\nx\n")
    for table, words in ((f"{url}/list.csv", "has no column"), (f"{url}/none.csv", "there is nothing")):
        with pytest.raises(InputError, match=words):
            list(find_models([table], COMMON))
    missing = tmp_path / "missing.csv"
    missing.write_text(f"path\n{url}/gone.pkl\n")
    ((path, why),) = note(find_models([str(missing)], COMMON), store).unreadable
    assert path == f"{url}/gone.pkl"
    assert "there is nothing" in why


def test_the_command_reads_and_writes_addresses(tmp_path: Path, bucket: Bucket) -> None:
    files, url = bucket
    files.pipe_file(f"{url}/m/bad.pkl", BAD)
    scan = (
        "fleet",
        "scan",
        f"{url}/m",
        "--store",
        f"sqlite:///{tmp_path}/s.sqlite",
        "--detector",
        "unsafe-code",
    )
    done = call(*scan, "--out", f"{url}/out")
    assert done.code == 1, done.err
    assert f"unsafe: {url}/m/bad.pkl" in done.out
    reports = files.ls(f"{url}/out/reports", detail=False)
    assert sorted(Path(name).suffix for name in reports) == [".html", ".json"]
    assert f"{url}/m/bad.pkl" in files.cat_file(f"{url}/out/models.csv").decode()
    assert b"<table" in files.cat_file(f"{url}/out/index.html")
    again = call(*scan, "--new-only", "--out", f"{url}/out")
    assert again.code == 0, again.err


def test_what_is_missing_at_an_address_is_told_in_one_line(tmp_path: Path, bucket: Bucket) -> None:
    files, url = bucket
    files.pipe_file(f"{url}/notes.txt", b"text")
    scan = ("fleet", "scan", "--store", f"sqlite:///{tmp_path}/fleet.sqlite")
    assert_one_line(call(*scan, f"{url}/gone"), f"{url}/gone: there is nothing")
    assert_one_line(call(*scan, url), "holds no model")
    assert_one_line(call(*scan, "ftp://me:secret@host/m"), "ftp://...", "password")
    if url.startswith("s3"):
        assert_one_line(call(*scan, "s3://no-bucket/m"), "The specified bucket does not exist")
        assert_one_line(call(*scan, url, "--out", "s3://no-bucket/out"), "there is no 'no-bucket'")
        assert not files.exists("s3://no-bucket")


def test_a_missing_package_is_told_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote, "url_to_fs", missing)
    scan = ("fleet", "scan", "--store", f"sqlite:///{tmp_path}/fleet.sqlite")
    assert_one_line(call(*scan, "s3://bucket/m"), "'s3fs': pip install 'doorward[s3]'")
    assert_one_line(call(*scan, "gs://bucket/m"), "Install s3fs")  # what fsspec says of others


def test_what_cannot_be_fetched_is_told_and_tried_again_next_time(store: FleetStore, memory: Bucket) -> None:
    files, url = memory
    files.pipe_file(f"{url}/good.pkl", GOOD)
    note(find_models([url], COMMON), store)
    assert work(store, FleetSettings(disk=3)) == 1
    (one,) = store.rows()
    assert (one.state, one.verdict) == ("failed", None)
    assert "see --disk" in (one.error or "")
    assert scanned(store, url) == 1
    (one,) = store.rows()
    assert (one.state, one.error, one.verdict) == ("done", None, "could_not_tell")


def test_what_changes_while_it_is_fetched_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, memory: Bucket
) -> None:
    files, url = memory
    files.pipe_file(f"{url}/m.pkl", GOOD)
    original = remote._fetch

    def fetch(listing: remote.Listing, folder: Path, most: int) -> int:
        left = original(listing, folder, most)
        files.pipe_file(f"{url}/m.pkl", GOOD)
        return left

    monkeypatch.setattr(remote, "_fetch", fetch)
    with pytest.raises(InputError, match="changed while"), remote.fetched(f"{url}/m.pkl", 99):
        pytest.fail("it was taken")
    # a listing that is not true is found out as well
    monkeypatch.setattr(remote, "_fetch", original)
    monkeypatch.setattr(MemoryFileSystem, "get", lambda *_: None)
    with pytest.raises(InputError, match="arrive as a whole"), remote.fetched(f"{url}/m.pkl", 99):
        pytest.fail("it was taken")


def test_no_object_leaves_the_folder_of_its_model(tmp_path: Path) -> None:
    for name in ("../out.pkl", "a/../../out.pkl", "/out.pkl"):
        listing = remote.Listing("memory://m", {name: {"name": "/m/x", "size": 1}}, whole=True)
        with pytest.raises(InputError, match="would leave"):
            remote._fetch(listing, tmp_path / "in", 10)
    assert not (tmp_path / "out.pkl").exists()


def test_objects_of_which_the_storage_says_too_little_have_no_stamp() -> None:
    def stamp(**info: object) -> str | None:
        return remote.Listing("x://m", {"m": {"name": "m", "size": 3} | info}, whole=False).stamp

    assert stamp() is None
    assert stamp(ETag="") is None
    assert stamp(ETag="a") not in (None, stamp(ETag="b"), stamp(ETag="a", size=4))
    with pytest.raises(InputError, match="does not say how large"):
        _ = remote.Listing("x://m", {"m": {"name": "m", "size": None}}, whole=False).size


def test_copies_of_a_process_that_was_killed_are_removed(copies: Path) -> None:
    old, used = copies / "doorward-fleet-old", copies / "doorward-fleet-used"
    for folder in (old, used):
        folder.mkdir()
        os.utime(folder, (time.time() - 3600,) * 2)
    with remote._locked(used):
        with remote._temporary_folder() as folder:
            assert folder.is_dir()
            assert not old.exists()
            assert used.exists()
        assert not folder.exists()
    used.rmdir()


def waiting(key: str, path: str) -> Waiting:
    return Waiting(key=key, digest="", path=path, request=COMMON.to_json())


def test_a_content_that_is_known_once_it_is_fetched_gets_one_row(store: FleetStore) -> None:
    store.enqueue([waiting("p1", "memory://a"), waiting("p2", "memory://b")])
    first, second = store.claim("me", 2)
    known = Known(stamp="s", digest="d", beyond=("w",), beyond_stamp="t")
    assert store.admit(first, "real", known, "d")
    assert store.admit(first, "real", known, "d")
    assert not store.admit(second, "real", None, "d")
    assert store.known("s") == known
    assert store.known("t") is None
    assert {(one.path, one.key, one.state) for one in store.rows()} == {
        ("memory://a", "real", "running"),
        ("memory://b", "real", "running"),
    }
    # it is given back, though its key has changed, and belongs to the next from then on
    assert store.give_back(first)
    assert not store.admit(first, "real", None, "d")
    (again,) = store.claim("other", 2)
    assert (again.key, again.tries) == ("real", 2)


def test_what_belongs_to_others_is_not_scanned(memory: Bucket) -> None:
    files, url = memory
    files.pipe_file(f"{url}/m.pkl", GOOD)
    assert run(waiting("p", f"{url}/m.pkl"), FleetSettings(), lambda *_: False) == Attempt(elsewhere=True)
    gone = run(waiting("p", f"{url}/gone.pkl"), FleetSettings(), lambda *_: True)
    assert gone.lost
    assert "not fetched" in (gone.error or "")

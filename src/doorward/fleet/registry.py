"""The models of an MLflow registry, as a file system of fsspec."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem

from doorward.core.errors import InputError
from doorward.fleet.servers import check_answers

#: How MLflow writes the address of a registered model: models:/NAME/VERSION.
SCHEME = "models:/"
#: What says where the registry is, as MLflow reads it: the first that is set.
VARIABLES = ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI")


class RegistryFiles(AbstractFileSystem):  # type: ignore[misc]
    """The files of all registered versions, as NAME/VERSION/FILE; they can be read alone."""

    protocol = "models"
    cachable = False

    @cached_property
    def _client(self) -> Any:
        return connect()

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Return what is in a folder: all models, the versions of one, or files of a version."""
        name, version, _below = parts(path)
        with told():
            if not name:
                found = [_folder(one.name) for one in self._all("search_registered_models")]
            elif not version:
                self._client.get_registered_model(name)  # raises where there is none
                versions = self._all("search_model_versions", filter_string=f"name = '{name}'")
                found = [_folder(f"{name}/{one.version}") for one in versions]
            else:
                found = list(self._files(path.strip("/"), name, version))
        return found if detail else [one["name"] for one in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return what is known of a folder or file."""
        path = path.strip("/")
        name, version, below = parts(path)
        if below:
            for one in self.ls(path.rpartition("/")[0]):
                if one["name"] == path:
                    return dict(one)
            raise FileNotFoundError(path)
        with told():
            if version:
                self._version(name, version)
            elif name:
                self._client.get_registered_model(name)
        return _folder(path)

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Copy a file to this machine."""
        import mlflow

        with told(), tempfile.TemporaryDirectory(dir=Path(lpath).parent) as folder:
            copy = mlflow.artifacts.download_artifacts(artifact_uri=SCHEME + rpath, dst_path=folder)
            os.replace(copy, lpath)

    def _all(self, search: str, **words: Any) -> Iterator[Any]:
        """Yield what a search finds, page by page."""
        token = None
        while True:
            page = getattr(self._client, search)(page_token=token, **words)
            yield from page
            token = page.token
            if not token:
                return

    def _files(self, path: str, name: str, version: str) -> Iterator[dict[str, Any]]:
        import mlflow

        known = self._version(name, version)
        root = f"{name}/{version}"
        for one in mlflow.artifacts.list_artifacts(artifact_uri=SCHEME + path) or ():
            if one.is_dir:
                yield _folder(f"{root}/{one.path}")
            else:
                yield {
                    "name": f"{root}/{one.path}",
                    "type": "file",
                    "size": one.file_size,
                    # MLflow tells no checksums, but where a version comes from, which does not change
                    "created": known.creation_timestamp,
                    "source": f"{mlflow.get_registry_uri()} {known.source} {known.run_id}",
                }

    def _version(self, name: str, version: str) -> Any:
        return _version(self._client, name, version)


@lru_cache(maxsize=64)
def _version(client: Any, name: str, version: str) -> Any:
    return client.get_model_version(name, version)


def _folder(name: str) -> dict[str, Any]:
    return {"name": name, "type": "directory", "size": 0}


def parts(path: str) -> tuple[str, str, str]:
    """Return the name of a model, its version and the path in it, each empty where nothing is said."""
    name, _, rest = path.strip("/").partition("/")
    version, _, below = rest.partition("/")
    return name, version, below


def connect() -> Any:
    """Return a client of the registry that the environment names.

    Raises:
        ImportError: if MLflow is not installed.
        InputError: if none is named, or it does not answer.
    """
    where = next((os.environ[one] for one in VARIABLES if os.environ.get(one)), None)
    if where is None:
        raise InputError(f"{SCHEME}: {' or '.join(VARIABLES)} says where the registry is, and neither is set")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    _check_there(where)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow.MlflowClient()


def _check_there(where: str) -> None:
    """Raise unless a server answers, or the file of a database is there, which MLflow would make.

    Raises:
        InputError: naming it without its password.
    """
    parts = urlsplit(where)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        check_answers(parts.hostname, port, asked=SCHEME)
    elif parts.scheme == "sqlite" and not Path(where.removeprefix("sqlite:///")).exists():
        raise InputError(f"{SCHEME}: {where}: there is no such file")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn MLflow's exceptions into those that file systems raise."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        kinds = {
            "RESOURCE_DOES_NOT_EXIST": FileNotFoundError,
            "PERMISSION_DENIED": PermissionError,
            "UNAUTHENTICATED": PermissionError,
        }
        denied = any(f"error code {code}" in str(error) for code in (401, 403))
        kind = PermissionError if denied else kinds.get(error.error_code, OSError)
        raise kind(str(error)) from error

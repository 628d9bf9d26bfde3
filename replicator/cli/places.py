"""Which database, which replica, which socket an argument names. Owns the search for the configuration; never opens a database."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.cli.words import note
from replicator.errors import ConfigError, FormatError, NothingToRestore, UsageError

if TYPE_CHECKING:
    from replicator.catalogue import Entry
    from replicator.config import Config, DatabaseConfig, ReplicaConfig
    from replicator.store import ObjectStore


def find_config(file: Path | None, no_expand_env: bool, *, required: bool) -> Config | None:
    """The configuration; None when there is none, or when the one in /etc is wrong and nothing depends on it."""
    from replicator import config

    named = file or config.default_file()
    if named is None:
        if required:
            raise UsageError("there is no configuration; name one with --config, or give a URL")
        return None
    try:
        return config.load(named, expand=not no_expand_env)
    except ConfigError as error:
        if required or file is not None:
            raise
        note(f"the configuration is left out of account: {error}")
        return None


def need_config(file: Path | None, no_expand_env: bool) -> Config:
    config = find_config(file, no_expand_env, required=True)
    assert config is not None
    return config


def replica_of(
    source: str, config: Config | None, identities: Sequence[str] = ()
) -> tuple[ObjectStore, DatabaseConfig | None]:
    """The replica that a URL, or the path of a configured database, names. identities: of age, that open it."""
    from replicator.config import ReplicaConfig

    if "://" in source:
        return (configured_at(source, config) or ReplicaConfig(source)).open(identities=identities), None
    assert config is not None
    path = Path(source).absolute()
    found = config.find(path)
    if found is None:
        raise UsageError(
            f"{source} is not in {config.file}; give the URL of its replica, or a path that `databases` lists"
        )
    return store_of(found, path, identities), found


def configured_at(source: str, config: Config | None) -> ReplicaConfig | None:
    """What the configuration says of the place at a URL, or above it: its server and credentials.

    A URL with another query is another place; credentials are not sent there.
    """
    place, _, query = source.partition("?")
    for entry in config.databases if config else ():
        known, _, known_query = entry.replica.url.partition("?")
        if query in ("", known_query) and f"{place.rstrip('/')}/".startswith(f"{known.rstrip('/')}/"):
            return dataclasses.replace(entry.replica, url=f"{place}?{known_query}" if known_query else place)
    return None


def store_of(entry: DatabaseConfig, path: Path, identities: Sequence[str] = ()) -> ObjectStore:
    from replicator import catalogue

    store = entry.replica.open(identities=identities)
    return store if entry.folder is None else catalogue.replica_of(store, name_in(entry, path))


def identities_of(identity_file: Path | None) -> tuple[str, ...]:
    """Of age: those of ``--identity``, or of the environment."""
    from replicator.age import given_identities

    return given_identities(identity_file)


def is_folder(store: ObjectStore) -> bool:
    """Whether the place holds the databases of a folder, and not a replica of its own."""
    from replicator import catalogue
    from replicator.replica import Replica

    return catalogue.is_there(store) and not Replica(store).timelines()


def folder_entry(
    source: str, configured: DatabaseConfig | None, config: Config | None, identities: Sequence[str] = ()
) -> Entry | None:
    """What a folder's replica says of the file of one of its databases, given by URL or path; None when it is none of a folder."""
    from replicator import catalogue

    if configured is not None:
        if configured.folder is None:
            return None
        return catalogue.find(configured.replica.open(identities=identities), name_in(configured, Path(source)))
    place, mark, query = source.partition("?")
    folder, _, encoded = place.rstrip("/").rpartition("/db/")
    if not folder:
        return None
    try:
        name = catalogue.decode(encoded)
    except FormatError:
        return None
    return catalogue.find(replica_of(f"{folder}{mark}{query}", config, identities)[0], name)


def socket_of(config_file: Path | None, no_expand_env: bool, named: Path | None) -> Path:
    from replicator import control

    if named is not None:
        return named
    if "REPLICATOR_SOCKET" not in os.environ:
        config = find_config(config_file, no_expand_env, required=False)
        if config is not None and config.socket_path is not None:
            return config.socket_path
    return control.default_path()


@contextmanager
def explained(store: ObjectStore, nothing_is_fine: bool) -> Iterator[list[bool]]:
    """Tells an empty place from the wrong moment, and a folder's replica from a database's. Yields [True], emptied if there is none."""
    found = [True]
    try:
        yield found
    except NothingToRestore as error:
        from replicator import catalogue
        from replicator.litestream.choice import is_litestream_at
        from replicator.replica import Replica

        names = list(catalogue.entries(store))
        if names:
            first = catalogue.replica_of(store, names[0]).url
            raise UsageError(
                f"{store.url} holds a folder of {len(names)} databases; name one of them, such as {first}"
            ) from error
        if not nothing_is_fine or Replica(store).segments() or is_litestream_at(store):
            raise
        found.clear()


def name_in(entry: DatabaseConfig, path: Path) -> Path:
    return Path(os.path.realpath(path)).relative_to(os.path.realpath(entry.path))

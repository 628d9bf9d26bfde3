-- Desired state of a fleet. Times are UTC milliseconds since 1970. What runs, and how it is, is never in here.

CREATE TABLE fleet (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    id TEXT NOT NULL,
    recovery_recipient TEXT NOT NULL
) STRICT;

CREATE TABLE nodes (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    region TEXT NOT NULL,
    recipient TEXT NOT NULL,
    joined_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE tokens (
    sha256 TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    abilities TEXT NOT NULL, -- a JSON array of names of actions
    created_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE apps (
    name TEXT PRIMARY KEY,
    created_ms INTEGER NOT NULL,
    destroyed_ms INTEGER,
    purge_after_ms INTEGER
) STRICT, WITHOUT ROWID;

CREATE TABLE releases (
    app TEXT NOT NULL REFERENCES apps (name) ON DELETE CASCADE,
    number INTEGER NOT NULL CHECK (number > 0),
    image TEXT NOT NULL,
    image_digest TEXT NOT NULL,
    config TEXT NOT NULL, -- the manifest, as JSON
    created_ms INTEGER NOT NULL,
    status TEXT NOT NULL,
    message TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (app, number)
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX one_live_release ON releases (app) WHERE status = 'live';
CREATE UNIQUE INDEX one_deploying_release ON releases (app) WHERE status = 'deploying';

CREATE TABLE machines (
    id TEXT PRIMARY KEY,
    app TEXT NOT NULL,
    release INTEGER NOT NULL,
    "group" TEXT NOT NULL,
    node TEXT NOT NULL,
    desired TEXT NOT NULL CHECK (desired IN ('started', 'stopped')),
    restarts INTEGER NOT NULL DEFAULT 0,
    FOREIGN KEY (app, release) REFERENCES releases (app, number) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

CREATE INDEX machines_of_app ON machines (app);

CREATE TABLE volumes (
    id TEXT PRIMARY KEY,
    app TEXT NOT NULL REFERENCES apps (name),
    name TEXT NOT NULL,
    node TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('creating', 'created', 'restoring')),
    destroyed_ms INTEGER,
    purge_after_ms INTEGER,
    UNIQUE (app, name)
) STRICT, WITHOUT ROWID;

-- What the next release will be given. sealed: age, to the nodes that run the app and to the recovery key.
CREATE TABLE secrets (
    app TEXT NOT NULL REFERENCES apps (name) ON DELETE CASCADE,
    name TEXT NOT NULL,
    sealed BLOB NOT NULL,
    updated_ms INTEGER NOT NULL,
    PRIMARY KEY (app, name)
) STRICT, WITHOUT ROWID;

-- What a release was given; a release never changes.
CREATE TABLE release_secrets (
    app TEXT NOT NULL,
    release INTEGER NOT NULL,
    name TEXT NOT NULL,
    sealed BLOB NOT NULL,
    PRIMARY KEY (app, release, name),
    FOREIGN KEY (app, release) REFERENCES releases (app, number) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

-- A short journal for people; the oldest lines go.
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,
    app TEXT NOT NULL,
    text TEXT NOT NULL
) STRICT;

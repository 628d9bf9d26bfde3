"""What Litestream, another replicator for SQLite, keeps in object storage: read for a restore, and written for its own."""

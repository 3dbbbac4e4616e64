"""Places that memories are written to, beside a Memharbor database (`memharbor.migrate.load`)."""

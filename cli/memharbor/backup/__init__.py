"""Physical backups of a stack: pgBackRest behind one class, and the restore that uses it."""

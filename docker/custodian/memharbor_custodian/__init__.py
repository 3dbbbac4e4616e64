"""What the custodian does with its keys: purge, undelete, and an off-site copy of the backup store."""

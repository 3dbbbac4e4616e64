#!/usr/bin/env python3
"""Print the inventory of MEMHARBOR_STACK (or of MEMHARBOR_DSN) for Ansible; it carries no secret."""

from memharbor.commands import main

if __name__ == "__main__":
    main(["stack", "inventory", "--output", "json"])

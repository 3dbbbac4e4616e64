#!/usr/bin/env python3
"""Print the inventory of MEMHARBOR_STACK (or of MEMHARBOR_DSN) for Ansible; it carries no secret."""

import json
import sys

from memharbor.stack import inventory

json.dump(inventory(), sys.stdout)

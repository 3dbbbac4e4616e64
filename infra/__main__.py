"""Stand the stack up: `pulumi up`. Everything is in `memharbor_infra`; this file is where Pulumi looks."""

import pulumi

from memharbor.errors import MemharborError
from memharbor.stack.conflicts import find_conflicts
from memharbor_infra.program import deploy

try:
    stack, config = pulumi.get_stack(), pulumi.runtime.get_config_env()
    deploy(stack, config, find_conflicts(stack, config))
except MemharborError as exc:
    raise pulumi.RunError("\nhint: ".join((exc.message, *exc.hints))) from None

"""Stand the stack up: `pulumi up`. Everything is in `memharbor_infra`; this file is where Pulumi looks."""

import pulumi

from memharbor.errors import MemharborError
from memharbor_infra.program import deploy

try:
    deploy(pulumi.get_stack(), pulumi.runtime.get_config_env())
except MemharborError as exc:
    raise pulumi.RunError("\nhint: ".join((exc.message, *exc.hints))) from None

"""
A stack: its config and secrets before the first `pulumi up`, its outputs after, and how it is deleted.

`config`, `secrets` and `certificates` are pure; `provisioner` makes all calls to Pulumi; `init` begins and ends a stack;
`outputs` is what everything that operates a stack reads. What is here is what other layers import.
"""

from memharbor.stack.outputs import (
    StackNotUpError,
    StackOutputs,
    build_inventory,
    dsn,
    environment,
    find_leader,
    read_outputs,
    stack_name,
)

__all__ = [
    "StackNotUpError",
    "StackOutputs",
    "build_inventory",
    "dsn",
    "environment",
    "find_leader",
    "read_outputs",
    "stack_name",
]

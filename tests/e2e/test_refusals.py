"""What `pulumi up` refuses before it changes anything, on a stack that is up."""

from __future__ import annotations

import socket

from tests.e2e.conftest import Stack


def test_other_dimensions_and_a_port_of_another_program_are_refused_together(stack: Stack) -> None:
    here = ("--stack", stack.name)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        try:
            stack.run("pulumi", "config", "set", "embedding_dims", "768", *here)
            stack.run("pulumi", "config", "set", "pool_port", str(port), *here)
            refused = stack.run("pulumi", "up", "--yes", "--skip-preview", "--non-interactive", *here, check=False)
        finally:
            stack.run("pulumi", "config", "set", "embedding_dims", "384", *here)
            stack.run("pulumi", "config", "set", "pool_port", stack.environ["MEMHARBOR_POOL_PORT"], *here)
    said = refused.stdout + refused.stderr
    assert refused.returncode != 0
    assert "2 wrong settings" in said
    assert f"pulumi config set embedding_dims 384 --stack {stack.name}" in said
    assert f"pool_port: {port} is in use by another program" in said
    # Its own ports are no obstacle, and nothing was changed on the way.
    stack.up("--refresh", "--expect-no-changes")


def test_settings_say_where_they_come_from(stack: Stack) -> None:
    kept = {key: value for key, value in stack.environ.items() if key != "MEMHARBOR_EMBEDDING_DIMS"}
    asked = Stack(stack.name, kept)
    origins = {each["setting"]: each["origin"] for each in asked.json("settings", "show")}
    assert origins["embedding_dims"] == f"config of stack {stack.name}"
    assert origins["pool_port"] == "environment"
    assert origins["leakproof"] == "default"


def test_a_stack_that_is_none_is_not_destroyed_and_those_that_are_named(stack: Stack) -> None:
    done = stack.memharbor("stack", "destroy", f"{stack.name}-x", "--yes", check=False)
    assert done.returncode == 3
    assert f"there are `{stack.name}`" in done.stderr

"""Roll Memharbor's SQL out: a thin edge over `memharbor.schema`."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: memharbor_sql
short_description: Roll Memharbor's SQL out
description:
  - Plans and applies the steps below sql_templates/ that are missing or changed, and nothing else.
  - Connects to the stack's database with the secrets of the stack, or to MEMHARBOR_DSN where that is set.
  - Secrets never pass through Ansible; the module reads them where it connects.
options:
  action:
    description: What to do.
    type: str
    required: true
    choices: [roles, database, apply, tenant_indexes, verify]
  component:
    description: The part of the schema that C(apply) rolls out.
    type: str
    choices: [settings, extension, tables, indexes, policies]
  stack:
    description: Name of the stack; not read where MEMHARBOR_DSN is set.
    type: str
    required: true
  settings:
    description: The settings, as the inventory has them. They must be those of the database.
    type: dict
    required: true
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Create policies and grants
  memharbor_sql:
    action: apply
    component: policies
    stack: dev
    settings: "{{ memharbor_settings }}"
"""

RETURN = r"""
applied:
  description: Names of the steps that were applied, or would be in check mode.
  type: list
  returned: success
  elements: str
notices:
  description: What the database's owner may not do, and what was left out for it.
  type: list
  returned: success
  elements: str
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "action": {
                "type": "str",
                "required": True,
                "choices": ["roles", "database", "apply", "tenant_indexes", "verify"],
            },
            "component": {"type": "str", "choices": ["settings", "extension", "tables", "indexes", "policies"]},
            "stack": {"type": "str", "required": True},
            "settings": {"type": "dict", "required": True},
        },
        required_if=[("action", "apply", ["component"])],
        supports_check_mode=True,
    )
    try:
        from memharbor.errors import MemharborError
        from memharbor.rollout import roll_out
    except ImportError as exc:
        module.fail_json(msg=f"the package memharbor is not installed for {module.params['action']}: {exc}")
    try:
        result: dict[str, Any] = roll_out(
            action=module.params["action"],
            component=module.params["component"],
            stack=module.params["stack"],
            settings=module.params["settings"],
            dry_run=module.check_mode,
        )
    except MemharborError as exc:
        module.fail_json(msg=exc.message, hints=list(exc.hints), exit_code=exc.exit_code)
    if not module._diff:
        result.pop("diff", None)
    module.exit_json(**result)


if __name__ == "__main__":
    main()

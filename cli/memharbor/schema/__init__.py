"""
The schema: its steps, their roll-out, its roles and its users' vector indexes.

DDL is in `sql_templates/`; this package renders, plans, applies and verifies it. It must not read the environment or
print: it is given a connection and settings, and answers with reports.
"""

from memharbor.names import ROLES
from memharbor.schema.applier import ApplyReport, PlannedStep, apply, plan
from memharbor.schema.downgrade import DowngradeReport, downgrade
from memharbor.schema.fingerprint import Difference, describe_catalog, differences, fingerprint
from memharbor.schema.ledger import HistoryEntry
from memharbor.schema.migrations import COMPONENTS, Step, context, load_steps
from memharbor.schema.render import render_script
from memharbor.schema.roles import RolesReport, apply_roles, ensure_database
from memharbor.schema.tenants import TenantIndexReport, tenant_indexes
from memharbor.schema.verification import MAINTENANCE_DATABASE, Finding, current, history, verify

__all__ = [
    "COMPONENTS",
    "MAINTENANCE_DATABASE",
    "ROLES",
    "ApplyReport",
    "Difference",
    "DowngradeReport",
    "Finding",
    "HistoryEntry",
    "PlannedStep",
    "RolesReport",
    "Step",
    "TenantIndexReport",
    "apply",
    "apply_roles",
    "context",
    "current",
    "describe_catalog",
    "differences",
    "downgrade",
    "ensure_database",
    "fingerprint",
    "history",
    "load_steps",
    "plan",
    "render_script",
    "tenant_indexes",
    "verify",
]

"""
The checks of `memharbor validate`: a live database, tried with unmodified Mem0 as applications use it.

    results = run_checks(ValidationContext(settings, admin_dsn, app_dsn, service_dsn, is_pooled=True, backup_status=…))

It is given DSNs and answers with results: it must not look for them itself, and not print.
"""

from memharbor.validation.checks import CHECKS
from memharbor.validation.results import BackupStatus, CheckResult, ValidationContext
from memharbor.validation.runner import run_checks

__all__ = ["CHECKS", "BackupStatus", "CheckResult", "ValidationContext", "run_checks"]

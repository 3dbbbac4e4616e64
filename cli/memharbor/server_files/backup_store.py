"""
Every configuration file of the embedded backup store: its users, the bucket's policy, its secrets.

Pure, like `memharbor.server_files.postgres`. The entrypoint of `docker/backup-store` brings them into force at each start.
"""

from __future__ import annotations

import json

from memharbor.server_files.postgres import STORE_BUCKET, ServerFile, tls_files
from memharbor.stack.secrets import StackSecrets


def render_store_users(secrets: StackSecrets) -> str:
    """Render versitygw's `users.json`: everybody but root, none of them an administrator."""
    accounts = {
        key: {"access": key, "secret": secret, "role": "user", "userID": 0, "groupID": 0, "projectID": 0}
        for key, secret in sorted(secrets.store_secrets.items())
        if key != "root"
    }
    return json.dumps({"accessAccounts": accounts}, indent=1) + "\n"


def render_store_policy() -> str:
    """
    Render the bucket's policy: pgBackRest reads, writes and deletes, but cannot delete a version or change a rule.

    The custodian owns the bucket and must be named, because a policy binds the owner too.
    """
    bucket, objects = f"arn:aws:s3:::{STORE_BUCKET}", f"arn:aws:s3:::{STORE_BUCKET}/*"
    object_actions = [
        "GetObject",
        "GetObjectVersion",
        "PutObject",
        "DeleteObject",
        "AbortMultipartUpload",
        "ListMultipartUploadParts",
    ]
    bucket_actions = ["ListBucket", "ListBucketVersions", "GetBucketLocation", "ListBucketMultipartUploads"]
    statements = [
        {"Principal": {"AWS": ["custodian"]}, "Action": "s3:*", "Resource": [bucket, objects]},
        {
            "Principal": {"AWS": ["pgbackrest"]},
            "Action": [f"s3:{action}" for action in object_actions],
            "Resource": objects,
        },
        {
            "Principal": {"AWS": ["pgbackrest"]},
            "Action": [f"s3:{action}" for action in bucket_actions],
            "Resource": bucket,
        },
    ]
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **statement} for statement in statements]}
    return json.dumps(policy, indent=1) + "\n"


def store_files(secrets: StackSecrets, node: str) -> tuple[ServerFile, ...]:
    """List the files of the backup store; the arguments are those of `postgres_files`."""
    return (
        ServerFile("store/bucket", STORE_BUCKET + "\n"),
        ServerFile("store/policy.json", render_store_policy()),
        ServerFile("store/users.json", render_store_users(secrets), is_secret=True),
        ServerFile("secrets/root", secrets.store_secrets["root"] + "\n", is_secret=True),
        ServerFile("secrets/custodian", secrets.store_secrets["custodian"] + "\n", is_secret=True),
        *tls_files(secrets, node),
    )

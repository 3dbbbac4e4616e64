"""Memharbor: a self-hosted PostgreSQL home for Mem0 memories."""

__version__ = "0.1.0"

"""
Memories in and out: source, transform, embed, load, verify; streamed, with files between the steps.

Why it is built so: docs/adr/0016-migration-by-segments.md.
"""

"""The files that the stack's servers read, rendered from settings and secrets: one module per image, all pure."""

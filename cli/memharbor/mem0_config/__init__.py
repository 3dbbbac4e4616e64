"""
Configurations of Mem0: old ones converted to the present release, and new ones for a stack.

An old configuration is read as data and never run (`reading`, `python_source`); it becomes plain values in which
variables of the environment stand as `Text` (`values`); `convert` decides, by the tables of `rules`, and asks the
installed Mem0 whether it takes the result (`checking`); `render` writes it as JSON or as Python. Secrets that stand in a
file never leave this package: `secrets` puts a reference to the environment in their place.

Source: mem0ai 0.1.118, 1.0.11 and the release of `memharbor.versions` (`configs/`, `memory/main.py`,
`vector_stores/pgvector.py`, `llms/`, `embeddings/`), compared with each other.
"""

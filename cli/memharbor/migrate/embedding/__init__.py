"""Embeddings for what has none: an OpenAI-compatible endpoint or a model of this machine, cached by model and text."""

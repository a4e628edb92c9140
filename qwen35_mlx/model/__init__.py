"""The language model, its caches, and loading it from a folder."""

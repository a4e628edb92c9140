"""What is computed: the language model, its caches, and reading it from a folder."""

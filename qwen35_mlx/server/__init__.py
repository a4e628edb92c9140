"""The HTTP server: the dialects of agents, and a page for people."""

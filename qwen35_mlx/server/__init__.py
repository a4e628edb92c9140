"""The HTTP server: OpenAI's, Anthropic's and Ollama's APIs on one engine."""

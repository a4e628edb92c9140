"""The HTTP server: OpenAI's, Anthropic's and Ollama's APIs before one engine."""

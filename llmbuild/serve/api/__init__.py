"""The HTTP API, as OpenAI's clients expect it: routes, what they read and write, metrics, and the server."""

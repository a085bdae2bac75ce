"""The nouns: frozen dataclasses on the standard library alone; nothing here reads a file or knows a tool."""

"""One OpenAI-compatible address in front of a fleet: routes, retries what was not begun, tells what broke."""

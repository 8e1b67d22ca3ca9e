"""Anthropic's routes, as translations to a chat."""

"""Google's Gemini routes, as translations to a chat."""

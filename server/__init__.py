"""HTTP becomes tokens. Needs aiohttp; nothing of `export`."""

"""How long a test waits for what comes when it comes."""

HANGS_SECONDS = 120
"""After which what has not come is taken for never to come; a busy machine may take long."""

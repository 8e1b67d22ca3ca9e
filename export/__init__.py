"""A Hugging Face model becomes an engine bundle. Needs torch; never imported by `runtime` or `server`."""

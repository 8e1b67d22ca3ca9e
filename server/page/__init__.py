"""The page at `/` and the documentation at `/docs`: plain ES modules that the browser runs as they are, and what serves them."""

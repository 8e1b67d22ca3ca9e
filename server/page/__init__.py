"""The page at `/` and the documentation at `/docs`: plain ES modules that browsers run as they are, and what serves them."""

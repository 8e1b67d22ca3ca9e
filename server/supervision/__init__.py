"""The supervisor: which models are loaded where, and the processes that serve them. Sees no token."""

"""The routes: what clients send, and how their answers are written."""

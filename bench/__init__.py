"""Latency and throughput of engines and of servers, measured as their users meet them."""

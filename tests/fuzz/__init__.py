"""Requests that nobody would write, thrown at the server: `make fuzz`."""

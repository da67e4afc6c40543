"""Benches. Each measures one thing and writes one JSON file with the numbers, the machine and the command."""

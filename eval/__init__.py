"""Measurements of the system: quality, speed and what it survives."""

"""Runs a schedule: strips of rows in a flat loop, and what lies between passes."""

"""Patches models for the length of one of the WebUI's runs: its settings, and what stands in for methods meanwhile."""

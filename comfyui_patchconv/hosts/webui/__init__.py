"""Patch Conv for the length of one of the WebUI's runs: settings, and what is put on its models meanwhile."""

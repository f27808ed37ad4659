"""The commands of ``probe``: one file each, found by the registry."""

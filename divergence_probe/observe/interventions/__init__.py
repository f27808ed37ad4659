"""What ``--confirm`` changes: one file a kind of intervention, found by :mod:`.registry`."""

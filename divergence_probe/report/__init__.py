"""Reports: a diagnosis in, text out; one file a format, found by :mod:`.registry`."""

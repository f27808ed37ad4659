"""One file a library: where its inner loops begin, step and end.

A module here defines ``LIBRARY`` (the import name that triggers it) and
``install(patches, session)``, called once the user's program has imported that library.
"""

"""A prepared run on a GPU machine without network: uploads of at most 64 MiB, commands of at most 10 minutes. See README.md.

`wheels`, `pack` and `calls` work here; `store`, `runner` and `work` there. `store` and `runner` need Python alone.
"""

"""The keys of a run, one file a section, each with its type, default and meaning. A section sees only itself; rules
that span sections are in `config/checks.py`."""

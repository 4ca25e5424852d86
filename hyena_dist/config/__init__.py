"""The keys of a run and what they may be: sections, loading, the rules that span sections, identity. Pure: no torch,
no process group, and of the disk only the configuration's own files."""

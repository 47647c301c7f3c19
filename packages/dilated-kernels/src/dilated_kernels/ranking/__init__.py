"""Which backend `auto` tries first: a table, and measurements on the machine at hand."""

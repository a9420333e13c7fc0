"""One table of roles for each architecture; `peftx.kernel.anatomy.table.Table` says what stands in it."""

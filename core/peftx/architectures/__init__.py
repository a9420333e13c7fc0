"""One table of roles for each architecture; `peftx.kernel.anatomy.Table` says what stands in it."""

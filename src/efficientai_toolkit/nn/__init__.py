"""The functional bridge, layers that behave under `vmap` and second order, and losses."""

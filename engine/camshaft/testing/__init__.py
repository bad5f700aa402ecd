"""Tools for tests of plugins: forked ranks, and a recipe run beside one plain process."""

"""Generators of the documentation that follows the code: ``python -m tools.docs [--check]``."""

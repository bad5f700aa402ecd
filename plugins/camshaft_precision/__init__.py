"""Not written yet."""
from camshaft import Plugin

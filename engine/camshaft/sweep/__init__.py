"""``camshaft sweep``: several runs of one recipe with other values, and which of them is best.

``file`` reads and checks a sweep's file, ``agents`` writes it for W&B's own command, ``local`` runs it here with
Optuna and a SQLite file, ``trial`` is one run of it. Importing this imports neither torch nor Optuna.
"""

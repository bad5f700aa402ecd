"""Proving a recipe: its plugins on a small model beside one plain process, number by number.

``examine.verify`` is the proof, ``certificate.lookup`` finds what an earlier one left, without torch.
"""

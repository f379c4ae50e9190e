"""Comparisons with what people would use instead, as pairs in turn: ``scripts/bench``.

``plan`` says how much, ``pairs`` runs, ``row`` is what comes out, ``result`` keeps it and ``page`` shows it. ``peers``
finds the others, ``moving`` and ``end`` are our side, two processes. One module for each group of rows. ``acceptance``
is a program of its own.
"""

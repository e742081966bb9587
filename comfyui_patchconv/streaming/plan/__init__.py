"""Integers in, integers out: what is stored, what is recomputed, how high strips are, where stored maps lie.

`sweep` counts one pass in strips, `passes` decides on the passes one after the other, `choose` tries several such
schedules and keeps the best, `cost` reckons time. None of them sees a tensor.
"""

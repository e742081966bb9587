"""Integers in, integers out: what is stored, what is recomputed, how high strips are, where stored maps lie.

`choose` tries several schedules and takes the best. `passes` makes one of them, pass by pass: `for_later` and
`reduced` say what a pass stores and gathers beside what it is made for, `cost` reckons its time, `sweep` counts it in
strips along a `way` of steps. `lifetimes` knows what is stored until when, `placement` where it lies. `eagerly` counts
eager, `copies` what operators copy, `bands` has the rows of each of several ranks. None of them sees a tensor.
"""

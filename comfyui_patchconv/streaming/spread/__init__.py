"""One schedule over the ranks of a process group: each computes a band of the rows of every map.

`agree` has all ranks follow one plan. Before a pass `Together` fetches the rows beside this rank's bands that the pass
reads, which every rank works out for all of them from the same integers (`bands`); behind it, it merges what was
gathered and puts together what a step needs whole. `ranks` sends and receives, `watch` notices who is missing.
"""

"""One schedule over the ranks of a process group: each computes a band of the rows of every map.

`agree` has all ranks follow one plan. Before a pass `Together` fetches the rows beside this rank's bands that the pass
reads, which every rank works out for all of them from the same integers (`moves`); behind it, it merges what was
gathered and puts together what a step needs whole. Keys and values of attention stay in bands where a budget has no
room for all of them, and go from rank to rank in pieces. `ranks` sends and receives, `watch` notices who is missing.

A batch is split by sample first (`samples`). Where no recorded step mixes samples, which `graph.samples` knows, the
ranks come in as many groups as divide both their number and the batch, and each group takes as many samples: a rank
follows the plan for these alone, over the rows that it shares with the others of its group, and only the results go to
the other groups. Where the two have no divisor in common, or samples are mixed, each rank has a band of the rows of
all. `results` leaves results in bands, and puts them together on one rank.
"""

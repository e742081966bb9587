"""Runs the caller's code once, on tensors that stand for values which are computed later.

`lazy` is that tensor, `memory` what it shares with others, `recorder` what each operator adds to the graph, `shapes`
what its result looks like, `operators` which steps it becomes.
"""

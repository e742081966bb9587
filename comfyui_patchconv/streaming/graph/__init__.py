"""What a recorded program computes, as integers and steps: `node` is what a plan reads, `steps` is what strips run.

`statistics` merges those of a norm, `attention` takes its keys and values piece by piece, `samples` knows whether a
batch can be parted.
"""

"""One picture over several devices of this machine: worker processes beside the host's, which is rank 0.

`spread` is what a stand-in asks to run its call; it falls back to one device, and says why. `team` starts the workers,
sends them what they are to run, and ends them; `worker_script` is what they begin as, `worker` what they then do.
`packing` takes a function and its arguments apart for another process, and `frames` writes and reads the parts.
"""

"""What a recorded program computes, as integers and steps: `node` is what a plan reads, `steps` is what strips run."""

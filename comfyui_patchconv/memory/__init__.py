"""Memory of a device and of this process: errors, what is free, what allocators keep, and recorded peaks."""

"""Which device computes, how exactly, and whether a GPU can be used."""

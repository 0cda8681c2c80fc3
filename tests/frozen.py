"""Imported last by the server that processes are forked from: what it has imported stays out of their garbage
collections, which would read it all, and so copy its pages, in each of them."""

import gc

gc.collect()
gc.freeze()

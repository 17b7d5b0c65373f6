"""What every kind of memory stands on: state, cache, the call under way, the loop that reads a text, hooks, the base
classes of memories, and looking at a model. Nothing here knows a kind."""

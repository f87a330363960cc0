"""How the three processes talk: length-prefixed, typed frames on socket pairs. What is not in `messages` is not said."""

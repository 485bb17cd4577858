"""The users' page at the generated URL: ask to be moved, then see how far it is."""

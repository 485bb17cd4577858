"""Throw-away mail servers on loopback: the story's stage and the tests' fixtures.

Every server runs in a private directory, on free ports of 127.0.0.1, and is
stopped by the process id that the lab itself started. The host's own Postfix,
Dovecot and PostgreSQL are never touched.
"""

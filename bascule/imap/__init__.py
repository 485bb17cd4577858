"""Reading and writing a mailbox over IMAP, whoever's server it is.

The legacy server and this host's own Dovecot are asked by the same code; what
compares the two does its own reading (``bascule.migrator.verification``).
"""

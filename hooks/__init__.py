"""Dovecot's passdb and userdb for every name in a domain of ours.

The logic is in the resident authenticator (``service``, ``authenticator``); what
Dovecot runs, ``passdb.lua`` or the script ``bascule-checkpassword``, is a thin
client of it (``protocol``).
"""
